"""One training micro-step on the CPU: fastgfn, the published loop, and the original where a copy is given.

n samples of one prompt, SmolLM2-135M with LoRA, published conventions (`own` limits, 1 to max-length tokens,
reward of every prefix, modified SubTB with lambda 1, all windows pooled). Two variants:
    sample  every provider draws its own sequences; `drawn_tokens` says how many
    replay  every provider is given the same sequences of ragged lengths, so the work is the same
Nothing is timed if a provider's loss or LoRA gradients on given sequences are wrong.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import harness
import published_loop
import torch
from torch import Tensor

from fastgfn.models import Policy, load_policy
from fastgfn.objectives import modified_subtb_loss
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, log_reward
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.types import Constraints, Rollouts, TokenTree

# Herman Melville, Moby-Dick (1851).
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, "
    "and nothing particular to interest me on shore, I thought I would sail about a little and see the "
    "watery part of the world. It is a way I have of driving off the spleen and regulating the circulation. "
    "Whenever I find myself growing grim about the mouth, I account it high time to get to sea."
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROVIDERS = ("fastgfn", "published-style", "published")
EXACT = 1e-6
TOLERANCE = 1e-4
WORST = 1e-2
CHECKED = 6


class Setting(NamedTuple):
    prompt: Tensor  # (P,) int64
    limits: published_loop.Limits
    num_samples: int

    @property
    def constraints(self) -> Constraints:
        return Constraints(*self.limits, termination="own")


class Clock:
    """Adds the time since the last mark to a phase."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.ms[phase] = (now - self.last) * 1e3
        self.last = now


def fast_step(
    policy: Policy, setting: Setting, *, given: Rollouts | None = None, seed: int = 0
) -> tuple[Tensor, TokenTree, Clock]:
    """The road of the library; `given` rollouts are replayed instead of sampling."""
    clock = Clock()
    rollouts = given
    if rollouts is None:
        rollouts = sample(
            [setting.prompt],
            policy=policy,
            constraints=setting.constraints,
            num_samples=setting.num_samples,
            seed=seed,
        )
    clock.mark("sample")
    tree = pack(rollouts)
    clock.mark("pack")
    log_probs = score(tree, policy=policy)
    clock.mark("score")
    reward = log_reward(tree, reward=LMReward(policy.reference))
    clock.mark("reward")
    loss = modified_subtb_loss(log_probs, tree=tree, log_reward=reward).loss
    clock.mark("loss")
    loss.backward()
    clock.mark("backward")
    return loss.detach(), tree, clock


def slow_step(
    utils: ModuleType | None, policy: Policy, setting: Setting, action_seq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The published loop, or the original's functions if `utils` is given: (loss, tokens (N, S))."""
    settings = dict(num_samples=setting.num_samples, action_seq=action_seq)
    if utils is None:
        loss, tokens = published_loop.micro_step(policy.model, setting.prompt, setting.limits, **settings)
    else:
        loss, tokens = published_loop.original_micro_step(
            utils, policy.model, setting.prompt, setting.limits, **settings
        )
    loss.backward()
    return loss.detach(), tokens


def load(args: argparse.Namespace, dtype: torch.dtype, *, published: bool) -> Policy:
    # The adapter is drawn in the base's dtype, so float64 is reached by widening the float32 model.
    policy = load_policy(lora_rank=args.rank, dtype=torch.float32 if dtype == torch.float64 else dtype)
    if published:
        published_loop.restore_plain(policy.model)
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.parameters():
        if "lora_B" in name:
            # A new adapter's B is zero, and with it every gradient of A.
            p.data.normal_(std=0.01, generator=generator)
    if dtype == torch.float64:
        policy.model.double()
    return policy


def make_setting(args: argparse.Namespace, policy: Policy) -> Setting:
    ids = policy.encode(TEXT)
    if len(ids) < args.prompt_tokens:
        raise SystemExit(
            f"bench_step: --prompt-tokens must be at most {len(ids)}, got {args.prompt_tokens}; lower it"
        )
    limits = published_loop.Limits(policy.encode("A sentence.")[-1], 1, args.max_length)
    return Setting(torch.tensor(ids[: args.prompt_tokens]), limits, args.n)


def ragged_sequences(policy: Policy, setting: Setting) -> Rollouts:
    """Text of the policy without a stop, cut to lengths spread evenly from 1 to max_length."""
    limits, longest = setting.limits, setting.limits.max_length
    text = sample(
        [setting.prompt],
        policy=policy,
        constraints=Constraints(limits.termination_token_id, longest, longest),
        num_samples=setting.num_samples,
        seed=7,
    )
    lengths = torch.linspace(1, longest, setting.num_samples).round().long()
    return Rollouts(
        text.prompts,
        text.group,
        text.tokens,
        lengths,
        torch.zeros_like(text.log_behavior),
        setting.constraints,
    )


def some_rows(rollouts: Rollouts, setting: Setting, rows: Tensor) -> Rollouts:
    return Rollouts(
        rollouts.prompts,
        rollouts.group[rows],
        rollouts.tokens[rows],
        rollouts.lengths[rows],
        rollouts.log_behavior[rows],
        setting.constraints,
    )


def as_action_seq(rollouts: Rollouts) -> Tensor:
    """(N, L + 1) int64, every row ended and padded with the termination token."""
    stop = rollouts.constraints.termination_token_id
    past = torch.arange(rollouts.tokens.shape[1]) >= rollouts.lengths[:, None]
    ended = torch.full_like(rollouts.tokens[:, :1], stop)
    return torch.cat([rollouts.tokens.masked_fill(past, stop), ended], 1)


def take_gradients(policy: Policy) -> Tensor:
    parameters = [p for _, p in policy.parameters()]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def check(args: argparse.Namespace, utils: ModuleType | None) -> None:
    """Loss and LoRA gradients of every provider on given sequences, or SystemExit.

    In float64 fastgfn equals the published loop to EXACT. In float32 every provider may be at most twice as
    far from that as the published loop is, plus TOLERANCE: the rounding of the model itself is of that size.
    Nothing may be off by more than WORST, so that a wrong truth does not widen the bound.
    """
    found = {}
    sequences = None
    for dtype in (torch.float32, torch.float64):
        fast, slow = (load(args, dtype, published=p) for p in (False, True))
        whole = make_setting(args, fast)
        if sequences is None:
            sequences = ragged_sequences(fast, whole)
        rows = torch.linspace(0, args.n - 1, min(CHECKED, args.n)).long()
        for min_length in (0, 1):
            setting = Setting(whole.prompt, whole.limits._replace(min_length=min_length), len(rows))
            given = some_rows(sequences, setting, rows)
            loss, _, _ = fast_step(fast, setting, given=given)
            found[min_length, "fastgfn", dtype] = loss, take_gradients(fast)
            for name in ("published-style",) if utils is None else PROVIDERS[1:]:
                module = utils if name == "published" else None
                loss, _ = slow_step(module, slow, setting, as_action_seq(given))
                found[min_length, name, dtype] = loss, take_gradients(slow)
    for (min_length, name, dtype), have in found.items():
        truth = found[min_length, "published-style", torch.float64]
        errors = [relative_error(a, b) for a, b in zip(have, truth, strict=True)]
        naive = found[min_length, "published-style", torch.float32]
        bounds = [EXACT, EXACT]
        if dtype == torch.float32:
            rounding = [relative_error(a, b) for a, b in zip(naive, truth, strict=True)]
            bounds = [min(2 * r + TOLERANCE, WORST) for r in rounding]
        print(
            f"check: min length {min_length}, {name}, {dtype}: loss {float(have[0]):.6g} "
            f"off by {errors[0]:.1e}, LoRA gradients by {errors[1]:.1e}"
        )
        if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
            raise SystemExit(
                f"bench_step: {name} must be off by at most {bounds}, got {errors}; it is not timed"
            )


def make_steps(
    setting: Setting,
    fast: Policy,
    slow: Policy,
    utils: ModuleType | None,
    given: Rollouts | None,
    log: list[dict],
) -> dict[str, Callable[[], None]]:
    """One callable per provider; every call appends what it did to `log`."""
    actions = None if given is None else as_action_seq(given)
    stop = setting.limits.termination_token_id

    def ours() -> None:
        clear(fast)
        _, tree, clock = fast_step(fast, setting, given=given, seed=len(log))
        # At the leaves `length` counts the tokens; one more per row is the stop.
        drawn = int(tree.length[tree.leaf].sum()) + setting.num_samples
        log.append(dict(provider="fastgfn", drawn=drawn, nodes=tree.num_nodes, phases=clock.ms))

    def theirs(name: str, module: ModuleType | None) -> Callable[[], None]:
        def step() -> None:
            clear(slow)
            _, tokens = slow_step(module, slow, setting, actions)
            drawn = int((tokens != stop).sum()) + setting.num_samples
            nodes = setting.num_samples * (len(setting.prompt) + tokens.shape[1] - 1)
            log.append(dict(provider=name, drawn=drawn, nodes=nodes, phases={}))

        return step

    steps = {"fastgfn": ours, "published-style": theirs("published-style", None)}
    return steps if utils is None else steps | {"published": theirs("published", utils)}


def clear(policy: Policy) -> None:
    for _, p in policy.parameters():
        p.grad = None


def measure(args: argparse.Namespace, utils: ModuleType | None) -> list[dict]:
    dtype = DTYPES[args.dtype]
    fast, slow = (load(args, dtype, published=p) for p in (False, True))
    setting = make_setting(args, fast)
    rows = []
    for variant, given in (("sample", None), ("replay", ragged_sequences(fast, setting))):
        log: list[dict] = []
        steps = make_steps(setting, fast, slow, utils, given, log)
        times = harness.time_interleaved(steps, args.rounds)
        for provider in steps:
            done = [e for e in log if e["provider"] == provider][-args.rounds :]
            mean = {k: sum(e[k] for e in done) / len(done) for k in ("drawn", "nodes")}
            phases = {p: [e["phases"][p] for e in done] for p in done[0]["phases"]}
            for phase, values in {"step": times[provider], **phases}.items():
                rows.append(row(args, variant, provider, phase, mean, values))
    return rows


def row(args, variant: str, provider: str, phase: str, mean: dict, values: list[float]) -> dict:
    return {
        "model": "smollm2-135m",
        "dtype": args.dtype,
        "n": args.n,
        "prompt_tokens": args.prompt_tokens,
        "max_length": args.max_length,
        "rank": args.rank,
        "variant": variant,
        "provider": provider,
        "phase": phase,
        "rounds": args.rounds,
        "drawn_tokens": mean["drawn"],
        "model_tokens": mean["nodes"],
        **harness.percentiles(values),
        "baseline_bytes": "",
        "peak_bytes": "",
    }


def add_peaks(rows: list[dict], argv: list[str]) -> None:
    """Peak memory of one sampled step per provider, each in a fresh process."""
    for entry in rows:
        if entry["variant"] == "sample" and entry["phase"] == "step":
            peak = harness.peak_memory([__file__, *argv, "--peak", entry["provider"]])
            entry.update(peak._asdict())


def report_peak(args: argparse.Namespace, utils: ModuleType | None) -> None:
    policy = load(args, DTYPES[args.dtype], published=args.peak != "fastgfn")
    setting = make_setting(args, policy)
    if args.peak == "fastgfn":
        harness.report_peak(lambda: fast_step(policy, setting))
    else:
        module = utils if args.peak == "published" else None
        harness.report_peak(lambda: slow_step(module, policy, setting))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, help="the next_sentence folder of a copy of the original")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up round")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the frozen base")
    parser.add_argument("--n", type=int, default=20, help="samples of the prompt")
    parser.add_argument("--max-length", type=int, default=30, help="most tokens of a sample")
    parser.add_argument("--prompt-tokens", type=int, default=50, help="tokens of the prompt")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA adapter")
    parser.add_argument(
        "--peak", choices=PROVIDERS, help="only print the peak memory of one step of a provider"
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    utils = None if args.published is None else published_loop.load_original(args.published)
    if args.peak is not None:
        report_peak(args, utils)
        return
    check(args, utils)
    rows = measure(args, utils)
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in ("peak", "rounds") and v
    ]
    add_peaks(rows, flags)
    for r in rows:
        memory = f", peak {r['peak_bytes'] / 2**30:.2f} GiB" if r["peak_bytes"] else ""
        print(
            f"{r['variant']:>6} {r['provider']:>15} {r['phase']:>8}: {r['ms_p50']:9.1f} ms "
            f"({r['ms_p20']:.1f} to {r['ms_p80']:.1f}), {r['drawn_tokens']:.0f} drawn, "
            f"{r['model_tokens']:.0f} through the model{memory}"
        )
    print(harness.append_rows("bench_step", rows))


if __name__ == "__main__":
    main()
