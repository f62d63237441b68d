"""Shared by tests and benches: the tolerance rule, the three-way asserts (of a tensor, of an op with its
gradients, of draws), random packed inputs and trees.

The rule: the fused op's error against the float64 truth may be at most twice the error of the naive
computation in the same dtype, plus a floor. It is never looser anywhere.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgfn.reference import sample_next as reference_draws

FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-3,
}
GRADIENT_FACTOR = 3.0


def assert_close_to_truth(
    name: str, fused: Tensor, naive: Tensor, truth: Tensor, *, grad: bool = False, naive_error: float = 0.0
) -> None:
    """Three-way check, elementwise against the largest naive error; all three tensors have one shape.

    The floor is relative to the largest magnitude of the truth (at least 1) and is taken from the naive
    tensor's dtype. Where the truth is infinite, fused must be the same infinity. naive_error: a naive error
    of like inputs, which counts where it is the larger.
    """
    assert fused.shape == truth.shape, f"{name}: shape {tuple(fused.shape)}, truth {tuple(truth.shape)}"
    infinite = truth.isinf()
    if bool(infinite.any()):
        assert torch.equal(fused[infinite].double(), truth[infinite].double()), f"{name}: not infinite"
        fused, naive, truth = (x[~infinite] for x in (fused, naive, truth))
    if truth.numel() == 0:
        return
    t = truth.double()
    scale = max(1.0, float(t.abs().max()))
    floor = FLOORS[naive.dtype] * scale * (GRADIENT_FACTOR if grad else 1.0)
    bound = 2.0 * max(naive_error, float((naive.double() - t).abs().max())) + floor
    error = (fused.double() - t).abs()
    worst = int(error.argmax()) if not bool(error.isnan().any()) else int(error.isnan().int().argmax())
    ok = bool((error <= bound).all())
    values = [float(x.reshape(-1)[worst]) for x in (fused, naive, truth)]
    assert ok, (
        f"{name}: worst at flat index {worst}: fused {values[0]:.9g}, naive {values[1]:.9g}, "
        f"truth {values[2]:.9g}, bound {bound:.3g}"
    )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x in dtype with its strides and offset; what lies between its elements is copied too."""
    if x.numel() == 0:
        return x.to(dtype, copy=True)
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    flat = x.as_strided((x.storage_offset() + reach,), (1,), 0).to(dtype, copy=True)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def assert_equals_reference(
    op: Callable,
    reference: Callable,
    inputs: dict,  # by argument name; floating-point tensors are cast to dtype with their strides
    leaves: tuple[str, ...],
    dtype: torch.dtype,
    upstream: str = "random",  # "random" | "expanded" | "transposed"
) -> None:
    """All outputs of op, and the gradients of the leaves, by the rule of the tolerances.

    The truth is the reference in float64 on the inputs rounded to dtype; integers must be equal. Of few
    elements the naive error may be small by luck: what fails then has to pass with the largest naive error
    of inputs that are smaller by up to a sixteenth in every element.
    """
    naive, truth = _naive_and_truth(reference, inputs, leaves, dtype, upstream)
    fused = outputs_and_gradients(op, inputs, leaves, dtype, upstream)
    assert fused.keys() == truth.keys()
    for name, want in truth.items():
        if not want.is_floating_point():
            assert fused[name].dtype == want.dtype and torch.equal(fused[name], want), name
            continue
        values = (name, fused[name], naive[name], want)
        try:
            assert_close_to_truth(*values, grad=name.startswith("d "))
        except AssertionError:
            if dtype == torch.float64:
                raise
            error = max(_naive_error(reference, inputs, leaves, dtype, upstream, name, i) for i in range(16))
            assert_close_to_truth(*values, grad=name.startswith("d "), naive_error=error)


def _naive_and_truth(reference, inputs, leaves, dtype, upstream) -> tuple[dict, dict]:
    rounded = {n: cast(cast(x, dtype), torch.float64) if _is_float(x) else x for n, x in inputs.items()}
    truth = outputs_and_gradients(reference, rounded, leaves, torch.float64, upstream)
    if dtype == torch.float64:
        return truth, truth
    return outputs_and_gradients(reference, inputs, leaves, dtype, upstream), truth


def _naive_error(reference, inputs, leaves, dtype, upstream, name, seed) -> float:
    generator, near = torch.Generator().manual_seed(seed), dict(inputs)
    for n, x in inputs.items():
        if _is_float(x):
            near[n] = x * (1 - torch.rand(x.shape, generator=generator) / 16)
    naive, truth = (x[name].double() for x in _naive_and_truth(reference, near, leaves, dtype, upstream))
    finite = truth.isfinite()
    return float((naive - truth)[finite].abs().max()) if bool(finite.any()) else 0.0


def outputs_and_gradients(
    function: Callable, inputs: dict, leaves: tuple[str, ...], dtype: torch.dtype, upstream: str
) -> dict[str, Tensor]:
    """Outputs by number, and "d <leaf>" under an upstream gradient that every dtype represents exactly."""
    call = {n: cast(x, dtype) if _is_float(x) else x for n, x in inputs.items()}
    tensors = [call[name].requires_grad_() for name in leaves]
    outs = dict(enumerate(_flat(function(**call))))
    named = {f"output {i}": out.detach() for i, out in outs.items() if out is not None}
    outs = {i: out for i, out in outs.items() if out is not None and out.requires_grad}
    grads = [torch.zeros_like(x) for x in tensors]
    if outs and tensors:
        given = [_upstream(out, upstream, seed=i) for i, out in outs.items()]
        grads = torch.autograd.grad(list(outs.values()), tensors, given, materialize_grads=True)
    return named | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _upstream(out: Tensor, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "expanded":
        return torch.tensor(0.75 + seed, dtype=out.dtype).expand(out.shape)
    eighths = torch.randint(-16, 17, out.shape, generator=generator).to(out.dtype) / 8
    if kind == "transposed" and out.dim() > 1:
        return eighths.transpose(0, -1).contiguous().transpose(0, -1)
    return eighths


def _flat(value) -> list[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _flat(part)]


def _is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|, 0 if both are empty or zero."""
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.double().abs().max())
    error = float((value.double() - truth.double()).abs().max())
    return error if scale == 0 else error / scale


def assert_fits(counts: Tensor, p: Tensor, *, level: float = 1e-3) -> None:
    """Chi-squared: counts (K,) of draws fit the probabilities p (K,); else, a case of `level` in all.

    Outcomes expected fewer than 5 times are one; those of probability 0 must not occur. The quantile is
    Wilson and Hilferty's (1931).
    """
    assert not bool(counts[p == 0].any()), "an outcome of probability 0 was drawn"
    expected, observed = p.double() * counts.sum(), counts.double()
    rare = expected < 5
    observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    observed, expected = (x[expected > 0] for x in (observed, expected))
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
    most = float(torch.special.ndtri(torch.tensor(1 - level, dtype=torch.float64)))
    assert z < most, f"chi-squared {statistic:.4g} with {freedom} degrees of freedom"


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


def parents(depths: list[int]) -> Tensor:
    """parent (T,) int32 of the forest with these depths in preorder."""
    path, parent = [], []
    for i, depth in enumerate(depths):
        path[depth:] = [i]
        parent.append(path[depth - 1] if depth else -1)
    return torch.tensor(parent, dtype=torch.int32)


DRAWN = ("log_pf", "log_pterm", "log_behavior")


def assert_drawn_tokens(token: Tensor, args: dict, rounding: float = 1e-5) -> None:
    """Equal to the float64 argmax, but where two scores are within `rounding`, relative to the larger.

    args: those of `reference.sample_next.gumbel_draw` by name.
    """
    z = _draw_logits(args["logits"].double(), args)
    noise = reference_draws.noise_words(args["seed"], args["trajectory"], args["position"], z.shape[1])
    score = z / args["temperature"].double()[:, None] + reference_draws.gumbel(noise)
    best, want = score.max(1)
    gap = best - score.gather(1, token[:, None])[:, 0]
    close = gap <= rounding * best.abs().clamp(min=1.0)
    assert bool(close.all()), f"gap {float(gap.max()):.3g}"
    assert (token != want).sum() <= 1 + len(token) // 1000


def assert_drawn_log_probs(
    drawn: tuple[Tensor, ...], args: dict, naive_logits: Tensor | None = None, names: tuple = DRAWN
) -> None:
    """The log-probs of the tokens that were drawn, by the rule of the tolerances; in naive_logits' dtype.

    As in `assert_equals_reference`, what fails by luck of the naive has to pass with its neighbours' error.
    """
    token, exact = drawn[0], args["logits"].double()
    naive_logits = args["logits"].float() if naive_logits is None else naive_logits
    naive, truth = (_log_probs_of(token, logits, args) for logits in (naive_logits, exact))
    for i, name in enumerate(DRAWN):
        if name not in names:
            continue
        assert drawn[1 + i].dtype == naive_logits.dtype
        values = (name, drawn[1 + i], naive[i], truth[i])
        try:
            assert_close_to_truth(*values)
        except AssertionError:
            if naive_logits.dtype == torch.float64:
                raise
            error = 0.0
            for seed in range(16):
                generator = torch.Generator().manual_seed(seed)
                near = exact * (1 - torch.rand(exact.shape, generator=generator) / 16)
                low, want = (_log_probs_of(token, x, args)[i] for x in (near.to(naive_logits.dtype), near))
                error = max(error, float((low - want)[want.isfinite()].abs().max()))
            assert_close_to_truth(*values, naive_error=error)


def _log_probs_of(token: Tensor, logits: Tensor, args: dict) -> tuple[Tensor, Tensor, Tensor]:
    z, stop, token = _draw_logits(logits, args), args["termination_token_id"], token[:, None]
    log_q = z.log_softmax(1)
    tempered = (z / args["temperature"].to(z.dtype)[:, None]).log_softmax(1)
    log_pterm = log_q[:, stop] if stop >= 0 else torch.full((len(z),), -math.inf)
    return log_q.gather(1, token)[:, 0], log_pterm, tempered.gather(1, token)[:, 0]


def _draw_logits(logits: Tensor, args: dict) -> Tensor:
    """(K, V) logits of every draw, -inf at a forbidden stop token."""
    z, stop = logits[args["rows"]], args["termination_token_id"]
    if stop >= 0:
        z[:, stop] = z[:, stop].masked_fill(args["forbid_stop"], -math.inf)
    return z
