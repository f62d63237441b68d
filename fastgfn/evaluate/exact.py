"""Exact evaluation on enumerable sequence sets: no sampled estimate where an exact one can be had."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack
from fastgfn.scoring import score
from fastgfn.types import Constraints, Grammar, Rollouts, as_int64


@dataclass(frozen=True, slots=True)
class Divergence:
    """Exact distances between a target over S sequences and a model over all sequences, natural log.

    Both KLs are over S + 1 cells: the sequences and one cell for everything else.
    """

    kl_target_to_model: float
    kl_model_to_target: float
    tv: float
    invalid_mass: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def sequence_log_probs(
    prompt: Sequence[int],
    sequences: Sequence[Sequence[int]],
    *,
    policy: Policy,
    constraints: Constraints,
    grammar: Grammar | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact log q of whole sequences, the stop included, and of stopping at once, in one tree forward.

    grammar: the one that q is drawn under, if any.

    Returns:
        log_q: (S,) float64, log q(Z) for each sequence.
        log_stop: () float64, log q(stop | s_0); 0 if the empty sequence may not stop.

    Raises:
        InputError: repeated sequences, or one that the constraints or the grammar rule out.
    """
    name = "sequence_log_probs"
    lengths = as_int64([len(s) for s in sequences])
    distinct = len({tuple(s) for s in sequences})
    fix = "list every sequence once"
    checks.check(
        distinct == len(sequences), name, "sequences", "distinct", f"{len(sequences) - distinct} repeats", fix
    )
    longest, fix = max(lengths.tolist(), default=0), "raise max_length or drop it"
    limit = constraints.max_length
    checks.check(longest <= limit, name, "sequences", f"at most max_length = {limit} tokens", longest, fix)
    tokens = torch.zeros(len(sequences), constraints.max_length, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = as_int64(sequence)
    group = torch.zeros(len(sequences), dtype=torch.int64)
    unknown = torch.full((len(sequences),), torch.nan)
    rollouts = Rollouts(
        (as_int64(prompt),), group, tokens, lengths, unknown, constraints, has_grammar=grammar is not None
    )
    tree = pack(rollouts, grammar=grammar, device=policy.device)
    log_probs = score(tree, policy=policy)
    log_q = tree_cumsum(log_probs.log_pf.double(), tree.parent) + log_probs.log_pterm.double()
    return log_q[tree.leaf].cpu(), log_probs.log_pterm[tree.is_root_state][0].double().cpu()


def evaluate_temperatures(
    prompt: Sequence[int],
    sequences: Sequence[Sequence[int]],
    log_reward: Tensor,  # (S,)
    temperatures: Sequence[float],
    *,
    policy: Policy,
    constraints: Constraints,
    grammar: Grammar | None = None,
) -> dict[float, dict[str, float]]:
    """Exact distances of a conditioned policy from R^(1/T) / Z_T, one tree forward for every temperature T.

    Args:
        sequences: all that the constraints (and the grammar) allow.
        log_reward: (S,) un-tempered log R of each.
        temperatures: trained ones or others in between.

    Returns:
        for each T the fields of `Divergence`, log_z = log Z_T and, where the empty sequence may stop,
        log_z_error = |log F(s_0) - log Z_T| with log F(s_0) = log R(empty) / T - log q(stop | s_0).

    Raises:
        InputError: as `sequence_log_probs` and `Policy.at_temperature`; not one log R per sequence.
    """
    fix = "pass one value per sequence"
    checks.check_shape("evaluate_temperatures", "log_reward", log_reward, (len(sequences),), fix)
    limits = dict(policy=policy, constraints=constraints, grammar=grammar)
    empty, report = [i for i, z in enumerate(sequences) if not len(z)], {}
    for temperature in temperatures:
        with policy.at_temperature(temperature):
            log_q, log_stop = sequence_log_probs(prompt, sequences, **limits)
        tempered = log_reward.double().cpu() / temperature
        log_z = tempered.logsumexp(0)
        row = divergence(log_q, tempered - log_z, 0.0).to_dict() | {"log_z": float(log_z)}
        if empty:
            row["log_z_error"] = float((tempered[empty[0]] - log_stop - log_z).abs())
        report[temperature] = row
    return report


def divergence(log_q: Tensor, log_target: Tensor, target_rest: float) -> Divergence:
    """Compare a model with a target on S sequences plus one cell for everything else.

    Args:
        log_q: (S,) float64, the model's log-probability of each sequence.
        log_target: (S,) float64, the target's.
        target_rest: the target's probability of everything else.
    """
    q, p = log_q.double().exp(), log_target.double().exp()
    rest = float((1.0 - q.sum()).clamp(min=0.0))
    cells_q = torch.cat([q, q.new_tensor([rest])])
    cells_p = torch.cat([p, p.new_tensor([target_rest])])
    return Divergence(
        kl_target_to_model=_kl(cells_p, cells_q),
        kl_model_to_target=_kl(cells_q, cells_p),
        tv=float(0.5 * (cells_q - cells_p).abs().sum()),
        invalid_mass=rest,
    )


def _kl(p: Tensor, q: Tensor) -> float:
    return float(torch.where(p > 0, p * (p.log() - q.log()), torch.zeros_like(p)).sum())
