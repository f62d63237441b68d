"""The head: hidden states, a frozen weight, targets and stop -> both log-probs and lse, and dH.

Mode "fwd" has no gradient; "fwd+dH" adds the gradient of the hidden states for a random upstream gradient of
every log-prob; "policy+reward" is "fwd+dH" of N rows and "fwd" of N more, for which rivals are called twice.
A rival with one target per row gets the *fair composition*, one call and two gather-dots:
lse = nll + h.W_target, log p_stop = h.W_stop - lse, its gradient by autograd.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from suite import (
    DTYPES,
    Bench,
    Case,
    NotAvailable,
    Outputs,
    Provider,
    Step,
    make_cases,
    need_cuda,
    worst_error,
)
from torch import Tensor

from fastgfn.functional import linear_log_probs, log_probs_from_logits, policy_reward_log_probs
from fastgfn.reference import linear_log_probs as reference

# Mode -> products of N rows with the weight.
MODES = {"fwd": 1, "fwd+dH": 2, "policy+reward": 3}
# The ops are row by row, so a sample of rows checks the call that is timed.
CHECKED_ROWS = 64
STOP = 3
SHAPES = {
    "short": [dict(N=64, D=64, V=1000)],
    "cpu": [dict(N=640, D=576, V=49152), dict(N=2048, D=2048, V=32000)],
    # SmolLM2-135M, gpt2-xl, Llama-3.2-1B, Qwen3-1.7B, Llama-3.1-8B.
    "cuda": [
        dict(N=640, D=576, V=49152),
        dict(N=4096, D=576, V=49152),
        dict(N=4096, D=1600, V=50257),
        dict(N=640, D=2048, V=128256),
        dict(N=4096, D=2048, V=128256),
        dict(N=4096, D=2048, V=151936),
        dict(N=4096, D=4096, V=128256),
    ],
}
# Shapes of "policy+reward".
BOTH = [dict(N=64, D=64, V=1000), dict(N=640, D=576, V=49152), dict(N=4096, D=2048, V=128256)]
# What torch.compile may tune its own products on: that takes minutes a shape.
TUNED = dict(N=4096, D=2048, V=128256)


class Inputs(NamedTuple):
    hidden: Tensor  # (N, D)
    reward_hidden: Tensor  # (N, D), other rows
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    upstream: tuple[Tensor, Tensor]  # 2 of (N,) float32: of log p(target) and of log p(stop)


# hidden (N, D), weight (V, D), targets (N,) -> log p(target), log p(stop), lse, each (N,).
Head = Callable[[Tensor, Tensor, Tensor], Outputs]
# hidden, reward_hidden, weight, targets -> the outputs of the policy's rows and of the reward's.
Both = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Outputs, Outputs]]
# hidden, weight, targets -> -log p(target) (N,).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, shapes: str) -> list[Case]:
    dtypes = list(DTYPES) if device == "cpu" or shapes == "short" else ["bfloat16"]
    found = make_cases("head", device, MODES, dtypes, SHAPES[device if shapes == "full" else "short"])
    return [c for c in found if c.mode != "policy+reward" or dict(c.sizes) in BOTH]


def make_inputs(case: Case) -> Inputs:
    """Logits of standard deviation 3, as of a trained model; the target's is raised by 0 to 20 nats.

    log p of the targets then runs from -20 to nearly 0, and no provider can drop all of the softmax.
    """
    num_rows, width, vocab = case["N"], case["D"], case["V"]
    generator = torch.Generator(case.device).manual_seed(num_rows + width)
    options = dict(generator=generator, device=case.device)
    hidden = torch.randn(num_rows, width, **options)
    weight = torch.randn(vocab, width, **options).mul_(3 * width**-0.5)
    targets = torch.randint(vocab, (num_rows,), **options)
    own = weight[targets]
    boost = 20 * torch.rand(num_rows, 1, **options)
    hidden += boost * own / own.square().sum(1, keepdim=True)
    upstream = tuple(torch.randn(num_rows, **options) for _ in range(2))
    dtype = DTYPES[case.dtype]
    return Inputs(hidden.to(dtype), hidden.flip(1).to(dtype), weight.to(dtype), targets, upstream)


def step(case: Case, inputs: Inputs, head: Head, both: Both | None = None) -> Step:
    hidden, reward_hidden, weight, targets, upstream = inputs
    both = two_calls(head) if both is None else both
    if case.mode == "fwd":

        @torch.no_grad()
        def run() -> Outputs:
            return head(hidden, weight, targets)

    else:
        hidden = hidden.detach().requires_grad_()

        def run() -> Outputs:
            reward = ()
            if case.mode == "fwd+dH":
                log_pf, log_pterm, lse = head(hidden, weight, targets)
            else:
                (log_pf, log_pterm, lse), reward = both(hidden, reward_hidden, weight, targets)
            grads = [g.to(x.dtype) for g, x in zip(upstream, (log_pf, log_pterm), strict=True)]
            grad = torch.autograd.grad((log_pf, log_pterm), hidden, grads)[0]
            return log_pf.detach(), log_pterm.detach(), lse.detach(), grad, *reward

    return Step(run)


def two_calls(head: Head) -> Both:
    def both(hidden: Tensor, reward_hidden: Tensor, weight: Tensor, targets: Tensor):
        policy = head(hidden, weight, targets)
        with torch.no_grad():
            return policy, head(reward_hidden, weight, targets)

    return both


def fastgfn_both(hidden: Tensor, reward_hidden: Tensor, weight: Tensor, targets: Tensor):
    streams = policy_reward_log_probs(
        hidden, reward_hidden, weight, targets, termination_token_id=STOP, return_lse=True
    )
    return tuple((out.log_pf, out.log_pterm, out.lse) for out in streams)


def fastgfn(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    out = linear_log_probs(hidden, weight, targets, termination_token_id=STOP, return_lse=True)
    return out.log_pf, out.log_pterm, out.lse


def fastgfn_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    out = log_probs_from_logits(hidden @ weight.T, targets, termination_token_id=STOP, return_lse=True)
    return out.log_pf, out.log_pterm, out.lse


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    return from_logits((hidden @ weight.T).float(), targets)


def eager_low(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    return from_logits(hidden @ weight.T, targets)


def from_logits(logits: Tensor, targets: Tensor) -> Outputs:
    log_p = logits.log_softmax(-1)
    log_pterm = log_p[:, STOP]
    return log_p.gather(1, targets[:, None])[:, 0], log_pterm, logits[:, STOP] - log_pterm


def fair(loss: Loss) -> Head:
    """Both log-probs and lse from one call of a loss with one target per row."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        nll = loss(hidden, weight, targets).float()
        rows = hidden.float()
        lse = nll + (rows * weight[targets].float()).sum(1)
        return -nll, rows @ weight[STOP].float() - lse, lse

    return head


def eager_low_step(case: Case, inputs: Inputs) -> Step:
    if case.dtype == "float32":
        raise NotAvailable("the same as eager in float32")
    return step(case, inputs, eager_low)


def compiled(case: Case, inputs: Inputs) -> Step:
    return step(case, inputs, torch.compile(eager, dynamic=False, fullgraph=True))


def compiled_tuned(case: Case, inputs: Inputs) -> Step:
    need_cuda(case)
    if dict(case.sizes) != TUNED:
        raise NotAvailable(f"tuned at {TUNED} only, for time")
    mode = "max-autotune-no-cudagraphs"
    return step(case, inputs, torch.compile(eager, dynamic=False, fullgraph=True, mode=mode))


def torch_fused(case: Case, inputs: Inputs, **chunking: object) -> Step:
    """Without options it keeps the logits; its automatic chunks of N D / V rows wait for the weight."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotAvailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(**chunking) if chunking else None
    loss = partial(F.linear_cross_entropy, reduction="none", options=options)
    return step(case, inputs, fair(loss))


def cut_cross_entropy(case: Case, inputs: Inputs, impl: str, **options: object) -> Step:
    """Its default drops gradient tiles of small probabilities; filter_eps=None does not."""
    if impl != "torch_compile":
        need_cuda(case)
    from cut_cross_entropy import linear_cross_entropy

    return step(case, inputs, fair(partial(linear_cross_entropy, reduction="none", impl=impl, **options)))


def liger(case: Case, inputs: Inputs, chunk_mem: int | None) -> Step:
    """`chunk_mem` multiplies its rows per chunk, about N D / V, where the products wait for the weight."""
    need_cuda(case)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    # Positional: autograd functions take no keywords.
    options = {n: p.default for n, p in inspect.signature(Function.forward).parameters.items()}
    options |= {"reduction": "none"}
    if chunk_mem is not None:
        if "chunk_mem_const" not in options:
            raise NotAvailable("this version has no chunk_mem_const")
        options["chunk_mem_const"] = chunk_mem
    # After ctx, input, weight and target.
    rest = list(options.values())[4:]

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return Function.apply(hidden, weight, targets, *rest)[0]

    return step(case, inputs, fair(loss))


def quack(case: Case, inputs: Inputs) -> Step:
    """Its form with a gradient per row; the chunked form takes one upstream gradient for all rows."""
    need_cuda(case)
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy_func(
            hidden, weight, None, targets, reduction="none", inplace_backward=True
        )

    return step(case, inputs, fair(loss))


def quack_chunked(case: Case, inputs: Inputs) -> Step:
    raise NotAvailable("takes one upstream gradient for all rows (reduction mean or sum)")


def gemm(case: Case, inputs: Inputs) -> Step:
    """The bare products of the task: logits, and with their gradient where there is one."""
    hidden, reward_hidden, weight = inputs[:3]
    logits = hidden.new_zeros(len(hidden), len(weight))
    grad = torch.empty_like(hidden)

    @torch.no_grad()
    def run() -> Outputs:
        if case.mode == "policy+reward":
            torch.mm(reward_hidden, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        if case.mode != "fwd":
            torch.mm(logits, weight, out=grad)
        return ()

    return Step(run)


def of(head: Head, both: Both | None = None) -> Callable[[Case, Inputs], Step]:
    return partial(step, head=head, both=both)


@lru_cache(maxsize=4)
def checked_rows(num_rows: int) -> Tensor:
    return torch.linspace(0, num_rows - 1, min(num_rows, CHECKED_ROWS)).long()


def truth(case: Case, inputs: Inputs) -> Outputs:
    rows = checked_rows(case["N"]).to(case.device)
    hidden = inputs.hidden[rows].double().requires_grad_()
    weight, targets = inputs.weight.double(), inputs.targets[rows]
    log_pf, log_pterm, lse = reference.linear_log_probs(hidden, weight, targets, termination_token_id=STOP)
    upstream = [g[rows].double() for g in inputs.upstream]
    grad = torch.autograd.grad((log_pf, log_pterm), hidden, upstream)
    out = tuple(x.detach() for x in (log_pf, log_pterm, lse))
    if case.mode == "policy+reward":
        reward = inputs.reward_hidden[rows].double()
        grad += reference.linear_log_probs(reward, weight, targets, termination_token_id=STOP)
    return out if case.mode == "fwd" else out + grad


def error(case: Case, inputs: Inputs, have: Outputs, truth: Outputs) -> float:
    rows = checked_rows(case["N"]).to(case.device)
    return worst_error(tuple(x[rows] for x in have), truth)


def work(case: Case) -> tuple[float, float]:
    """One product to three; the inputs read once, the outputs written once."""
    n, d, v = case["N"], case["D"], case["V"]
    num_products = MODES[case.mode]
    num_bytes = DTYPES[case.dtype].itemsize * (v * d + n * d * num_products) + 20.0 * n
    return 2.0 * n * d * v * num_products, num_bytes


BENCH = Bench(
    name="head",
    cases=cases,
    make_inputs=make_inputs,
    providers={
        "fastgfn": Provider(of(fastgfn, fastgfn_both)),
        "fastgfn_logits": Provider(of(fastgfn_logits), has_logits=True),
        "eager": Provider(of(eager)),
        "eager_low": Provider(eager_low_step),
        "compile": Provider(compiled),
        "compile_tuned": Provider(compiled_tuned),
        "torch_lce": Provider(torch_fused),
        "torch_lce_auto": Provider(partial(torch_fused, chunking_method="auto")),
        "torch_lce_chunked": Provider(partial(torch_fused, chunking_method=None, batch_chunk_size=1024)),
        "cce": Provider(partial(cut_cross_entropy, impl="cce"), "cut-cross-entropy"),
        "cce_exact": Provider(partial(cut_cross_entropy, impl="cce", filter_eps=None), "cut-cross-entropy"),
        "cce_compile": Provider(partial(cut_cross_entropy, impl="torch_compile"), "cut-cross-entropy"),
        "liger": Provider(partial(liger, chunk_mem=None), "liger-kernel"),
        "liger_tuned": Provider(partial(liger, chunk_mem=16), "liger-kernel"),
        "quack": Provider(quack, "quack-kernels"),
        "quack_chunked": Provider(quack_chunked, "quack-kernels"),
        "gemm": Provider(gemm, is_checked=False),
    },
    truth=truth,
    error=error,
    tolerance={"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)},
    work=work,
    norm=lambda case: "gemm",
)


def test_head(case, measure):
    measure(BENCH, case)
