"""How fast training steps run here: each phase's time, tokens/s, share of the machine's limit, memory.

Limits are measured in the same process, not taken from data sheets: FLOP/s of one large product in the
model's dtype and bytes/s of one large copy. The least time of a phase is the larger of its FLOPs and its
bytes at those rates, counting what the task needs (each weight read once per pass, no gradients of frozen
weights), not what the code does; `of_limit` is that over the time it took.
"""

import statistics
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.baselines import plain_step
from fastgfn.config import TrainConfig
from fastgfn.models import Policy
from fastgfn.ops.backends import versions
from fastgfn.ops.linear import product
from fastgfn.phases import Phase, Recorder, synchronize
from fastgfn.rewards import LMReward
from fastgfn.train import Trainer
from fastgfn.types import Constraints, LogProbs, Role, TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One training step: `prompts` random prompts of `prompt_tokens` tokens, `num_samples` sequences of
    `output_tokens` tokens for each, the base model's reward, modified SubTB, one Adam step; `rounds` steps
    are timed."""

    prompts: int = 1
    num_samples: int = 20
    prompt_tokens: int = 200
    output_tokens: int = 30
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "num_samples", "prompt_tokens", "output_tokens", "rounds"):
            value = getattr(self, name)
            checks.check(value >= 1, "Workload", name, ">= 1", value, "raise it")


class Work(NamedTuple):
    """What a phase cannot do without: model tokens, FLOPs (a multiply-add is two), bytes moved."""

    tokens: int
    flop: float
    num_bytes: float


def measure(policy: Policy, workload: Workload, *, compare: str | None = None) -> dict:
    """Run the workload and report it; the policy's adapter is trained by it.

    Steps are timed without a recorder, `rounds` after one to warm up, in turns with the other library's where
    `compare` is "hf" (transformers' generate and padded forwards). Phases are of one more step each, with
    the device synchronised at every boundary, so their sum exceeds the step's time a little.

    Returns:
        What can be written as JSON: "setting", "device", "versions", "limits" (tflop_per_s, gb_per_s) and for
        every provider under "providers": "step_ms" (p50), "drawn_tokens", "tokens_per_s" (drawn tokens per
        second of a whole step), "peak_bytes", and "phases", each with ms, calls, tokens, tokens_per_s,
        of_limit and peak_bytes; a value is None where it has no meaning.

    Raises:
        InputError: prompts that do not fit the model, or an unknown `compare`.
    """
    checks.check(compare in (None, "hf"), "measure", "compare", "'hf' or None", repr(compare), "omit it")
    steps, trees = _make_steps(policy, workload, compare)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    drawn: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(workload.rounds):
        for name, step in steps.items():
            synchronize(policy.device)
            start = time.perf_counter()
            drawn[name].append(step())
            synchronize(policy.device)
            times[name].append(1e3 * (time.perf_counter() - start))
    recorders = {}
    for name, step in steps.items():
        with Recorder(policy.device) as recorders[name]:
            step()
    limits = machine_limits(policy.device, policy.head.weight.dtype)
    providers = {}
    for name, recorder in recorders.items():
        work = tree_work(policy, trees[-1]) if name == "fastgfn" else row_work(workload)
        work = joined(work, recorder.phases)
        providers[name] = {
            "step_ms": statistics.median(times[name]),
            "drawn_tokens": statistics.mean(drawn[name]),
            "tokens_per_s": 1e3 * sum(drawn[name]) / sum(times[name]),
            "peak_bytes": max(phase.peak_bytes for phase in recorder.phases.values()),
            "phases": {n: _row(p, work.get(n), limits) for n, p in recorder.phases.items()},
        }
    dtype = str(policy.head.weight.dtype).removeprefix("torch.")
    return {
        "setting": asdict(workload) | {"dtype": dtype},
        "device": _device_name(policy.device),
        "versions": versions(),
        "limits": limits,
        "providers": providers,
    }


def _make_steps(
    policy: Policy, workload: Workload, compare: str | None
) -> tuple[dict[str, Callable[[], int]], list[TokenTree]]:
    """The steps by provider, each returning the tokens that it drew, and a list of fastgfn's last tree."""
    # The last token of a vocabulary ends next to no text, so sequences reach the limit.
    constraints = Constraints(policy.vocab_size - 1, max_length=workload.output_tokens)
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.prompts, workload.prompt_tokens)
    prompts = torch.randint(policy.vocab_size - 1, shape, generator=generator).tolist()
    config = TrainConfig(
        steps=10**6,
        prompts_per_step=workload.prompts,
        num_samples=workload.num_samples,
        tempered_share=(0.0, 0.0),
        learning_rate=1e-5,
        seed=workload.seed,
    )
    trees: list[TokenTree] = []

    class Reward(LMReward):
        def from_log_probs(self, raw: LogProbs, tree: TokenTree) -> Tensor:
            trees[:] = [tree]
            return super().from_log_probs(raw, tree)

    reward = Reward(policy.reference)
    trainer = Trainer(policy, prompts=prompts, reward=reward, constraints=constraints, config=config)

    def ours() -> int:
        trainer.step()
        return int(trees[0].length[trees[0].leaf].sum())

    def theirs() -> int:
        options = dict(num_samples=workload.num_samples, optimizer=trainer.optimizer)
        plain_step(policy, prompts, constraints, **options)
        return workload.prompts * workload.num_samples * workload.output_tokens

    return {"fastgfn": ours} | ({"hf": theirs} if compare else {}), trees


def tree_work(policy: Policy, tree: TokenTree) -> dict[str, Work]:
    """The work of each phase of one step on this tree; every distinct prefix passes the model once."""
    frozen, adapter = policy.num_linear_weights, sum(p.numel() for _, p in policy.parameters())
    config, head = policy.config, policy.head.weight
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # per node and ancestor: q k and p v
    attend = 4 * config.num_hidden_layers * heads * width
    cached = 2 * config.num_hidden_layers * kv_heads * width * head.element_size()
    weights, head_bytes = frozen * head.element_size(), head.numel() * head.element_size()

    is_prompt = tree.role == Role.PROMPT
    is_fed = (tree.length > 0) & (tree.length < tree.constraints.max_length)
    nodes, num_prompt, num_fed = tree.num_nodes, int(is_prompt.sum()), int(is_fed.sum())
    rows, passes = int(tree.is_state.sum()), int(tree.length[is_fed].max()) if num_fed else 0
    pairs = [int((tree.position[m] + 1).sum()) for m in (is_prompt, is_fed, slice(None))]
    read = passes * num_prompt + int(tree.length[is_fed].sum())
    draws, forward = tree.num_groups + num_fed, 2 * frozen * nodes + attend * pairs[2]
    return {
        "prefill": Work(num_prompt, 2 * frozen * num_prompt + attend * pairs[0], weights),
        "decode": Work(num_fed, 2 * frozen * num_fed + attend * pairs[1], passes * weights + cached * read),
        "draw": Work(draws, 2 * head.numel() * draws, (passes + 1) * head_bytes),
        "score": Work(nodes, forward + 2 * adapter * nodes, weights),
        "reward": Work(nodes, forward, weights),
        # logits of policy and reward, which share a read of the weight; the gradient of the policy's rows
        "head": Work(rows, 6 * head.numel() * rows, 2 * head_bytes),
        "backward": Work(nodes, forward + attend * pairs[2] + 4 * adapter * nodes, weights),
        # Adam reads and writes weight and two moments and reads the gradient, all float32
        "optimizer": Work(0, 0.0, 28.0 * adapter),
    }


def joined(work: dict[str, Work], phases: Container[str]) -> dict[str, Work]:
    """The work of the phases that were measured: on a GPU one graph decodes and draws."""
    if "draw" in phases or "draw" not in work:
        return work
    decode, draw = work["decode"], work["draw"]
    both = Work(decode.tokens, decode.flop + draw.flop, decode.num_bytes + draw.num_bytes)
    return work | {"decode": both}


def row_work(workload: Workload) -> dict[str, Work]:
    """Tokens through the model where every sequence is a padded row; its FLOPs and bytes are left out."""
    rows = workload.prompts * workload.num_samples
    scored = rows * (workload.prompt_tokens + workload.output_tokens)
    tokens = {"decode": rows * workload.output_tokens} | dict.fromkeys(
        ("score", "reward", "backward"), scored
    )
    return {name: Work(count, 0.0, 0.0) for name, count in tokens.items()}


def _row(phase: Phase, work: Work | None, limits: dict[str, float]) -> dict:
    row = {"ms": 1e3 * phase.seconds, "calls": phase.calls, "tokens": None, "tokens_per_s": None}
    row |= {"of_limit": None, "peak_bytes": phase.peak_bytes}
    if work is not None and work.tokens:
        row |= {"tokens": work.tokens, "tokens_per_s": work.tokens / phase.seconds}
    if work is not None and (work.flop or work.num_bytes):
        least = max(work.flop / limits["tflop_per_s"] / 1e12, work.num_bytes / limits["gb_per_s"] / 1e9)
        row["of_limit"] = least / phase.seconds
    return row


@torch.no_grad()
def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """tflop_per_s of one large product in dtype, gb_per_s (read and written) of one large copy; best of 5."""
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    product_s, copy_s = best(lambda: product(a, b)), best(lambda: target.copy_(source))
    return {"tflop_per_s": 2e-12 * size**3 / product_s, "gb_per_s": 2e-9 * num_bytes / copy_s}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
