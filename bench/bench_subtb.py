"""Time of the padded SubTB loss, forward and backward, over its length: ours, all pairs, the window loop.

`python bench/bench_subtb.py` prints a table and appends its rows to bench/results/<device>/subtb.csv.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from harness import append_rows, percentiles, time_interleaved
from torch import Tensor

from fastgfn.functional.subtb import subtb_loss
from fastgfn.ops.subtb import subtb_padded
from fastgfn.reference import subtb as reference
from fastgfn.testing import relative_error

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
# A quadratic provider is dropped once its next length would pass 2 s.
MOST_MS = 500.0
# Of the all-pairs provider, whose ten or so fp32 buffers of N (L + 1)^2 must fit the machine.
MOST_PAIRS = 2**26
TOLERANCE = {"fastgfn": 1e-6, "fastgfn_op": 1e-6, "all_pairs": 1e-4, "window_loop": 1e-4}

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def make_inputs(num_rows: int, length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged rows of L/2..L transitions with flows some 100 nats off the path, as in early training."""
    generator = torch.Generator().manual_seed(length)
    log_pf = -2 * torch.rand(num_rows, length, generator=generator)
    log_flow = torch.nn.functional.pad(log_pf.cumsum(1), (1, 0))
    log_flow += 100 * torch.randn(num_rows, length + 1, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (num_rows,), generator=generator)
    lengths[0] = length
    return log_pf.to(device), log_flow.to(device), lengths.to(device)


def fastgfn_loss(log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float) -> Tensor:
    return subtb_loss(log_pf, log_flow, lengths, subtb_lambda=subtb_lambda)


def op_loss(log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float) -> Tensor:
    """The op without the checks and reductions around it, whose cost does not depend on L."""
    num, den = subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    return num.sum() / den.sum()


def all_pairs_loss(log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float) -> Tensor:
    num, den = reference.subtb_padded(log_pf, log_flow, lengths, subtb_lambda)
    return num.sum() / den.sum()


def window_loop_loss(log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float) -> Tensor:
    """One vectorised pass per window length, as the published loss does; own code."""
    steps = log_pf + log_flow[:, :-1] - log_flow[:, 1:]
    path = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    state = torch.arange(path.shape[1], device=path.device)
    total, weight = 0.0, 0.0
    for m in range(1, path.shape[1]):
        inside = state[m:] <= lengths[:, None]
        square = (path[:, m:] - path[:, :-m]) ** 2
        total = total + subtb_lambda ** (m - 1) * square.masked_fill(~inside, 0.0).sum()
        weight = weight + subtb_lambda ** (m - 1) * inside.sum()
    return total / weight


PROVIDERS: dict[str, Loss] = {
    "fastgfn": fastgfn_loss,
    "fastgfn_op": op_loss,
    "all_pairs": all_pairs_loss,
    "window_loop": window_loop_loss,
}


def value_and_grads(loss: Loss, inputs: tuple[Tensor, ...], subtb_lambda: float) -> tuple[Tensor, ...]:
    log_pf, log_flow = (x.detach().requires_grad_() for x in inputs[:2])
    value = loss(log_pf, log_flow, inputs[2], subtb_lambda)
    return value.detach(), *torch.autograd.grad(value, (log_pf, log_flow))


def check(names: list[str], inputs: tuple[Tensor, ...], subtb_lambda: float) -> tuple[list[str], float]:
    """The providers that may be timed, and the error of fastgfn, on the first two rows.

    A rival that is off by more than its tolerance is named and left out; if fastgfn is, nothing is timed.
    """
    few = tuple(x[:2] for x in inputs)
    truth = value_and_grads(all_pairs_loss, (few[0].double(), few[1].double(), few[2]), subtb_lambda)
    errors = {}
    for name in names:
        got = value_and_grads(PROVIDERS[name], few, subtb_lambda)
        errors[name] = max(relative_error(a, b) for a, b in zip(got, truth, strict=True))
        if not errors[name] <= TOLERANCE[name]:
            print(f"bench_subtb: {name} is off by {errors[name]:.3g}, more than {TOLERANCE[name]}; not timed")
            if name.startswith("fastgfn"):
                raise SystemExit(1)
    return [name for name in names if errors[name] <= TOLERANCE[name]], errors["fastgfn"]


def growth(medians: dict[int, float]) -> float | None:
    """Exponent p of time - fixed cost ~ L^p from L = 512 on; the fixed cost is the shortest length's time."""
    fixed = medians[min(medians)]
    points = [
        (math.log(length), math.log(ms - fixed))
        for length, ms in medians.items()
        if length >= 512 and ms > fixed
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="trajectories in the batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--subtb-lambda", type=float, default=1.0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, medians = [], {name: {} for name in PROVIDERS}
    for length in LENGTHS:
        inputs = make_inputs(args.rows, length, device)
        names = [
            name
            for name in PROVIDERS
            if max(medians[name].values(), default=0.0) < MOST_MS
            and (name != "all_pairs" or args.rows * (length + 1) ** 2 <= MOST_PAIRS)
        ]
        names, error = check(names, inputs, args.subtb_lambda)
        steps = {name: partial(value_and_grads, PROVIDERS[name], inputs, args.subtb_lambda) for name in names}
        times = time_interleaved(steps, repeats=args.repeats)
        for name in names:
            spread = percentiles(times[name])
            medians[name][length] = spread["ms_p50"]
            shape = {"provider": name, "mode": "fwd+bwd", "dtype": "float32", "N": args.rows, "L": length}
            rows.append(shape | {"subtb_lambda": args.subtb_lambda, "repeats": args.repeats} | spread)
        shown = ", ".join(f"{name} {medians[name][length]:9.3f}" for name in names)
        print(f"L {length:5d}  ms p50: {shown}   fastgfn's largest relative error {error:.1e}")
    for name, found in medians.items():
        power = growth(found)
        if power is not None:
            print(f"{name}: time above its time at L = {min(found)} grows as L^{power:.2f} from L = 512 on")
    print(append_rows("subtb", rows))


if __name__ == "__main__":
    main()
