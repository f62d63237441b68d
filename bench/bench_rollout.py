"""Sampling on the CPU: fastgfn against transformers' generate, in one process, in turns.

Prompts of real text, n samples of each, up to 40 tokens, ended by a full stop; the same LoRA policy, dtype
and limits, and the same results: tokens, log q(token) and log q(stop) at every step. generate gets its best
batch size, found first, on one batch of each size; a LogitsProcessor takes its log-probs, a step at a time.
It runs the adapter beside the weights, as peft does; `generate_merged` merges it for each call, as fastgfn
does. All draw their own sequences, whose lengths are in the rows, so what counts is tokens per second.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
from bench_step import DTYPES, TEXT
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fastgfn.models import Policy, load_policy
from fastgfn.packing import pack
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints, Rollouts

# At 512 torch expands the head's weight to 27 GiB, fails, and switches oneDNN off for the whole process.
BATCH_SIZES = (16, 32, 64, 128, 256)
# Largest difference of log q from a teacher-forced pass, in nats, by dtype: 16 bits round logits.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


class Recorder(LogitsProcessor):
    """Keeps log q of the tokens and of stopping of every step, from the scores that generate draws from."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.log_pf: list[Tensor] = []
        self.log_pterm: list[Tensor] = []
        self._before: Tensor | None = None

    def _read(self, ids: Tensor) -> None:
        if self._before is not None:
            self.log_pf.append(self._before.gather(1, ids[:, -1:])[:, 0])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._read(input_ids)
        self._before = scores.float().log_softmax(-1)
        self.log_pterm.append(self._before[:, self.stop].clone())
        return scores

    def finish(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L) both."""
        self._read(ids)
        return torch.stack(self.log_pf, 1), torch.stack(self.log_pterm, 1)


class Generated(NamedTuple):
    """One batch of generate: tokens (N, L), log q of them and of stopping, up to the stop, and lengths."""

    tokens: Tensor
    log_pf: Tensor
    log_pterm: Tensor
    lengths: list[int]


@torch.no_grad()
def generate_batch(model, prompts: list[list[int]], limits: Constraints, **options) -> Generated:
    """By transformers and peft alone; `options` are those of generate."""
    width, stop = max(map(len, prompts)), limits.termination_token_id
    recorder = Recorder(stop)
    out = model.generate(
        input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device),
        attention_mask=torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
        ),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limits.max_length,
        eos_token_id=stop,
        pad_token_id=stop,
        logits_processor=LogitsProcessorList([recorder]),
        **options,
    )
    log_pf, log_pterm = recorder.finish(out)
    tokens = out[:, width:]
    is_stop = tokens == stop
    lengths = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1])
    return Generated(tokens, log_pf, log_pterm, lengths.tolist())


def generate(
    policy: Policy,
    prompts: list[list[int]],
    limits: Constraints,
    num_samples: int,
    batch_size: int,
    merge: bool = False,
) -> tuple[int, list[int]]:
    """Tokens drawn, stops included, and the length of every sequence."""
    rows = [p for p in prompts for _ in range(num_samples)]
    lengths: list[int] = []
    with policy.plain() as model:
        if merge:
            model.merge_adapter()
        for first in range(0, len(rows), batch_size):
            lengths += generate_batch(model, rows[first : first + batch_size], limits).lengths
        if merge:
            model.unmerge_adapter()
    return num_drawn(lengths, limits), lengths


def num_drawn(lengths: list[int], limits: Constraints) -> int:
    return sum(min(n + 1, limits.max_length) for n in lengths)


def ours(
    policy: Policy, prompts: list[list[int]], limits: Constraints, num_samples: int, seed: int
) -> tuple[int, list[int]]:
    rollouts = sample(prompts, policy=policy, constraints=limits, num_samples=num_samples, seed=seed)
    lengths = rollouts.lengths.tolist()
    return num_drawn(lengths, limits), lengths


def timed(function: Callable[[], tuple[int, list[int]]]) -> tuple[float, int, list[int]]:
    if not torch.backends.mkldnn.enabled:
        raise SystemExit(
            "bench_rollout: oneDNN is off, which slows every provider; a product ran out of memory"
        )
    started = time.perf_counter()
    tokens, lengths = function()
    return (time.perf_counter() - started) * 1e3, tokens, lengths


def load(args: argparse.Namespace) -> Policy:
    policy = load_policy(lora_rank=args.rank, dtype=DTYPES[args.dtype])
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.parameters():
        if "lora_B" in name:
            # A new adapter's B is zero.
            p.data.normal_(std=0.01, generator=generator)
    return policy


def make_prompts(policy: Policy, count: int, longest: int) -> list[list[int]]:
    """Pieces of the text, of 20 tokens to `longest`, each beginning at another token."""
    ids = policy.encode(TEXT)
    sizes = torch.linspace(min(20, longest), longest, count).round().long().tolist()
    return [ids[i : i + size] for i, size in enumerate(sizes)]


def best_batch_size(policy: Policy, prompts: list[list[int]], limits: Constraints, num_samples: int) -> int:
    """Of one batch each, that with the most tokens per second."""
    speeds = {}
    flat = [p for p in prompts for _ in range(num_samples)]
    generate(policy, flat[:16], limits, 1, 16)
    for size in (s for s in BATCH_SIZES if s <= len(flat)):
        spread = flat[:: max(1, len(flat) // size)][:size]
        ms, tokens, _ = timed(lambda part=spread: generate(policy, part, limits, 1, len(part)))
        speeds[size] = tokens / ms * 1e3
        print(f"generate, batch {size}: {speeds[size]:.0f} tokens/s", flush=True)
    return max(speeds, key=speeds.get)


def row(args, provider, prompts, num_samples, batch_size, results) -> dict:
    times, tokens, lengths = zip(*results, strict=True)
    every = torch.tensor([n for part in lengths for n in part], dtype=torch.float64)
    speed = statistics.median(t / ms * 1e3 for ms, t, _ in results)
    quantiles = torch.quantile(every, torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    return {
        "model": "smollm2-135m", "dtype": args.dtype, "rank": args.rank, "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)), "n": num_samples, "max_length": args.max_length,
        "provider": provider, "batch_size": batch_size, "rounds": len(times),
        **harness.percentiles(times), "drawn_tokens": round(sum(tokens) / len(tokens), 1),
        "tokens_per_s": round(speed, 1),
        "length_mean": round(float(every.mean()), 2), "length_p10": quantiles[0], "length_p50": quantiles[1],
        "length_p90": quantiles[2],
    }  # fmt: skip


def compare(args: argparse.Namespace, policy: Policy, limits: Constraints) -> list[dict]:
    prompts = make_prompts(policy, args.prompts, args.prompt_tokens)
    size = args.batch_size or best_batch_size(policy, prompts, limits, args.n)
    providers = {
        "fastgfn": lambda i: ours(policy, prompts, limits, args.n, seed=i),
        "generate": lambda i: generate(policy, prompts, limits, args.n, size),
        "generate_merged": lambda i: generate(policy, prompts, limits, args.n, size, merge=True),
    }
    results: dict[str, list] = {name: [] for name in providers}
    ours(policy, prompts[:2], limits, 2, seed=99)
    generate(policy, prompts[:2], limits, 2, 4, merge=True)
    for i in range(args.rounds):
        for name, run in providers.items():
            results[name].append(timed(lambda run=run, i=i: run(i)))
            print(f"{name}: {results[name][-1][1] / results[name][-1][0] * 1e3:.0f} tokens/s", flush=True)
    return [row(args, n, prompts, args.n, "" if n == "fastgfn" else size, r) for n, r in results.items()]


def sweep(args: argparse.Namespace, policy: Policy, limits: Constraints) -> list[dict]:
    """fastgfn at 32 to 2048 trajectories of the same prompts, in turns."""
    prompts = make_prompts(policy, args.prompts, args.prompt_tokens)
    counts = [n // len(prompts) for n in (32, 128, 512, 2048)]
    results: dict[int, list] = {n: [] for n in counts}
    for i in range(args.rounds):
        for n in counts:
            results[n].append(timed(lambda n=n, i=i: ours(policy, prompts, limits, n, seed=100 + i)))
    return [row(args, "fastgfn", prompts, n, "", found) for n, found in results.items()]


def check(args: argparse.Namespace, policy: Policy, limits: Constraints) -> None:
    """Nothing is timed unless log q of both, of tokens and of stopping, agrees with a teacher-forced pass."""
    prompts = make_prompts(policy, 2, 24)
    mine = sample(prompts, policy=policy, constraints=limits, num_samples=4, seed=3)
    with policy.plain() as model:
        theirs = generate_batch(model, [p for p in prompts for _ in range(4)], limits)
    lengths = torch.tensor(theirs.lengths)
    given = Rollouts(mine.prompts, mine.group, theirs.tokens, lengths, torch.zeros(8), limits)
    for name, rollouts, log_pf, log_pterm in (
        ("fastgfn", mine, mine.log_pf, mine.log_pterm),
        ("generate", given, theirs.log_pf, theirs.log_pterm),
    ):
        gaps = differences(policy, rollouts, log_pf, log_pterm)
        mean, most = float(gaps.mean()), float(gaps.max())
        print(
            f"log q of {name} against a teacher-forced pass: mean {mean:.2g}, largest {most:.2g}", flush=True
        )
        if not most <= TOLERANCE[args.dtype]:
            raise SystemExit(f"bench_rollout: log q of {name} is off by {most:.3g}")


@torch.no_grad()
def differences(policy: Policy, rollouts: Rollouts, log_pf: Tensor, log_pterm: Tensor) -> Tensor:
    """|log q sampled - log q scored| of every token, and of stopping before each and at the end."""
    tree = pack(rollouts)
    scored = score(tree, policy=policy)
    gaps = []
    for n, length in enumerate(rollouts.lengths.tolist()):
        node = int(tree.leaf[n])
        for k in range(length, -1, -1):
            if k < rollouts.constraints.max_length:
                gaps.append(log_pterm[n, k] - scored.log_pterm[node])
            if k:
                gaps.append(log_pf[n, k - 1] - scored.log_pf[node])
            node = int(tree.parent[node])
    return torch.stack(gaps).abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("-n", type=int, default=32, help="samples per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=60, help="of the longest prompt")
    parser.add_argument("--max-length", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="of generate; default: the best")
    parser.add_argument("--sweep", action="store_true", help="fastgfn alone at 32 to 2048 trajectories")
    parser.add_argument("--dry", action="store_true", help="print, do not append rows")
    args = parser.parse_args()
    policy = load(args)
    limits = Constraints(policy.encode("A sentence.")[-1], max_length=args.max_length)
    check(args, policy, limits)
    rows = sweep(args, policy, limits) if args.sweep else compare(args, policy, limits)
    for r in rows:
        print(r)
    if not args.dry:
        print(harness.append_rows("rollout", rows))


if __name__ == "__main__":
    main()
