"""What samples alone say about a sampler: nothing is enumerated, so every value is an estimate.

w(x) = R(x)^(1/T) / mu(x) are the weights of the draws x ~ mu; averages over the target weigh the draws with
w / sum w, and mean nothing where the effective sample size is small.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from fastgfn.evaluate.bounds import effective_sample_size
from fastgfn.evaluate.samples import (
    Samples,
    Target,
    check_num_samples,
    check_support,
    check_temperatures,
    measure,
)
from fastgfn.models import Policy
from fastgfn.rollout import SamplingOptions
from fastgfn.types import Rollouts


class _Record:
    """to_dict, JSON-ready: lists in the place of tensors."""

    __slots__ = ()

    def to_dict(self) -> dict:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value):
    if is_dataclass(value):
        return value.to_dict()
    return value.tolist() if isinstance(value, Tensor) else value


@dataclass(frozen=True, slots=True)
class Termination(_Record):
    """Where a sampler ends; each (G,) float64. Drift shows as log_stop far below 0 and length running to
    max_length: windows that all pull the shared stop logit, under a sparse reward.

    log_stop: mean log q(stop | x) at the ends of the sequences that max_length did not end; nan without any.
    cut_share: share of the sequences that max_length ended.
    length: mean length.
    target_length: mean length under the target, by the weights w; nan where log_behavior is unknown.

    Source: RapTB, arXiv:2603.00454 (termination drift).
    """

    log_stop: Tensor
    cut_share: Tensor
    length: Tensor
    target_length: Tensor


@dataclass(frozen=True, slots=True)
class Survival(_Record):
    """Prefix survival, (G, L + 1) float64: the probability of at least 0, 1, ..., L tokens.

    drawn: share of the draws. target: by the weights w; nan where log_behavior is unknown.
    """

    drawn: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class TemperatureSweep(_Record):
    """One set of samples held against R^(1/T) for several T; each (G, K) float64 but `temperatures` (K,).

    log_z: log of the mean weight, an importance estimate of log Z(T). ess: effective sample size of w.
    variance: Var(log R / T - log q) over the policy's own draws; 0 at the T that it samples exactly.
    """

    temperatures: Tensor
    log_z: Tensor
    ess: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True)
class Staleness(_Record):
    """How far what drew the samples is from the policy now; each (G,) float64, nan where it is unknown.

    kl: mean log mu(x) - log q(x), an estimate of KL(mu || q). ess: effective sample size of q / mu.
    drift: mean |log q| of the sampler minus that of the score, per action; nan where log_pf is unknown.
    """

    kl: Tensor
    ess: Tensor
    drift: Tensor


@dataclass(frozen=True, slots=True)
class Diagnostics(_Record):
    """The cheap diagnostics of one set of samples; tensors are (G,) float64 unless they say otherwise.

    num_samples: (G,) int64. log_z: importance estimate, log of the mean w. ess: effective sample size of w.
    variance: Var(log R / T - log q) over the draws. policy_variance: the same under the policy, the draws
        weighted with q / mu; equal to it on-policy up to the sampler's rounding.
    """

    num_samples: Tensor
    log_z: Tensor
    ess: Tensor
    variance: Tensor
    policy_variance: Tensor
    termination: Termination
    survival: Survival
    sweep: TemperatureSweep
    staleness: Staleness


def diagnose(
    policy: Policy,
    *,
    num_samples: int = 256,
    seed: int = 0,
    temperature: float | Tensor = 1.0,
    options: SamplingOptions | None = None,
    rollouts: Rollouts | None = None,
    temperatures: Sequence[float] | None = None,
    **target,
) -> Diagnostics:
    """Draw once, score once, reward once, and report all of `Diagnostics`.

    Args:
        num_samples, seed: draws per prompt and their seed.
        temperature, options: of the behaviour mu; the policy by default.
        rollouts: diagnose these instead of drawing, e.g. replayed or older ones.
        temperatures: of the sweep; the target's T halved, itself and doubled by default.
        target: the fields of `Target`: prompts, constraints, reward, ...

    Raises:
        InputError: as `sample` and `measure`; filters or prefixes among the options, which leave sequences
            without support; temperatures that are not positive.
    """
    check_num_samples("diagnose", num_samples)
    check_support("diagnose", options)
    held = Target(policy, **target)
    now = held.reward_temperature
    temperatures = (now / 2, now, 2 * now) if temperatures is None else temperatures
    check_temperatures("diagnose", "temperatures", temperatures)
    if rollouts is None:
        rollouts = held.draw(num_samples, seed=seed, temperature=temperature, options=options)
    samples = measure(held, rollouts)
    at_now = temperature_sweep(samples, [now])
    return Diagnostics(
        num_samples=torch.tensor([len(rows) for rows in samples.groups]),
        log_z=at_now.log_z[:, 0],
        ess=at_now.ess[:, 0],
        variance=log_ratio_variance(samples, reward_temperature=now),
        policy_variance=at_now.variance[:, 0],
        termination=termination(samples, reward_temperature=now),
        survival=prefix_survival(samples, reward_temperature=now),
        sweep=temperature_sweep(samples, temperatures),
        staleness=staleness(samples),
    )


def log_ratio_variance(samples: Samples, *, reward_temperature: float = 1.0) -> Tensor:
    """(G,) Var(log R(x) / T - log q(x)) over each prompt's samples, whatever drew them; divided by N.

    0 for every behaviour exactly when q is the target on what was drawn: the loss of VarGrad.
    Source: Richter et al. 2020 (VarGrad, arXiv:2010.10436).
    """
    ratio = samples.log_reward / reward_temperature - samples.log_q
    return _per_group(samples, lambda rows: ratio[rows].var(unbiased=False))


def termination(samples: Samples, *, reward_temperature: float = 1.0) -> Termination:
    """Termination drift of drawn or given sequences, see `Termination`."""
    lengths = samples.rollouts.lengths.double()
    is_cut = lengths >= samples.rollouts.constraints.max_length
    share = _target_share(samples, reward_temperature)
    return Termination(
        log_stop=_per_group(samples, lambda rows: samples.log_stop[rows[~is_cut[rows]]].mean()),
        cut_share=_per_group(samples, lambda rows: is_cut[rows].double().mean()),
        length=_per_group(samples, lambda rows: lengths[rows].mean()),
        target_length=_per_group(samples, lambda rows: (share[rows] * lengths[rows]).sum()),
    )


def prefix_survival(samples: Samples, *, reward_temperature: float = 1.0) -> Survival:
    """Share of trajectories still running at each length, see `Survival`."""
    lengths, longest = samples.rollouts.lengths, samples.rollouts.constraints.max_length
    share = _target_share(samples, reward_temperature)

    def drawn(rows: Tensor) -> Tensor:
        return survival(lengths[rows], torch.full((len(rows),), 1 / len(rows), dtype=torch.float64), longest)

    return Survival(
        drawn=_per_group(samples, drawn),
        target=_per_group(samples, lambda rows: survival(lengths[rows], share[rows], longest)),
    )


def survival(lengths: Tensor, probability: Tensor, max_length: int) -> Tensor:
    """(max_length + 1,) the probability of at least 0, 1, ... tokens: exact for an enumerated distribution.

    Args:
        lengths: (S,) tokens of each sequence.
        probability: (S,) of each sequence.
    """
    at_length = torch.zeros(max_length + 1, dtype=torch.float64)
    at_length.index_add_(0, lengths.long().cpu(), probability.double().cpu())
    return at_length.flip(0).cumsum(0).flip(0)


def temperature_sweep(samples: Samples, temperatures: Sequence[float]) -> TemperatureSweep:
    """The same samples against R^(1/T) for several reward temperatures T, see `TemperatureSweep`.

    Raises:
        InputError: no temperature, or one that is not positive.
    """
    check_temperatures("temperature_sweep", "temperatures", temperatures)
    behavior = samples.log_q - samples.log_behavior

    def at(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        tempered = samples.log_reward / temperature
        log_w = tempered - samples.log_behavior
        ratio = tempered - samples.log_q

        def variance(rows: Tensor) -> Tensor:
            share = behavior[rows].softmax(0)
            return (share * (ratio[rows] - (share * ratio[rows]).sum()) ** 2).sum()

        return (
            _per_group(samples, lambda rows: log_w[rows].logsumexp(0) - math.log(len(rows))),
            _per_group(samples, lambda rows: effective_sample_size(log_w[rows])),
            _per_group(samples, variance),
        )

    found = (torch.stack(x, dim=1) for x in zip(*(at(t) for t in temperatures), strict=True))
    return TemperatureSweep(torch.tensor(list(temperatures), dtype=torch.float64), *found)


def staleness(samples: Samples) -> Staleness:
    """How far the behaviour is from the policy that scored its samples, see `Staleness`."""
    behind = samples.log_behavior - samples.log_q
    rollouts = samples.rollouts
    counted = rollouts.action_mask()
    drift = torch.full_like(samples.log_pf, torch.nan)
    if rollouts.log_pf is not None:
        drift = (rollouts.log_pf.double() - samples.log_pf).abs()
    return Staleness(
        kl=_per_group(samples, lambda rows: behind[rows].mean()),
        ess=_per_group(samples, lambda rows: effective_sample_size(-behind[rows])),
        drift=_per_group(samples, lambda rows: drift[rows][counted[rows]].mean()),
    )


def _target_share(samples: Samples, reward_temperature: float) -> Tensor:
    """(N,) w / sum w within each prompt."""
    check_temperatures("diagnostics", "reward_temperature", [reward_temperature])
    log_w = samples.log_reward / reward_temperature - samples.log_behavior
    share = torch.zeros_like(log_w)
    for rows in samples.groups:
        share[rows] = log_w[rows].softmax(0)
    return share


def _per_group(samples: Samples, function: Callable[[Tensor], Tensor]) -> Tensor:
    """(G, ...) a function of each prompt's trajectories."""
    return torch.stack([function(rows).double() for rows in samples.groups])
