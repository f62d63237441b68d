"""The training step on a GPU: goals S1 to S6 of goals.py, which runs this file; on a CPU only as a dry run.

A micro-step is: draw n sequences of one prompt (or take given ones), score them, reward every prefix by the
base model, modified SubTB with lambda 1, backward. S1 to S3 set it against published_loop.py, each side with
a model of its own with the same random weights; the convention is the published one (`own` limits, at least
one token). log R is divided by 0.8, or the loss would be the square of rounding errors, as policy and base
are near each other. Loss and LoRA gradients of every provider are compared with the published loop's in
float32 on the same weights, at a few sequences, before anything is timed.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import harness
import published_loop
import torch
from bench_gpu_rollout import RANK, load, make_prompt
from bench_step import as_action_seq, clear, take_gradients
from contest import Contestant, Entry, Plan, Run, free_memory, make_rows, ratios, serve
from suite import NotAvailable
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgfn.models import Policy
from fastgfn.objectives import modified_subtb_loss
from fastgfn.packing import pack
from fastgfn.passes import score_and_reward
from fastgfn.reference.subtb import subtb_padded
from fastgfn.rewards import LMReward
from fastgfn.rollout import sample
from fastgfn.types import Constraints, Rollouts

# FLOP/s of the goals: what a large product in bfloat16 reaches on one H200 with random data.
PEAK_FLOPS = 790e12
REWARD_TEMPERATURE = 0.8
# Sequences that providers are compared on; largest relative error of the loss and of the gradients (norms).
CHECKED = 6
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
RANKS = {"gpt2-xl": 64, "gpt2-tiny": 4}
# Loss and gradients that providers are held to, of the last setting.
TRUTHS: dict[tuple, tuple[Tensor, Tensor]] = {}


class Sizes(NamedTuple):
    """model, prompts, samples of each, their tokens; for S3 the samples that each side tries."""

    model: str
    prompts: int
    n: int
    prompt_tokens: int
    output_tokens: int
    ours: tuple[int, ...] = ()
    theirs: tuple[int, ...] = ()


FULL = {
    "S1": Sizes("gpt2-xl", 1, 20, 50, 30),
    "S2": Sizes("gpt2-xl", 1, 20, 50, 30),
    "S3": Sizes("gpt2-xl", 1, 20, 50, 30, (20, 80, 160, 320, 640), (20, 80, 160, 320)),
    "S4": Sizes("llama-1b", 1, 20, 200, 30),
    "S5": Sizes("llama-1b", 4, 64, 200, 30),
    "S6": Sizes("gpt2-xl", 1, 20, 50, 30),
}
DRY = {
    "S1": Sizes("gpt2-tiny", 1, 4, 7, 5),
    "S2": Sizes("gpt2-tiny", 1, 4, 7, 5),
    "S3": Sizes("gpt2-tiny", 1, 4, 7, 5, (4, 6), (4, 5)),
    "S4": Sizes("tiny", 1, 4, 9, 5),
    "S5": Sizes("tiny", 2, 3, 9, 5),
    "S6": Sizes("gpt2-tiny", 1, 4, 7, 5),
}


class Task:
    """A policy, the prompts and limits of a goal, and the truth that its providers are held to."""

    def __init__(self, run: Run, sizes: Sizes, termination: str) -> None:
        self.policy, self.sizes, self.dtype = run.policy, sizes, run.dtype
        policy, self.stop = run.policy, run.policy.vocab_size - 1
        prompt = torch.tensor(make_prompt(policy, sizes.prompt_tokens))
        self.prompts = [(prompt + g) % self.stop for g in range(sizes.prompts)]
        low = 1 if termination == "own" else 0
        self.limits = published_loop.Limits(self.stop, low, sizes.output_tokens)
        self.constraints = Constraints(*self.limits, termination=termination)
        self.reward = LMReward(policy.reference)

    def given(self, n: int, *, ragged: bool) -> Rollouts:
        """Random sequences: of 1 to most tokens, or all of most tokens."""
        longest, total = self.limits.max_length, n * len(self.prompts)
        generator = torch.Generator().manual_seed(3)
        lengths = torch.linspace(1, longest, n).round().long() if ragged else torch.full((n,), longest)
        return Rollouts(
            tuple(self.prompts),
            torch.arange(len(self.prompts)).repeat_interleave(n),
            torch.randint(self.stop, (total, longest), generator=generator),
            lengths.repeat(len(self.prompts)),
            torch.zeros(total),
            self.constraints,
        )

    def draw(self, n: int, seed: int) -> Rollouts:
        options = dict(constraints=self.constraints, num_samples=n, seed=seed)
        return sample(self.prompts, policy=self.policy, **options)

    def learn(self, rollouts: Rollouts) -> Tensor:
        """The train pass of fastgfn: the loss; gradients are in the policy."""
        tree = pack(rollouts, device=self.policy.device)
        log_probs, log_reward = score_and_reward(tree, policy=self.policy, reward=self.reward)
        loss = modified_subtb_loss(log_probs, tree=tree, log_reward=log_reward / REWARD_TEMPERATURE).loss
        loss.backward()
        return loss.detach()

    def error(self, step: Callable[[Rollouts], Tensor], gradients: Callable[[], Tensor]) -> float:
        """The larger relative error of the loss and of the gradients of a step on given sequences."""
        given = self.given(min(CHECKED, self.sizes.n), ragged=self.constraints.termination == "own")
        gradients()
        loss = step(given)
        have = loss.float(), gradients().float()
        key = (*self.sizes[:5], self.constraints.termination)
        if key not in TRUTHS:
            # One model is in memory at a time, and so is one truth.
            TRUTHS.clear()
            TRUTHS[key] = self._compute_truth(given)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(have, TRUTHS[key], strict=True))

    def _compute_truth(self, given: Rollouts) -> tuple[Tensor, Tensor]:
        wide = Plain(self, torch.float32)
        loss = (wide.published if self.constraints.termination == "own" else wide.padded)(given)
        return loss.float(), wide.gradients()


class Plain:
    """The model as transformers and peft made it, a copy of the policy's, and what they do with it."""

    def __init__(self, task: Task, dtype: torch.dtype | None = None) -> None:
        self.task = task
        with task.policy.plain() as model:
            self.model = copy.deepcopy(model)
        if dtype is not None:
            self.model.to(dtype)
        clear(self)

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def gradients(self) -> Tensor:
        return gradients(self)

    def published(self, given: Rollouts | None, n: int = 0) -> Tensor:
        """A micro-step of the published loop, drawn or of given sequences; the loss."""
        task = self.task
        device, actions = self.model.device, None
        if given is not None:
            actions, n = as_action_seq(given).to(device), given.num_trajectories
        loss, self.tokens = published_loop.micro_step(
            self.model,
            task.prompts[0].to(device),
            task.limits,
            num_samples=n,
            reward_temperature=REWARD_TEMPERATURE,
            action_seq=actions,
        )
        loss.backward()
        return loss.detach()

    def padded(self, given: Rollouts) -> Tensor:
        """The train pass with a row per sequence, all of most tokens: the loss."""
        longest, device = self.task.limits.max_length, self.model.device
        prompts = torch.stack(given.prompts)[given.group]
        tokens = torch.cat([prompts, given.tokens], 1).to(device)
        log_pf, log_pterm = self._log_probs(tokens, longest)
        with torch.no_grad(), self.model.disable_adapter():
            p_token, p_stop = self._log_probs(tokens, longest)
            log_reward = torch.nn.functional.pad(p_token.cumsum(1), (1, 0)) + p_stop
        # At max_length stopping is certain.
        log_pterm = torch.cat([log_pterm[:, :-1], torch.zeros_like(log_pterm[:, :1])], 1)
        lengths = torch.full((len(tokens),), longest, device=device)
        log_flow = log_reward / REWARD_TEMPERATURE - log_pterm
        total, weight = subtb_padded(log_pf, log_flow, lengths, 1.0)
        loss = total.sum() / weight.sum()
        loss.backward()
        return loss.detach()

    def _log_probs(self, tokens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """log p of the last tokens (N, L), and of stopping before and after each (N, L + 1)."""
        logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=longest + 1).logits
        log_p = logits.float().log_softmax(-1)
        return log_p[:, :-1].gather(2, tokens[:, -longest:, None])[..., 0], log_p[..., self.task.stop]


def gradients(model) -> Tensor:
    """Of the adapter, flat, and cleared; empty where there are none."""
    if any(p.grad is None for _, p in model.parameters()):
        clear(model)
        return torch.empty(0)
    return take_gradients(model)


def ours(task: Task, n: int, given: Rollouts | None, *, is_checked: bool = True) -> Entry:
    """Samples of a micro-step a round."""

    def run(i: int) -> int:
        clear(task.policy)
        task.learn(task.draw(n, i) if given is None else given)
        return n

    error = partial(task.error, task.learn, partial(gradients, task.policy))
    return Entry(run, error if is_checked else None, TOLERANCE[task.dtype])


def theirs(task: Task, n: int, given: Rollouts | None, *, is_checked: bool = True) -> Entry:
    plain = Plain(task)

    def run(i: int) -> int:
        clear(plain)
        plain.published(given, n)
        return n

    # Its log-probs are of the model's dtype, as are their sums: in 16 bits that alone is tens of per cent.
    tolerance = TOLERANCE["fp32"] if task.dtype == "fp32" else 1.0
    error = partial(task.error, plain.published, plain.gradients)
    return Entry(run, error if is_checked else None, tolerance)


def rows(
    goal: str, case: str, task: Task, run: Run, found: dict[str, Contestant], values: dict, **known
) -> None:
    sizes, known = task.sizes, {"item": "sample", "n": task.sizes.n} | known
    run.write(
        make_rows(
            found, values, packages={"padded": "transformers"}, goal=goal, case=case, model=sizes.model,
            dtype=run.dtype, rank=RANKS.get(sizes.model, RANK), prompts=sizes.prompts,
            prompt_tokens=sizes.prompt_tokens, output_tokens=sizes.output_tokens, **known,
        )
    )  # fmt: skip


def micro_step(goal: str, sizes: Sizes, run: Run) -> bool:
    """S1 drawn, S2 given."""
    task, n = Task(run, sizes, "own"), sizes.n
    given = task.given(n, ragged=True) if goal == "S2" else None
    makers = {"fastgfn": partial(ours, task, n, given), "published": partial(theirs, task, n, given)}
    found = run.contest(makers)
    rows(goal, f"n={n}", task, run, found, ratios(found))
    return found["fastgfn"].status == "ok"


def best_batch(goal: str, sizes: Sizes, run: Run) -> bool:
    """S3: a row per side and size, then the loop's at its best, with the ratio of the two bests.

    The ratio counts where the loop had time for all of its sizes, or ran out of memory.
    """
    task = Task(run, sizes, "own")
    best: dict[str, tuple[int, Contestant]] = {}
    # Ours first: its sizes take seconds.
    for name, make, counts in (("fastgfn", ours, sizes.ours), ("published", theirs, sizes.theirs)):
        # Graphs of the last call: memory that the loop may need.
        task.policy.kept = None
        for i, n in enumerate(counts):
            free_memory()
            if i and run.seconds() <= 0:
                found = Contestant("skipped: no time left")
            else:
                found = run.contest({name: partial(make, task, n, None, is_checked=not i)}, rounds=2)[name]
            rows(goal, f"n={n}", task, run, {name: found}, {}, n=n)
            if found.is_timed and (name not in best or found.speed > best[name][1].speed):
                best[name] = (n, found)
            if found.status == "out of memory":
                break
    if len(best) == 2 and not found.status.startswith("skipped"):
        (ours_n, mine), (theirs_n, rival) = best["fastgfn"], best["published"]
        rival.note = f"fastgfn n={ours_n}, published n={theirs_n}"
        rows(
            goal, "best", task, run, {"published": rival}, {"published": mine.speed / rival.speed}, n=theirs_n
        )
    return "fastgfn" in best


def train_pass(goal: str, sizes: Sizes, run: Run) -> bool:
    """S4: the pass over the tree against padded rows, given sequences, no sampling."""
    task, n = Task(run, sizes, "forced"), sizes.n
    given = task.given(n, ragged=False)

    def padded() -> Entry:
        plain = Plain(task)

        def step(i: int) -> int:
            clear(plain)
            plain.padded(given)
            return n

        return Entry(step, partial(task.error, plain.padded, plain.gradients), TOLERANCE[task.dtype])

    makers = {"fastgfn": partial(ours, task, n, given), "padded": padded}
    found = run.contest(makers)
    rows(goal, f"n={n}", task, run, found, ratios(found))
    return found["fastgfn"].status == "ok"


def utilisation(goal: str, sizes: Sizes, run: Run) -> bool:
    """S5: 6 FLOP per weight and token: policy forward, its gradient, reward; the head where it is read."""
    task = Task(run, sizes, "forced")
    policy, given = task.policy, task.given(sizes.n, ragged=False)
    tree = pack(given)
    head = policy.head.weight.numel() * int(tree.is_state.sum())
    flop = 6.0 * (policy.num_linear_weights * tree.num_nodes + head)

    def make() -> Entry:
        def step(i: int) -> int:
            clear(policy)
            task.learn(given)
            return tree.num_nodes

        return Entry(step, partial(task.error, task.learn, partial(gradients, policy)), TOLERANCE[task.dtype])

    found = run.contest({"fastgfn": make})
    c, values = found["fastgfn"], {}
    if c.is_timed:
        values = {"fastgfn": flop / (harness.percentiles(c.ms)["ms_p50"] / 1e3) / PEAK_FLOPS}
    rows(goal, f"{tree.num_nodes} tokens", task, run, found, values, item="token")
    return c.status == "ok"


def gaps(goal: str, sizes: Sizes, run: Run) -> bool:
    """S6: 1 - time in which a kernel or a copy runs / time of a step without the profiler."""
    task = Task(run, sizes, "own")
    device, n = task.policy.device, sizes.n
    makers = {"fastgfn": partial(ours, task, n, None)}
    found = run.contest(makers)
    c, values = found["fastgfn"], {}
    if c.is_timed:
        try:
            busy_ms = profiled_ms(lambda i: task.learn(task.draw(n, i)), device)
            clear(task.policy)
            values = {"fastgfn": max(0.0, 1 - busy_ms / harness.percentiles(c.ms)["ms_p50"])}
            c.note = f"GPU busy {busy_ms:.2f} ms"
        except Exception as error:
            c.status = f"failed: {type(error).__name__}: {error}"[:120]
    rows(goal, f"{task.sizes.model}, n={n}", task, run, found, values)
    return c.status == "ok"


def profiled_ms(step: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds in which the device was busy during a step, the second that the profiler sees."""
    is_cuda = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    for i in range(2):
        with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as seen:
            step(100 + i)
            harness.synchronize()
    spans = [(e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == kind]
    if not spans:
        raise NotAvailable("the profiler saw nothing run")
    return union_length(spans) / 1e3


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def load_policy(model: str, dtype: torch.dtype, device: torch.device) -> Policy:
    return load(model, dtype, device, RANKS.get(model, RANK))


MEASURES = {
    "S1": micro_step, "S2": micro_step, "S3": best_batch, "S4": train_pass, "S5": utilisation, "S6": gaps,
}  # fmt: skip
PLAN = Plan(full=FULL, dry=DRY, measure=MEASURES, load=load_policy)


if __name__ == "__main__":
    serve(PLAN)
