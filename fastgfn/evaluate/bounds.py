"""Estimates of log Z and bounds on it from samples, for targets that cannot be enumerated.

The sampler q proposes, R^(1/T) is the target, Z the sum of R^(1/T) over the sequences of a prompt. Every
function takes the policy and the fields of `Target`, and returns one value per prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.evaluate.annealing import Annealing
from fastgfn.evaluate.samples import Target, check_num_samples, check_support
from fastgfn.models import Policy
from fastgfn.rollout import SamplingOptions
from fastgfn.types import Rollouts


@dataclass(frozen=True, slots=True)
class Bounds:
    """What N weights w per prompt with E[w] = Z say about log Z; tensors are (G,) float64, in nats.

    log_z: log((1/N) sum w), in expectation at most log Z.
    lower: at most log Z with probability >= 1 - delta; log_z - log(1/delta) for one batch.
    upper: at least log Z with probability >= 1 - delta; None without exact draws. Both hold together with
        probability >= 1 - 2 delta.
    reverse_log_z: from the exact draws, in expectation at least log Z; or None.
    elbo: mean log w, in expectation log Z - KL of what drew the weights to its target.
    standard_error: of log_z, to first order: the standard error of the mean weight over the mean. It means
        little where ess is small: the weights that were not seen are not in it.
    ess: (sum w)^2 / sum w^2, between 1 and N; standard_error is near sqrt(1 / ess - 1 / N), 1 / sqrt(N) where
        ess is N / 2.
    acceptance: share of the Metropolis moves that were accepted; None where there were none.
    num_samples: N. delta: see above. batches: of the bounds. steps: K of the annealing path; 1 is importance
        sampling.
    """

    log_z: Tensor
    lower: Tensor
    upper: Tensor | None
    reverse_log_z: Tensor | None
    elbo: Tensor
    standard_error: Tensor
    ess: Tensor
    acceptance: Tensor | None
    num_samples: int
    delta: float
    batches: int
    steps: int

    def to_dict(self) -> dict:
        """JSON-ready: lists in the place of tensors."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values}


def log_z_importance(
    policy: Policy,
    *,
    num_samples: int = 1024,
    delta: float = 1e-3,
    batches: int = 1,
    seed: int = 0,
    temperature: float | Tensor = 1.0,
    options: SamplingOptions | None = None,
    **target,
) -> Bounds:
    """Importance sampling of log Z with the trained sampler, or a tempered or mixed one, as the proposal.

        x_i ~ mu,   log w_i = log R(x_i) / T - log mu(x_i),   log Zhat = log((1/N) sum_i w_i),

    mu being the density that drew x_i (`log_behavior`, in the sampler's precision). E[Zhat] = Z, so Markov's
    inequality P(Zhat >= Z / delta) <= delta gives, with probability >= 1 - delta,

        log Z >= log Zhat - log(1/delta).

    Of B independent batches all have Zhat_j >= Z / delta^(1/B) with probability <= delta, so likewise

        log Z >= min_j log Zhat_j - log(1/delta) / B,

    which is tighter wherever the batches agree to within log(1/delta).

    Args:
        num_samples: N, for every prompt.
        delta: probability with which a bound may fail, in (0, 1).
        batches: B, a divisor of N, chosen before the samples are seen.
        seed: of the draws.
        temperature, options: of the behaviour mu; the policy at temperature 1 by default.
        target: the fields of `Target`: prompts, constraints, reward, ...

    Raises:
        InputError: filters or prefixes among the options, which leave sequences without support; N < 1; a
            delta outside (0, 1); batches that do not divide N; a reward or weights that are not finite.

    Source: Kahn and Marshall 1953 (importance sampling); Grosse et al. 2015 (arXiv:1511.02543), section 2
        (the stochastic bounds and Markov's inequality); Gogate, Bidyuk and Dechter 2007 (arXiv:1206.5242; the
        least of several batches); Zhao et al. 2024 (arXiv:2404.17546; such bounds for language models).
    """
    name = "log_z_importance"
    _check(name, num_samples, delta, batches)
    check_support(name, options)
    held = Target(policy, **target)
    drawn = held.draw(num_samples, seed=seed, temperature=temperature, options=options)
    log_w = held.log_rewards(drawn) / held.reward_temperature - drawn.log_behavior.double()
    return _bounds(name, log_w.view(held.num_groups, num_samples), delta, batches, steps=1)


def log_z_ais(
    policy: Policy,
    *,
    num_samples: int = 256,
    schedule: int | Sequence[float] = 16,
    delta: float = 1e-3,
    batches: int = 1,
    seed: int = 0,
    **target,
) -> Bounds:
    """Annealed importance sampling of log Z from the trained sampler along q^(1 - b) R^(b/T).

        x_0 ~ q,   x_k ~ P_{b_k}(x_{k-1}, .) for k = 1..K-1,
        log w = sum_{k=1..K} (b_k - b_{k-1}) (log R(x_{k-1}) / T - log q(x_{k-1})),   0 = b_0 < ... < b_K = 1,

    over N independent chains, with P_b the suffix-regrow Metropolis move of `regrow`, which leaves
    q^(1 - b) R^(b/T) invariant: then E[w] = Z and the bound of `log_z_importance` holds as it stands. K = 1
    is importance sampling. Differs from the source in its moves.

    Args:
        num_samples: N chains, for every prompt.
        schedule: K for b_k = k / K, or b_0..b_K. It must not depend on the samples.
        delta, batches, seed, target: as in `log_z_importance`.

    Raises:
        InputError: a schedule that does not rise from 0 to 1, "own" termination, and as `log_z_importance`.

    Cost: K calls of `sample`, each for all chains at once, and as many rewards of the distinct sequences.
    Source: Neal 2001, Statistics and Computing 11 (arXiv:physics/9803008).
    """
    name = "log_z_ais"
    _check(name, num_samples, delta, batches)
    path = Annealing(Target(policy, **target), schedule, name)
    log_w, acceptance = path.forward(num_samples, seed)
    return _bounds(name, log_w, delta, batches, steps=path.steps, acceptance=acceptance)


def bounds(
    policy: Policy,
    *,
    draws: Rollouts | None = None,
    num_samples: int = 256,
    schedule: int | Sequence[float] = 16,
    delta: float = 1e-3,
    batches: int = 1,
    seed: int = 0,
    **target,
) -> Bounds:
    """`log_z_ais`, and with exact draws of the target an upper bound by the same path in reverse.

        x_{K-1} ~ R^(1/T) / Z,   x_{k-1} ~ P_{b_k}(x_k, .) for k = K-1..1,   log w as in `log_z_ais`.

    P_b satisfies detailed balance, so this is the forward process reversed and E[1/w] = 1/Z. With
    M draws, reverse_log_z = -log((1/M) sum_i 1 / w_i), and Markov's inequality for the mean of 1/w gives

        log Z <= reverse_log_z + log(1/delta)   with probability >= 1 - delta,

    or from B batches max_j reverse_log_z_j + log(1/delta) / B.

    With K = 1 this is the harmonic-type estimate 1/Z = E_p[q(x) / R(x)]; unlike the harmonic mean of a
    likelihood its weights are bounded wherever q <= const * R. Exact draws exist in the laboratory
    (`draw_exact`); draws that are only close to exact give no bound.

    Args:
        draws: as many exact draws of every prompt, for the target's prompts and constraints, or None.
        num_samples, schedule, delta, batches, seed, target: as in `log_z_ais`.

    Raises:
        InputError: draws of other prompts or constraints, or not as many of each; and as `log_z_ais`.

    Source: Grosse, Ghahramani and Adams 2015 (bidirectional Monte Carlo, arXiv:1511.02543).
    """
    name = "bounds"
    _check(name, num_samples, delta, batches)
    path = Annealing(Target(policy, **target), schedule, name)
    reverse = None
    if draws is not None:
        reverse = path.reverse(draws, seed)
        _check_batches(name, reverse.shape[1], batches)
        _check_weights(name, reverse)
    log_w, acceptance = path.forward(num_samples, seed)
    return _bounds(name, log_w, delta, batches, steps=path.steps, acceptance=acceptance, reverse=reverse)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension of log w, (..., N) -> (...), between 1 and N.

    Source: Kish 1965; Kong 1992.
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def _log_mean_exp(values: Tensor) -> Tensor:
    return values.logsumexp(-1) - math.log(values.shape[-1])


def _lower(log_w: Tensor, delta: float, batches: int) -> Tensor:
    """(G,) at most log E[w] with probability >= 1 - delta."""
    means = _log_mean_exp(log_w.view(log_w.shape[0], batches, -1))
    return means.amin(1) - math.log(1 / delta) / batches


def _bounds(
    name: str,
    log_w: Tensor,  # (G, N)
    delta: float,
    batches: int,
    *,
    steps: int,
    acceptance: Tensor | None = None,
    reverse: Tensor | None = None,  # (G, M), of which 1/w has the mean 1/Z
) -> Bounds:
    _check_weights(name, log_w)
    num, log_z = log_w.shape[1], _log_mean_exp(log_w)
    relative = (log_w - log_z[:, None]).exp()
    return Bounds(
        log_z=log_z,
        lower=_lower(log_w, delta, batches),
        upper=None if reverse is None else -_lower(-reverse, delta, batches),
        reverse_log_z=None if reverse is None else -_log_mean_exp(-reverse),
        elbo=log_w.mean(1),
        standard_error=(relative.var(1) / num).sqrt() if num > 1 else torch.full_like(log_z, torch.inf),
        ess=effective_sample_size(log_w),
        acceptance=acceptance,
        num_samples=num,
        delta=delta,
        batches=batches,
        steps=steps,
    )


def _check(name: str, num_samples: int, delta: float, batches: int) -> None:
    check_num_samples(name, num_samples)
    checks.check(0 < delta < 1, name, "delta", "in (0, 1)", delta, "use e.g. 1e-3")
    _check_batches(name, num_samples, batches)


def _check_batches(name: str, num_samples: int, batches: int) -> None:
    ok = type(batches) is int and batches >= 1 and num_samples % batches == 0
    checks.check(ok, name, "batches", f"a divisor of {num_samples} samples", batches, "use e.g. 1 or 16")


def _check_weights(name: str, log_w: Tensor) -> None:
    bad = (~log_w.isfinite().all(1)).nonzero()[:, 0].tolist()
    fix = "log Z diverges: bound log R / T, and check what drew the samples"
    checks.check(not bad, name, "log weights", "finite", f"nan or inf for prompts {bad[:10]}", fix)
