"""Shared by tests and benches: the tolerance rule, the three-way assert, random packed inputs and trees.

The rule: the fused op's error against the float64 truth may be at most twice the error of the naive
computation in the same dtype, plus a floor. It is never looser anywhere.
"""

import torch
from torch import Tensor

FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-3,
}
GRADIENT_FACTOR = 3.0


def assert_close_to_truth(
    name: str, fused: Tensor, naive: Tensor, truth: Tensor, *, grad: bool = False
) -> None:
    """Three-way check, elementwise against the largest naive error; all three tensors have one shape.

    The floor is relative to the largest magnitude of the truth (at least 1) and is taken from the naive
    tensor's dtype.
    """
    assert fused.shape == truth.shape, f"{name}: shape {tuple(fused.shape)}, truth {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    t = truth.double()
    scale = max(1.0, float(t.abs().max()))
    floor = FLOORS[naive.dtype] * scale * (GRADIENT_FACTOR if grad else 1.0)
    bound = 2.0 * float((naive.double() - t).abs().max()) + floor
    error = (fused.double() - t).abs()
    worst = int(error.argmax()) if not bool(error.isnan().any()) else int(error.isnan().int().argmax())
    ok = bool((error <= bound).all())
    values = [float(x.reshape(-1)[worst]) for x in (fused, naive, truth)]
    assert ok, (
        f"{name}: worst at flat index {worst}: fused {values[0]:.9g}, naive {values[1]:.9g}, "
        f"truth {values[2]:.9g}, bound {bound:.3g}"
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|, 0 if both are empty or zero."""
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.double().abs().max())
    error = float((value.double() - truth.double()).abs().max())
    return error if scale == 0 else error / scale


def random_sequences(
    generator: torch.Generator, *, num_groups: int, per_group: int, max_length: int, vocab: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Random prompts, sequences (lengths 0..max_length, the extremes always present) and their groups.

    A small `vocab` makes shared prefixes and duplicates frequent.
    """

    def draw(high: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    prompts = [draw(vocab, (int(draw(4)) + 1,)).tolist() for _ in range(num_groups)]
    sequences, groups = [], []
    for g in range(num_groups):
        for k in range(per_group):
            length = {0: 0, 1: max_length, 2: 1}.get(k, int(draw(max_length + 1)))
            sequences.append(draw(vocab, (length,)).tolist())
            groups.append(g)
    return prompts, sequences, groups


def random_depths(size: int, *, deeper: float = 0.85, seed: int = 0) -> list[int]:
    """Depths in preorder of a random forest; a node is a child of the one before with chance `deeper`."""
    generator, depths = torch.Generator().manual_seed(seed), []
    for _ in range(size):
        last = depths[-1] + 1 if depths else 0
        goes_down = float(torch.rand((), generator=generator)) < deeper
        depths.append(last if goes_down else int(torch.randint(last + 1, (), generator=generator)))
    return depths


def forest(depths: list[int]) -> tuple[Tensor, Tensor]:
    """end (T,) int32 and position (T,) int64 of the forest with these depths in preorder."""
    size = len(depths)
    end = [next((i for i in range(j + 1, size) if depths[i] <= depths[j]), size) for j in range(size)]
    return torch.tensor(end, dtype=torch.int32), torch.tensor(depths, dtype=torch.int64)
