"""The next token of every running trajectory, from the hidden states of their rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional.sampling import Draw, kept, sample_next, sample_next_from_hidden
from fastgfn.models import Policy, Reference
from fastgfn.ops.linear import product
from fastgfn.ops.sample_next import philox4x32
from fastgfn.phases import phase
from fastgfn.rollout.options import SamplingOptions
from fastgfn.types import Constraints

# The smallest logit_bias of a token that a uniform draw may take.
LEAST_BIAS = -30.0
# Logits that exist at a time where options need them.
LOGIT_BYTES = 256 * 2**20
# Offsets that key the coin and the token of an epsilon draw apart from the noise of the policy's draw.
COIN, UNIFORM = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


class Drawer:
    """Draws under one policy, one set of constraints and options; the noise is keyed by `seed`."""

    def __init__(
        self, policy: Policy | Reference, constraints: Constraints, options: SamplingOptions, seed: int
    ) -> None:
        self.head = policy.head
        self.constraints = constraints
        self.options = options
        self.seed = seed
        self.device = policy.head.weight.device
        bias = constraints.logit_bias
        wide = torch.promote_types(policy.head.weight.dtype, torch.float32)
        self.logit_bias = None if bias is None else bias.to(self.device, wide)
        # (V,) bool, what a uniform draw may take; None: everything.
        self.uniform = None
        if bias is not None:
            self.uniform = self.logit_bias > LEAST_BIAS

    @phase("draw")
    def __call__(
        self,
        hidden: Tensor,  # (R, D)
        rows: Tensor,  # (K,) int64
        temperature: Tensor,  # (K,) float32
        trajectory: Tensor,  # (K,) int64
        position: Tensor,  # (K,) int64, tokens of Z so far
        allowed: Tensor | None = None,  # (K, V) bool, of a grammar
    ) -> Draw:
        """A Draw on the CPU, each field (K,)."""
        check_finite(bool(hidden.isfinite().all()))
        if allowed is not None:
            _check_mask(allowed, (len(rows), self.head.weight.shape[0]))
        device = hidden.device
        per_draw = {
            "temperature": temperature.to(device),
            "forbid_termination": self._forbids(position).to(device),
            "trajectory": trajectory.to(device),
            "position": position.to(device),
        }
        rows = rows.to(device)
        if self.needs_logits or allowed is not None:
            draw = self._from_logits(hidden, rows, per_draw, allowed)
        else:
            draw = self.from_hidden(hidden, seed=self.seed, rows=rows, **per_draw)
        draw = Draw(*(x.cpu() for x in (draw.token, draw.log_pf, draw.log_pterm, draw.log_behavior)))
        # A GPU cannot refuse a row without tokens; it marks the draw.
        check_drawn(bool((draw.token >= 0).all()))
        return draw

    def from_hidden(self, hidden: Tensor, *, seed: int | Tensor, **per_draw: Tensor) -> Draw:
        """Draws of the policy as it is, on the device of `hidden`; on CUDA the host neither waits nor checks.

        per_draw: those of `sample_next_from_hidden`.
        """
        head = self.head
        return sample_next_from_hidden(
            hidden,
            head.weight,
            bias=head.bias,
            logit_bias=self.logit_bias,
            logit_scale=head.logit_scale,
            final_logit_softcap=head.softcap,
            termination_token_id=self.constraints.termination_token_id,
            seed=seed,
            **per_draw,
        )

    def log_pf(
        self, hidden: Tensor, rows: Tensor, tokens: Tensor, position: Tensor, allowed: Tensor | None
    ) -> Tensor:
        """(K,) log q of given tokens, as a Draw of them would have it; on the CPU."""
        found = []
        for part in self._parts(len(rows)):
            logits = self._logits(
                hidden[rows[part].to(hidden.device)], None if allowed is None else allowed[part]
            )
            self._forbid(logits, self._forbids(position[part]))
            found.append(logits.log_softmax(1).gather(1, tokens[part, None].to(logits.device))[:, 0])
        return torch.cat(found).cpu() if found else torch.zeros(0)

    @property
    def needs_logits(self) -> bool:
        """Whether a draw is not one of the policy at a temperature, from its hidden state alone."""
        return self.options.needs_logits or bool(self.constraints.extra_termination_token_ids)

    def _forbids(self, position: Tensor) -> Tensor:
        return position < self.constraints.min_length

    def _forbid(self, logits: Tensor, forbid: Tensor) -> None:
        for stop in self.constraints.termination_token_ids:
            logits[:, stop] = logits[:, stop].masked_fill(forbid.to(logits.device), -torch.inf)

    def _parts(self, num_draws: int) -> Sequence[Tensor]:
        size = max(1, LOGIT_BYTES // (4 * self.head.weight.shape[0]))
        return torch.arange(num_draws).split(size) if num_draws else ()

    def _from_logits(
        self, hidden: Tensor, rows: Tensor, per_draw: dict[str, Tensor], allowed: Tensor | None
    ) -> Draw:
        parts = []
        for part in self._parts(len(rows)):
            on_device = part.to(hidden.device)
            logits = self._logits(hidden[rows[on_device]], None if allowed is None else allowed[part])
            parts.append(self._draw(logits, {n: x[on_device] for n, x in per_draw.items()}))
        return Draw(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _logits(self, hidden: Tensor, allowed: Tensor | None) -> Tensor:
        """(K, V) float32 (float64), the vocabulary mask and the grammar's added."""
        head = self.head
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = product(hidden, head.weight, head.bias).to(dtype) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits

    def _draw(self, logits: Tensor, per_draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
        stops = list(self.constraints.termination_token_ids)
        self._forbid(logits, per_draw.pop("forbid_termination"))
        fix = "widen the vocabulary mask or the grammar, or lower min_length"
        is_left = bool((logits > -torch.inf).any(1).all())
        checks.check(is_left, "sample", "allowed tokens", "one at least in every state", "none", fix)
        draw = sample_next(logits, seed=self.seed, **self.options.filters, **per_draw)
        token, log_behavior = draw.token, draw.log_behavior
        if self.options.epsilon:
            token, log_behavior = self._mixed(logits, per_draw, token)
        log_q = logits.log_softmax(1)
        log_pterm = log_q[:, stops].logsumexp(1)
        is_stop = torch.isin(token, torch.tensor(stops, device=token.device))
        log_pf = torch.where(is_stop, log_pterm, log_q.gather(1, token.clamp(min=0)[:, None])[:, 0])
        if len(stops) > 1:
            # whichever stop was drawn: the density of stopping
            tempered = self._behavior(logits, per_draw)[:, stops].logsumexp(1)
            log_behavior = torch.where(is_stop, tempered, log_behavior)
        return token.masked_fill(is_stop, stops[0]), log_pf, log_pterm, log_behavior

    def _mixed(self, logits: Tensor, per_draw: dict[str, Tensor], token: Tensor) -> tuple[Tensor, Tensor]:
        """The draw, or in a share of epsilon of all cases a uniform one, and its log-density."""
        keys = {n: per_draw[n] for n in ("trajectory", "position")}
        uniform = sample_next(self._flat(logits), seed=_signed(self.seed ^ UNIFORM), **keys).token
        words = philox4x32(_counters(per_draw).cpu(), _signed(self.seed ^ COIN))[:, 0].to(logits.device)
        token = torch.where(words.double() < self.options.epsilon * 2.0**32, uniform, token)
        return token, self._behavior(logits, per_draw).gather(1, token.clamp(min=0)[:, None])[:, 0]

    def _flat(self, logits: Tensor) -> Tensor:
        can_be = logits > -torch.inf
        can_be = can_be if self.uniform is None else can_be & self.uniform
        fix = "set epsilon to 0, or widen the mask or the grammar"
        want = f"a token with a bias above {LEAST_BIAS} in every state"
        checks.check(bool(can_be.any(1).all()), "sample", "epsilon's tokens", want, "none", fix)
        return torch.where(can_be, 0.0, -torch.inf)

    def _behavior(self, logits: Tensor, per_draw: dict[str, Tensor]) -> Tensor:
        """(K, V) log-density of the draws."""
        epsilon = self.options.epsilon
        tempered = self._tempered(logits / per_draw["temperature"][:, None])
        if not epsilon:
            return tempered
        rest = math.log1p(-epsilon) if epsilon < 1 else -math.inf
        mixed = torch.logaddexp(rest + tempered, math.log(epsilon) + self._flat(logits).log_softmax(1))
        return mixed.to(logits.dtype)

    def _tempered(self, z: Tensor) -> Tensor:
        filters = self.options.filters
        if any(value is not None for value in filters.values()):
            z = z.masked_fill(~kept(z, *filters.values()), -torch.inf)
        return z.log_softmax(1)


def _check_mask(allowed: Tensor, shape: tuple[int, int]) -> None:
    is_mask = isinstance(allowed, Tensor) and allowed.dtype == torch.bool
    have = getattr(allowed, "dtype", type(allowed).__name__)
    checks.check(is_mask, "sample", "grammar mask", "a bool tensor", have, "return (K, V) bool")
    checks.check_shape("sample", "grammar mask", allowed, shape, "return a row per sequence")
    fix, want = "allow the termination token where nothing else may follow", "True somewhere in every row"
    checks.check(bool(allowed.any(1).all()), "sample", "grammar mask", want, "none", fix)


def check_finite(ok: bool) -> None:
    fix = "the weights have diverged: lower learning_rate or set max_grad_norm"
    if not ok:
        have = "nan or inf"
        checks.fail("sample", "hidden states", "finite", have, fix, kind=checks.NonFiniteError)


def check_drawn(ok: bool) -> None:
    fix = "widen the vocabulary mask"
    checks.check(ok, "sample", "logits", "a token left in every row", "none or nan", fix)


def _counters(per_draw: dict[str, Tensor]) -> Tensor:
    trajectory, position = per_draw["trajectory"], per_draw["position"]
    low, high = trajectory & 0xFFFFFFFF, (trajectory >> 32) & 0xFFFFFFFF
    return torch.stack([torch.zeros_like(position), position, low, high], dim=1)


def _signed(seed: int) -> int:
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
