"""Sampling on a GPU: goals D1 to D6 of goals.py, which runs this file; on a CPU only as a dry run.

One prompt, n samples of it, random weights, a LoRA adapter that is not zero. The stop token is as rare as any
other, so nearly all sequences reach the limit; rows carry the tokens that were drawn. D1 to D3 time whole
calls. D4 to D6 take the time of one step from the difference of two calls whose lengths are forced, so that
prefill, merging and the capture of graphs cancel, and compare it with the bytes that the step must read:
linear layers and head, the prompt's keys and values once, every sequence's own.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from bench_rollout import TOLERANCE, generate_batch
from contest import Contestant, Entry, Plan, Run, make_rows, ratios, serve
from suite import NotAvailable, one_line
from torch import Tensor

from fastgfn.models import Policy, random_policy
from fastgfn.packing import pack
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints, Rollouts

# Bytes/s of the goals: what a large copy reads and writes on one H200.
BANDWIDTH = 4.3e12
# Sequences whose log q is compared with a teacher-forced pass, and seconds that a rival's batch may take.
CHECKED, PATIENCE = 16, 60
RANK = 16
PACKAGES = dict.fromkeys(
    ("generate", "static", "static_tokens", "continuous", "continuous_async"), "transformers"
)


class Setting(NamedTuple):
    """`lengths`: of D4 to D6 the two whose difference counts, else the one."""

    model: str
    batches: tuple[int, ...]
    prompt_tokens: int
    lengths: tuple[int, ...]


FULL = {
    "D1": Setting("llama-1b", (64, 20), 64, (64,)),
    "D2": Setting("llama-1b", (64, 20), 64, (64,)),
    "D3": Setting("llama-1b", (64, 20), 64, (64,)),
    "D4": Setting("llama-1b", (64, 20), 64, (16, 80)),
    "D5": Setting("llama-8b", (64, 20), 64, (16, 144)),
    "D6": Setting("smollm2-135m", (20,), 64, (16, 144)),
}
DRY = {goal: Setting("tiny", (3,), 6, (8,) if goal in ("D1", "D2", "D3") else (7, 9)) for goal in FULL}


def load(model: str, dtype: torch.dtype, device: torch.device, rank: int = RANK) -> Policy:
    policy = random_policy(model, lora_rank=rank, dtype=dtype, device=str(device))
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.parameters():
        if "lora_B" in name:
            # A new adapter's B is zero.
            p.data.copy_(0.01 * torch.randn(p.shape, generator=generator))
    return policy


def plain_copy(policy: Policy, *, merge: bool = False) -> torch.nn.Module:
    """A copy of the model as transformers and peft made it; with its adapter merged, as transformers did."""
    with policy.plain() as model:
        own = copy.deepcopy(model)
    own.requires_grad_(False)
    return own.merge_and_unload() if merge else own


def make_prompt(policy: Policy, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(policy.vocab_size - 1, (length,), generator=generator).tolist()


@torch.no_grad()
def log_q_error(policy: Policy, rollouts: Rollouts, log_pf: Tensor, log_pterm: Tensor | None = None) -> float:
    """Largest |log q sampled - log q scored| of tokens, and of stopping, over the first sequences."""
    rows = slice(CHECKED)
    part = Rollouts(
        rollouts.prompts, rollouts.group[rows], rollouts.tokens[rows], rollouts.lengths[rows],
        torch.zeros(len(rollouts.lengths[rows])), rollouts.constraints,
    )  # fmt: skip
    tree = pack(part, device=policy.device)
    scored = score(tree, policy=policy)
    token, stop = scored.log_pf.tolist(), scored.log_pterm.tolist()
    parent, leaf = tree.parent.tolist(), tree.leaf.tolist()
    have_token, have_stop = log_pf.tolist(), None if log_pterm is None else log_pterm.tolist()
    gaps = []
    for n, length in enumerate(part.lengths.tolist()):
        node = leaf[n]
        for k in range(length, -1, -1):
            if have_stop is not None and part.constraints.min_length <= k < part.constraints.max_length:
                gaps.append(have_stop[n][k] - stop[node])
            if k:
                gaps.append(have_token[n][k - 1] - token[node])
            node = parent[node]
    return float(torch.tensor(gaps).abs().max())


class Ours:
    """fastgfn, a whole call a round."""

    def __init__(self, run: Run, prompt: list[int], limits: Constraints, batch: int) -> None:
        self.policy, self.dtype = run.policy, run.dtype
        self.draw = partial(sample, [prompt], policy=run.policy, constraints=limits, num_samples=batch)

    def __call__(self, i: int) -> int:
        self.last = self.draw(seed=i)
        lengths, longest = self.last.lengths, self.last.constraints.max_length
        return int((lengths + 1).clamp(max=longest).sum())

    def error(self) -> float:
        return log_q_error(self.policy, self.last, self.last.log_pf, self.last.log_pterm)

    def entry(self) -> Entry:
        return Entry(self, self.error, TOLERANCE[self.dtype])


class Theirs:
    """A rival: `draw()` returns tokens (N, L), log_pf (N, L), log_pterm (N, L) or None, and lengths."""

    def __init__(self, run: Run, prompt: list[int], limits: Constraints, draw: Callable) -> None:
        self.policy, self.dtype = run.policy, run.dtype
        self.prompt, self.limits, self.draw = prompt, limits, draw

    def __call__(self, i: int) -> int:
        self.last = self.draw()
        return sum(min(n + 1, self.limits.max_length) for n in self.last[3])

    def error(self) -> float:
        tokens, log_pf, log_pterm, lengths = self.last
        group, lengths = torch.zeros(len(lengths), dtype=torch.int64), torch.tensor(lengths)
        prompts = (torch.tensor(self.prompt),)
        rollouts = Rollouts(prompts, group, tokens.cpu(), lengths, group.float(), self.limits)
        return log_q_error(self.policy, rollouts, log_pf, log_pterm)

    def entry(self, note: str = "", *, is_checked: bool = True) -> Entry:
        return Entry(self, self.error if is_checked else None, TOLERANCE[self.dtype], note)


def generate(run: Run, prompt: list[int], limits: Constraints, batch: int) -> Entry:
    """transformers' generate and peft, as they come."""
    model = plain_copy(run.policy)
    return Theirs(run, prompt, limits, lambda: generate_batch(model, [prompt] * batch, limits)).entry()


def static(model, run: Run, prompt: list[int], limits: Constraints, batch: int, log_probs: bool) -> Entry:
    """generate over a cache of fixed shape and address, its decoding compiled into CUDA graphs."""
    from transformers import CompileConfig, StaticCache

    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + limits.max_length)
    options = dict(past_key_values=cache, compile_config=CompileConfig(mode="reduce-overhead"))
    ids = torch.tensor([prompt] * batch, device=run.policy.device)
    stop = limits.termination_token_id
    note = "compiled, reduce-overhead" if run.policy.device.type == "cuda" else "not compiled on a CPU"

    @torch.no_grad()
    def draw():
        cache.reset()
        if log_probs:
            return generate_batch(model, [prompt] * batch, limits, **options)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=limits.max_length, eos_token_id=stop, pad_token_id=stop, **options,
        )  # fmt: skip
        found = out[:, len(prompt) :] == stop
        return None, None, None, torch.where(found.any(1), found.int().argmax(1), found.shape[1]).tolist()

    return Theirs(run, prompt, limits, draw).entry(note, is_checked=log_probs)


def continuous(
    block: contextlib.ExitStack,
    model,
    run: Run,
    prompt: list[int],
    limits: Constraints,
    batch: int,
    is_async: bool,
) -> Entry:
    """transformers' continuous batching, its manager warm for all rounds; log q of tokens, not of stopping.

    The cache is sized for the request: by default it takes the GPU, and padding to it would cost time.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    if is_async and run.policy.device.type != "cuda":
        raise NotAvailable("needs CUDA")
    stop, size = limits.termination_token_id, 32
    blocks = -(-(len(prompt) + limits.max_length) // size) + 1
    sampling = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=limits.max_length,
        eos_token_id=stop, pad_token_id=stop, num_return_sequences=batch,
    )  # fmt: skip
    config = ContinuousBatchingConfig(
        return_logprobs=True, use_cuda_graph=True, use_async_batching=is_async, block_size=size,
        num_blocks=batch * blocks + 8, max_batch_tokens=max(2 * batch, len(prompt), 64),
        max_requests_per_batch=batch, q_padding_interval_size=batch, kv_padding_interval_size=1024,
    )  # fmt: skip
    manager = block.enter_context(
        model.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=config, timeout=5
        )
    )

    def draw():
        manager.add_requests([prompt], max_new_tokens=limits.max_length)
        results, end = [], time.monotonic() + PATIENCE
        while len(results) < batch:
            result = manager.get_result(timeout=0.5)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                results.append(result)
            elif result is None and (time.monotonic() > end or not manager.is_running()):
                raise RuntimeError(f"{len(results)} of {batch} sequences came back")
        return collect(results, limits)

    # A config of transformers is not asked for what it resolved: the model says how it attends.
    return Theirs(run, prompt, limits, draw).entry(model.config._attn_implementation)


def collect(results: list, limits: Constraints) -> tuple[Tensor, Tensor, None, list[int]]:
    """What continuous batching returned, as `Theirs` wants it."""
    stop, longest = limits.termination_token_id, limits.max_length
    tokens = torch.full((len(results), longest), stop)
    log_pf, lengths = torch.zeros(len(results), longest), []
    for row, result in enumerate(results):
        drawn = result.generated_tokens[:longest]
        lengths.append(drawn.index(stop) if stop in drawn else len(drawn))
        tokens[row, : len(drawn)] = torch.tensor(drawn)
        log_pf[row, : len(drawn)] = torch.tensor(result.logprobs[: len(drawn)])
    return tokens, log_pf, None, lengths


def rivals_of(goal: str, run: Run, *request) -> dict[str, Callable[[contextlib.ExitStack], Entry]]:
    """make(block) by rival; a model that they share is made when the first of them needs it."""
    if goal == "D1":
        return {"generate": lambda block: generate(run, *request)}
    made: list[torch.nn.Module] = []

    def model() -> torch.nn.Module:
        if not made:
            made.append(plain_copy(run.policy, merge=True))
        return made[0]

    if goal == "D2":
        torch.compiler.reset()
        return {
            "static": lambda block: static(model(), run, *request, log_probs=True),
            "static_tokens": lambda block: static(model(), run, *request, log_probs=False),
        }

    # A manager switches the attention of its model, which therefore is its own.
    def batching(is_async: bool, block: contextlib.ExitStack) -> Entry:
        own = plain_copy(run.policy, merge=True)
        return continuous(block, own, run, *request, is_async=is_async)

    return {"continuous": partial(batching, False), "continuous_async": partial(batching, True)}


@contextlib.contextmanager
def closing() -> Iterator[contextlib.ExitStack]:
    """A stack whose closing, e.g. of a manager whose thread died, may fail: the rows are there by then."""
    block = contextlib.ExitStack()
    try:
        yield block
    finally:
        try:
            block.close()
        except Exception as error:
            print(f"  closing: {one_line(error)}", flush=True)


def compare(goal: str, setting: Setting, run: Run) -> bool:
    """D1 to D3: tokens/s of whole calls."""
    prompt, ok = make_prompt(run.policy, setting.prompt_tokens), True
    limits = Constraints(run.policy.vocab_size - 1, max_length=setting.lengths[0])
    for i, batch in enumerate(setting.batches):
        if i and run.seconds() <= 0:
            print(f"{goal} n={batch}: skipped, no time left", flush=True)
            continue
        request = (prompt, limits, batch)
        # One rival at a time: what hangs takes no other with it.
        for name, make in rivals_of(goal, run, *request).items():
            with closing() as block:
                entry = Ours(run, *request).entry
                found = run.contest({"fastgfn": entry, name: partial(make, block)})
                rows = make_rows(
                    found, ratios(found), goal=goal, case=f"n={batch}", item="token", packages=PACKAGES,
                    model=setting.model, dtype=run.dtype, rank=RANK, prompts=1, n=batch,
                    prompt_tokens=setting.prompt_tokens, output_tokens=limits.max_length,
                )  # fmt: skip
                run.write(rows)
            ok &= found["fastgfn"].status == "ok"
    return ok


def step_bytes(policy: Policy, prompt_tokens: int, batch: int, own: float) -> float:
    """What a step must read where every sequence has `own` tokens: weights, keys and values."""
    head = policy.head.weight
    weights = (policy.num_linear_weights + head.numel()) * head.element_size()
    return weights + policy.node_bytes * (prompt_tokens + batch * own)


def roofline(goal: str, setting: Setting, run: Run) -> bool:
    """D4 to D6: the time of a step against the bytes that it must read."""
    prompt, ok = make_prompt(run.policy, setting.prompt_tokens), True
    for i, batch in enumerate(setting.batches):
        if i and run.seconds() <= 0:
            print(f"{goal} n={batch}: skipped, no time left", flush=True)
            continue
        found: dict[int, Contestant] = {}
        # One length after the other: a policy keeps the graphs of one.
        for length in setting.lengths:
            limits = Constraints(run.policy.vocab_size - 1, min_length=length, max_length=length)
            entry = Ours(run, prompt, limits, batch).entry
            found[length] = run.contest({"fastgfn": entry}, rounds=2 * run.rounds)["fastgfn"]
        short, long = (found[length] for length in setting.lengths)
        values, known = {}, {}
        if short.is_timed and long.is_timed:
            a, b = setting.lengths
            step_ms = (statistics.median(long.ms) - statistics.median(short.ms)) / (b - a)
            num_bytes = step_bytes(run.policy, setting.prompt_tokens, batch, (a + b) / 2)
            known = {"step_ms": float(f"{step_ms:.4g}"), "step_bytes": int(num_bytes)}
            if step_ms > 0:
                values = {"fastgfn": 1e3 * num_bytes / step_ms / BANDWIDTH}
            else:
                long.note = "the longer calls took no longer"
        elif long.status == "ok":
            long.status = short.status
        rows = make_rows(
            {"fastgfn": long}, values, goal=goal, case=f"n={batch}", item="token", packages={},
            model=setting.model, dtype=run.dtype, rank=RANK, prompts=1, n=batch,
            prompt_tokens=setting.prompt_tokens, output_tokens=setting.lengths[-1], **known,
        )  # fmt: skip
        run.write(rows)
        ok &= long.status == "ok"
    return ok


PLAN = Plan(
    full=FULL,
    dry=DRY,
    measure={g: compare for g in ("D1", "D2", "D3")} | {g: roofline for g in ("D4", "D5", "D6")},
    load=load,
)


if __name__ == "__main__":
    serve(PLAN)
