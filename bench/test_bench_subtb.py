"""The padded SubTB loss, forward and backward: all windows pooled, or averaged per trajectory.

Mode "fwd+bwd" pools the windows of the batch; "fwd+bwd,trajectory" weighs every trajectory alike, as
torchgfn's geometric_within does, with its default lambda of 0.9.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from suite import Bench, Case, NotAvailable, Outputs, Provider, Step, make_cases, worst_error
from torch import Tensor

from fastgfn.functional.subtb import subtb_loss
from fastgfn.ops.subtb import subtb_padded
from fastgfn.reference import subtb as reference

BY_ROW = "fwd+bwd,trajectory"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
# Of the all-pairs providers, whose ten or so fp32 buffers of N (L + 1)^2 must fit the machine.
MOST_PAIRS = {"cpu": 2**26, "cuda": 2**30}
# Of the window loops on the CPU, where more takes seconds.
MOST_WINDOWS = {"cpu": 2**28, "cuda": 2**40}


class Inputs(NamedTuple):
    log_pf: Tensor  # (N, L)
    log_flow: Tensor  # (N, L + 1)
    lengths: Tensor  # (N,)


# (numerator, denominator) of every row.
Rows = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Loss = Callable[[Case, Inputs], Tensor]


def cases(device: str, shapes: str) -> list[Case]:
    rows, lengths = (8, (32,)) if shapes == "short" else (256, LENGTHS)
    pooled = [dict(N=rows, L=length, subtb_lambda=1.0) for length in lengths]
    by_row = [dict(N=rows, L=length, subtb_lambda=0.9) for length in lengths if length in (32, 256)]
    found = make_cases("subtb", device, ["fwd+bwd"], ["float32"], pooled)
    return found + make_cases("subtb", device, [BY_ROW], ["float32"], by_row)


def make_inputs(case: Case) -> Inputs:
    """Ragged rows of L/2..L transitions with flows some 100 nats off the path, as in early training."""
    num_rows, length = case["N"], case["L"]
    generator = torch.Generator().manual_seed(length)
    log_pf = -2 * torch.rand(num_rows, length, generator=generator)
    log_flow = torch.nn.functional.pad(log_pf.cumsum(1), (1, 0))
    log_flow += 100 * torch.randn(num_rows, length + 1, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (num_rows,), generator=generator)
    lengths[0] = length
    return Inputs(*(x.to(case.device) for x in (log_pf, log_flow, lengths)))


def step(case: Case, inputs: Inputs, loss: Loss) -> Step:
    log_pf, log_flow = (x.detach().requires_grad_() for x in inputs[:2])

    def run() -> Outputs:
        value = loss(case, Inputs(log_pf, log_flow, inputs.lengths))
        return value.detach(), *torch.autograd.grad(value, (log_pf, log_flow))

    return Step(run)


def reduced(case: Case, inputs: Inputs, rows: Rows) -> Tensor:
    num, den = rows(*inputs, case["subtb_lambda"])
    return (num / den).mean() if case.mode == BY_ROW else num.sum() / den.sum()


def fastgfn(case: Case, inputs: Inputs) -> Tensor:
    normalization = "trajectory" if case.mode == BY_ROW else "batch"
    return subtb_loss(*inputs, subtb_lambda=case["subtb_lambda"], normalization=normalization)


def fastgfn_op(case: Case, inputs: Inputs) -> Tensor:
    """Without the checks and reductions around the op, whose cost does not depend on L."""
    return reduced(case, inputs, subtb_padded)


def need_few_pairs(case: Case) -> None:
    pairs, most = case["N"] * (case["L"] + 1) ** 2, MOST_PAIRS[case.device]
    if pairs > most:
        raise NotAvailable(f"N (L + 1)^2 = {pairs} pairs, more than {most}, do not fit")


def all_pairs(case: Case, inputs: Inputs) -> Step:
    need_few_pairs(case)
    return step(case, inputs, partial(reduced, rows=reference.subtb_padded))


def compiled(case: Case, inputs: Inputs) -> Step:
    need_few_pairs(case)
    rows = torch.compile(reference.subtb_padded, dynamic=False, fullgraph=True)
    return step(case, inputs, partial(reduced, rows=rows))


def window_loop(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float
) -> tuple[Tensor, Tensor]:
    """One vectorised pass per window length, as the published loss does; own code."""
    steps = log_pf + log_flow[:, :-1] - log_flow[:, 1:]
    path = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    state = torch.arange(path.shape[1], device=path.device)
    total, weight = 0.0, 0.0
    for m in range(1, path.shape[1]):
        inside = state[m:] <= lengths[:, None]
        square = (path[:, m:] - path[:, :-m]) ** 2
        total = total + subtb_lambda ** (m - 1) * square.masked_fill(~inside, 0.0).sum(1)
        weight = weight + subtb_lambda ** (m - 1) * inside.sum(1)
    return total, weight


def need_few_windows(case: Case) -> None:
    windows, most = case["N"] * case["L"] ** 2, MOST_WINDOWS[case.device]
    if windows > most:
        raise NotAvailable(f"N L^2 = {windows} windows, more than {most}, take seconds")


def loop(case: Case, inputs: Inputs) -> Step:
    need_few_windows(case)
    return step(case, inputs, partial(reduced, rows=window_loop))


def torchgfn(case: Case, inputs: Inputs) -> Step:
    """geometric_within on the given tensors: its own loss, with the policies' outputs put in their place.

    Its (L, N) layout and -inf marks are made within the step, a few passes over N L against L of them.
    """
    if case.mode != BY_ROW:
        raise NotAvailable("averages per trajectory, see that mode")
    need_few_windows(case)
    from gfn.gflownet import SquaredLoss, SubTBGFlowNet

    class Trajectories(SimpleNamespace):
        def __len__(self) -> int:
            return self.batch_size

    class Given(SubTBGFlowNet):
        def __init__(self, subtb_lambda: float) -> None:
            torch.nn.Module.__init__(self)
            self.lamda, self.weighting, self.loss_fn = subtb_lambda, "geometric_within", SquaredLoss()
            self.debug, self.log_reward_clip_min, self.forward_looking = False, -float("inf"), False

        def get_pfs_and_pbs(self, trajectories, **options):
            return trajectories.log_pf, torch.zeros_like(trajectories.log_pf)

        def calculate_log_state_flows(self, env, trajectories, log_pf):
            return trajectories.log_flow

    objective, lengths = Given(case["subtb_lambda"]), inputs.lengths
    time = torch.arange(case["L"], device=lengths.device)[:, None]

    def loss(case: Case, given: Inputs) -> Tensor:
        trajectories = Trajectories(
            batch_size=case["N"],
            max_length=case["L"],
            terminating_idx=lengths,
            actions=SimpleNamespace(is_exit=time == lengths - 1),
            log_pf=given.log_pf.T.masked_fill(time >= lengths, 0.0),
            log_flow=given.log_flow[:, :-1].T.masked_fill(time >= lengths, -torch.inf),
            log_rewards=given.log_flow.gather(1, lengths[:, None])[:, 0],
        )
        return objective.loss(SimpleNamespace(), trajectories, reduction="sum")

    return step(case, inputs, loss)


def closed_form(
    log_pf: Tensor, log_flow: Tensor, lengths: Tensor, subtb_lambda: float
) -> tuple[Tensor, Tensor]:
    """lambda = 1 only: squared differences of n + 1 values sum to (n + 1) times the squared deviations."""
    potential = torch.nn.functional.pad(log_pf.cumsum(1), (1, 0)) - log_flow
    size = (lengths + 1).double()
    seen = torch.arange(potential.shape[1], device=lengths.device) <= lengths[:, None]
    mean = potential.masked_fill(~seen, 0.0).sum(1) / size
    square = (potential - mean[:, None]).square().masked_fill(~seen, 0.0).sum(1)
    return size * square, size * (size - 1) / 2


def truth(case: Case, inputs: Inputs) -> Outputs:
    """In float64: all pairs, or the variance form where they would not fit."""
    wide = Inputs(inputs.log_pf.double(), inputs.log_flow.double(), inputs.lengths)
    rows = closed_form if case["subtb_lambda"] == 1 else reference.subtb_padded
    return step(case, wide, partial(reduced, rows=rows)).run()


def error(case: Case, inputs: Inputs, have: Outputs, truth: Outputs) -> float:
    return worst_error(have, truth)


def work(case: Case) -> tuple[float, float]:
    """Of the linear form: some 20 operations a transition each way; inputs read twice, gradients written."""
    cells = case["N"] * (2 * case["L"] + 1)
    return 20.0 * cells, 3 * 4.0 * cells


def of(loss: Loss) -> Callable[[Case, Inputs], Step]:
    return partial(step, loss=loss)


BENCH = Bench(
    name="subtb",
    cases=cases,
    make_inputs=make_inputs,
    providers={
        "fastgfn": Provider(of(fastgfn)),
        "fastgfn_op": Provider(of(fastgfn_op)),
        "all_pairs": Provider(all_pairs),
        "all_pairs_compiled": Provider(compiled),
        "window_loop": Provider(loop),
        "torchgfn": Provider(torchgfn, "torchgfn"),
    },
    truth=truth,
    error=error,
    tolerance={"float32": (1e-6, 1e-4)},
    work=work,
)


def test_subtb(case, measure):
    measure(BENCH, case)
