"""What stops a run: a loss, reward or gradient that is nan or inf, with the trajectories behind it.

`Trainer.step` raises `checks.NonFiniteError` and stays as it was before (`undone`); `Trainer.fit` writes FILE
besides.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.checkpoint import write_json
from fastgfn.functional.tree import node_sequences
from fastgfn.models import Policy
from fastgfn.ops.scan import tree_cumsum
from fastgfn.passes import Pass, trajectory_log_q
from fastgfn.scoring import score
from fastgfn.types import Role, Rollouts

FILE = "failed_step.json"
# Trajectories that are written at most.
MOST = 100
# Where all of them are finite, so many of the largest residuals are.
WORST = 8
Step = Callable[..., dict[str, float]]
FIX = "lower learning_rate (or log_z_learning_rate), set max_grad_norm or clamp the reward; "
FIX += "the weights are unchanged"


def undone(step: Step) -> Step:
    """`step` of a Trainer; if it raises, counters, buffer and log Z are as before, without gradients."""

    @functools.wraps(step)
    def tried(trainer) -> dict[str, float]:
        counters = {name: getattr(trainer, name) for name in ("trajectories", "tokens", "merges")}
        entries, log_z = trainer.buffer.snapshot(), trainer.log_z.snapshot()
        try:
            return step(trainer)
        except BaseException:
            for name, value in counters.items():
                setattr(trainer, name, value)
            trainer.buffer.restore(entries)
            trainer.log_z.restore(log_z)
            trainer.optimizer.zero_grad()
            raise

    return tried


@contextlib.contextmanager
def named(policy: Policy, rollouts: Rollouts | None = None) -> Iterator[None]:
    """Add to a NonFiniteError of the block which trajectories it is about.

    rollouts: where the trajectories come from, if log_behavior is known.
    """
    try:
        yield
    except checks.NonFiniteError as error:
        if error.tree is not None:
            _add(error, _of_reward(error, policy, rollouts))
        raise


def check_loss(result: Pass, rollouts: Rollouts, policy: Policy) -> None:
    """
    Raises:
        NonFiniteError: the loss is nan or inf.
    """
    if not bool(result.loss.isfinite()):
        _fail("the loss", float(result.loss), [(result, rollouts)], policy)


def check_norm(norm: Tensor, batches: Sequence[tuple[Pass, Rollouts]], policy: Policy) -> None:
    """
    Raises:
        NonFiniteError: the gradient norm of these micro-batches is nan or inf.
    """
    if not bool(norm.isfinite()):
        _fail("the gradient norm", float(norm), batches, policy)


def write(folder: Path, error: checks.NonFiniteError, **about) -> None:
    """FILE: the message, `about` (step, seed, settings, prompts) and the trajectories, nan and inf as the
    json of Python writes them. The message then says where they are."""
    write_json(folder / FILE, {"error": str(error)} | about | {"trajectories": error.trajectories})
    error.args = (f"{error}; see {folder / FILE}",)


def _fail(what: str, value: float, batches: Sequence[tuple[Pass, Rollouts]], policy: Policy) -> None:
    error = checks.NonFiniteError(checks.message("Trainer.step", what, "finite", value, FIX))
    found, finite = [], []
    for result, rollouts in batches:
        log_z = result.log_z if result.known_log_z is None else result.known_log_z
        residual = (result.log_ratio.cpu() - log_z.cpu()[rollouts.group]).abs()
        records = _records(policy, rollouts, result.log_q.tolist(), result.log_reward.tolist())
        bad = (~(result.log_q - result.log_reward).isfinite()).tolist()
        found += [record for record, is_bad in zip(records, bad, strict=True) if is_bad]
        finite += zip(residual.nan_to_num(0.0).tolist(), records, strict=True)
    worst = sorted(finite, key=lambda pair: -pair[0])[:WORST]
    _add(error, found or [record for _, record in worst])
    raise error


def _add(error: checks.NonFiniteError, records: list[dict]) -> None:
    error.trajectories = records[:MOST]
    if records:
        first = records[0]
        text = "" if first["text"] is None else f" ({first['text'][:80]!r})"
        where = f"prompt {_short(first['prompt'])}, Z = {_short(first['tokens'])}{text}"
        error.args = (f"{error}; the first of {len(records)} trajectories: {where}",)


def _short(tokens: list[int]) -> str:
    return str(tokens) if len(tokens) <= 20 else f"[..., {', '.join(map(str, tokens[-20:]))}]"


def _records(
    policy: Policy, rollouts: Rollouts, log_q: Sequence[float], log_reward: Sequence[float]
) -> list[dict]:
    prompts = [p.tolist() for p in rollouts.prompts]
    rows = zip(
        rollouts.group.tolist(),
        rollouts.sequences(),
        log_q,
        log_reward,
        rollouts.log_behavior.tolist(),
        strict=True,
    )
    return [_record(policy, prompts[g], *row) for g, *row in rows]


def _record(
    policy: Policy, prompt: list[int], tokens: list[int], log_q: float, log_reward: float, log_behavior: float
) -> dict:
    return {
        "prompt": prompt,
        "tokens": tokens,
        "text": None if policy.tokenizer is None else policy.decode(tokens),
        "log_q": log_q,
        "log_reward": log_reward,
        "log_behavior": log_behavior,
    }


@torch.no_grad()
def _of_reward(error: checks.NonFiniteError, policy: Policy, rollouts: Rollouts | None) -> list[dict]:
    """The distinct trajectories of the tree that pass through a prefix whose log R is not finite."""
    tree, value = error.tree, error.log_reward
    bad = tree_cumsum((~value.isfinite()).double(), tree.parent)[tree.leaf] > 0
    log_q = trajectory_log_q(score(tree, policy=policy), tree)
    leaves = tree.leaf[bad]
    groups, is_prompt = tree.group[leaves].tolist(), tree.role == Role.PROMPT
    prompts = {g: tree.tokens[is_prompt & (tree.group == g)].tolist() for g in set(groups)}
    behavior = {}
    if rollouts is not None:
        keys = zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True)
        behavior = dict(zip(keys, rollouts.log_behavior.tolist(), strict=True))
    found = {}
    rows = zip(groups, node_sequences(tree, leaves), log_q[bad].tolist(), value[leaves].tolist(), strict=True)
    for g, z, q, r in rows:
        key = (g, tuple(z))
        found.setdefault(key, _record(policy, prompts[g], z, q, r, behavior.get(key, float("nan"))))
    return list(found.values())
