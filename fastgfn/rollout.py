"""Stage 1: prompts -> Rollouts. Decode without gradient, each prompt's keys and values computed once.

Samples that still share their whole prefix share one row of the running batch, so the model sees every
distinct prefix once; finished rows leave the batch. The noise of a draw is keyed by (seed, trajectory,
position, token), so none of this changes which tokens are drawn.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.attention import DecodeAttention, TreeAttention
from fastgfn.functional.sampling import sample_next_from_hidden
from fastgfn.models import Policy
from fastgfn.ops.attention import TreeMask
from fastgfn.ops.decode import decode_update_
from fastgfn.phases import phase
from fastgfn.types import Constraints, Rollouts, as_int64

# Merging the adapter costs one pass over the weights, which this many decode steps without it repay.
MERGE_FROM = 6


@torch.no_grad()
@phase("decode")
def sample(
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    policy: Policy,
    constraints: Constraints,
    num_samples: int,
    temperature: float | Tensor = 1.0,
    seed: int = 0,
    first_trajectory: int = 0,
) -> Rollouts:
    """Draw `num_samples` sequences for each of G prompts.

    Args:
        prompts: G token-id sequences, none empty.
        constraints: the sequence set; its vocabulary mask and limits bind every draw.
        temperature: divides the logits of the draw, one number or (G * num_samples,) float; > 0. The
            log-probs that enter a loss never see it: they come from `score`.
        seed, first_trajectory: the noise of trajectory i is keyed by (seed, first_trajectory + i).

    Returns:
        Rollouts with N = G * num_samples trajectories, ordered by prompt.

    Raises:
        InputError: an empty prompt, one longer than the model's context allows, a termination token outside
            the vocabulary, a temperature <= 0.
    """
    prompts = tuple(as_int64(p) for p in prompts)
    check_prompts(prompts, policy, constraints)
    checks.check(num_samples >= 1, "sample", "num_samples", ">= 1", num_samples, "raise it")
    total = len(prompts) * num_samples
    temperature = torch.as_tensor(temperature, dtype=torch.float32)
    one_each = temperature.dim() == 0 or temperature.shape == (total,)
    have, want = tuple(temperature.shape), f"one number or ({total},)"
    checks.check(one_each, "sample", "temperature", want, have, "give one per trajectory")
    temperature = temperature.expand(total)
    checks.check(-(2**63) <= seed < 2**63, "sample", "seed", "a 64-bit integer", seed, "choose a smaller one")
    checks.check(
        bool((temperature > 0).all()),
        "sample",
        "temperature",
        "> 0",
        float(temperature.min()),
        "use e.g. 1.0",
    )
    decoder = _Decoder(prompts, policy, constraints, num_samples, temperature, seed, first_trajectory)
    with policy.merged() if constraints.max_length >= MERGE_FROM else contextlib.nullcontext():
        return decoder.run()


class _Decoder:
    def __init__(self, prompts, policy, constraints, num_samples, temperature, seed, first_trajectory):
        self.prompts = prompts
        self.policy = policy
        self.constraints = constraints
        self.temperature = temperature
        self.seed = seed
        self.first_trajectory = first_trajectory
        self.prompt_length = as_int64([len(p) for p in prompts])
        self.group = torch.arange(len(prompts)).repeat_interleave(num_samples)
        total = len(self.group)
        self.tokens = torch.zeros(total, constraints.max_length, dtype=torch.int64)
        self.lengths = torch.zeros(total, dtype=torch.int64)
        self.finished = torch.zeros(total, dtype=torch.bool)
        self.log_behavior = torch.zeros(total, dtype=torch.float32)

    def run(self) -> Rollouts:
        hidden, attention = self._prefill()
        alive = torch.arange(len(self.group))
        row_of, row_group = self.group, torch.arange(len(self.prompts))
        for step in range(self.constraints.max_length):
            drawn = self._draw(hidden, row_of, alive, step)
            decode_update_(
                self.tokens,
                self.lengths,
                self.finished,
                drawn,
                alive,
                self.constraints.termination_token_id,
                self.constraints.max_length,
            )
            going = ~self.finished[alive]
            if not bool(going.any()):
                break
            alive = alive[going]
            vocab = self.policy.vocab_size
            key, row_of_next = torch.unique(row_of[going] * vocab + drawn[going], return_inverse=True)
            parent, token = key // vocab, key % vocab
            row_of, row_group = row_of_next, row_group[parent]
            same = step == 0 or torch.equal(parent, torch.arange(hidden.shape[0]))
            sizes = torch.bincount(row_group, minlength=len(self.prompts)).tolist()
            attention.select(None if same else parent, sizes)
            device = self.policy.device
            depth = self.prompt_length[row_group] + step
            hidden = self.policy.hidden(token.to(device), depth.to(device), attention)
        return Rollouts(
            self.prompts, self.group, self.tokens, self.lengths, self.log_behavior, self.constraints
        )

    @phase("prefill")
    def _prefill(self) -> tuple[Tensor, DecodeAttention]:
        device = self.policy.device
        stop = self.prompt_length.cumsum(0)
        start = stop - self.prompt_length
        position = torch.arange(int(stop[-1])) - start.repeat_interleave(self.prompt_length)
        end = stop.repeat_interleave(self.prompt_length).int()
        attention = TreeAttention(TreeMask(end.to(device), position.to(device)), keep_kv=True)
        hidden = self.policy.hidden(torch.cat(self.prompts).to(device), position.to(device), attention)
        spans = list(zip(start.tolist(), stop.tolist(), strict=True))
        return hidden[(stop - 1).to(device)], DecodeAttention(attention.kv, spans)

    @phase("draw")
    def _draw(self, hidden: Tensor, row_of: Tensor, alive: Tensor, step: int) -> Tensor:
        head, constraints = self.policy.head, self.constraints
        fix = "the weights have diverged: lower learning_rate or set max_grad_norm"
        checks.check(bool(hidden.isfinite().all()), "sample", "hidden states", "finite", "nan or inf", fix)
        device = hidden.device
        draw = sample_next_from_hidden(
            hidden,
            head.weight,
            bias=head.bias,
            logit_bias=None if constraints.logit_bias is None else constraints.logit_bias.to(device),
            logit_scale=head.logit_scale,
            final_logit_softcap=head.softcap,
            temperature=self.temperature[alive].to(device),
            termination_token_id=constraints.termination_token_id,
            forbid_termination=torch.full(alive.shape, step < constraints.min_length, device=device),
            seed=self.seed,
            trajectory=(self.first_trajectory + alive).to(device),
            position=torch.full(alive.shape, step, device=device),
            rows=row_of.to(device),
        )
        drawn = draw.token.cpu()
        # A GPU cannot refuse a row without tokens; it marks the draw.
        want, fix = "a token left in every row", "widen the vocabulary mask"
        checks.check(bool((drawn >= 0).all()), "sample", "logits", want, "none or nan", fix)
        self.log_behavior[alive] += draw.log_behavior.cpu()
        return drawn


def check_prompts(prompts: Sequence[Tensor], policy: Policy, constraints: Constraints) -> None:
    """Refuse prompts and constraints that do not fit the model, before any work is done."""
    checks.check(len(prompts) > 0, "sample", "prompts", "at least one prompt", 0, "pass a list of token ids")
    vocab = policy.vocab_size
    checks.check(
        constraints.termination_token_id < vocab,
        "sample",
        "termination_token_id",
        f"in [0, {vocab})",
        constraints.termination_token_id,
        "pass a token id of this model's vocabulary",
    )
    if constraints.logit_bias is not None:
        checks.check_shape("sample", "logit_bias", constraints.logit_bias, (vocab,), "one entry per token id")
    limit = policy.max_positions
    for g, prompt in enumerate(prompts):
        checks.check(
            prompt.dim() == 1 and len(prompt) > 0,
            "sample",
            f"prompts[{g}]",
            "a non-empty list",
            [],
            "add a token",
        )
        low, high = int(prompt.min()), int(prompt.max())
        checks.check(
            low >= 0 and high < vocab,
            "sample",
            f"prompts[{g}]",
            f"ids in [0, {vocab})",
            (low, high),
            "use this model's tokenizer",
        )
        longest = len(prompt) + constraints.max_length
        checks.check(
            limit is None or longest <= limit,
            "sample",
            f"prompts[{g}]",
            f"at most {limit} - max_length = {(limit or 0) - constraints.max_length} tokens",
            len(prompt),
            "shorten the prompt or lower max_length",
        )
