"""`sample_next`: draw the next token of every row, with the log-probs that a GFlowNet needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.sample_next import gumbel_draw

NAME = "sample_next"


@dataclass(frozen=True, slots=True)
class Draw:
    """K drawn tokens, each field (K,): token int64; the log-probs have the dtype of the logits (nats)."""

    token: Tensor
    log_pf: Tensor
    log_pterm: Tensor
    log_behavior: Tensor


@torch.no_grad()
def sample_next(
    logits: Tensor,  # (R, V) float32 | float64
    *,
    temperature: float | Tensor = 1.0,  # scalar or (K,)
    logit_bias: Tensor | None = None,  # (V,)
    termination_token_id: int | None = None,
    forbid_termination: Tensor | None = None,  # (K,) bool
    force_termination: Tensor | None = None,  # (K,) bool
    seed: int,
    trajectory: Tensor | None = None,  # (K,) int64
    position: Tensor | None = None,  # (K,) int64
    rows: Tensor | None = None,  # (K,) int64
) -> Draw:
    """Draw K tokens from softmax((logits + logit_bias) / temperature), exactly.

    Equal to argmax_v (logits[rows] + logit_bias)[v] / temperature + Gumbel noise, where the noise depends on
    (seed, trajectory, position, v) alone: the batch that a draw is computed in does not matter.

    Args:
        temperature: divides the logits of the draw, not those of log_pf and log_pterm; > 0, no unit.
        logit_bias: added to the logits first, e.g. a vocabulary mask; part of the policy.
        termination_token_id: the token that stops; None: no token does, and log_pterm is -inf.
        forbid_termination: draws that cannot stop; the other tokens are renormalised, log_pterm is -inf.
        force_termination: draws that must stop (wins over forbid_termination); all three log-probs are 0.
        seed: key of the noise, an int64.
        trajectory: number of the trajectory that the draw extends, default 0..K-1.
        position: step of the trajectory, in [0, 2^32), default 0.
        rows: the row of logits that each draw reads, default 0..R-1 (then K == R).

    Returns:
        A Draw: token, log_pf = log q(token) and log_pterm = log q(stop) at temperature 1, log_behavior =
        log-prob of the token under the distribution that drew it. Not differentiable.

    Raises:
        InputError: a shape, temperature or id, forbid or force without termination_token_id.
        ValueError: a row or position out of range, logits with nan or inf, no token left to draw.
        InputTypeError: a dtype.

    Numerics: exp in the dtype of the logits, sums and logs in float64; extra memory V float32 values per
        distinct (row, temperature); the same bits whatever the batch, row order or threads. CPU.
    Source: Gumbel-max trick; noise of Salmon et al. 2011 (Philox4x32-10).
    """
    num_draws = _check(logits, rows, logit_bias, termination_token_id, forbid_termination, force_termination)
    rows = torch.arange(num_draws) if rows is None else rows
    trajectory = torch.arange(num_draws) if trajectory is None else trajectory
    position = torch.zeros(num_draws, dtype=torch.int64) if position is None else position
    temperature = _per_draw(num_draws, temperature, trajectory, position)
    forbid = torch.zeros(num_draws, dtype=torch.bool) if forbid_termination is None else forbid_termination
    stop = -1 if termination_token_id is None else termination_token_id
    biased = logits if logit_bias is None else logits + logit_bias.to(logits.dtype)
    if force_termination is not None:
        forbid = forbid & ~force_termination
    draw = _checked_draw(biased, rows, temperature, trajectory, position, seed, stop, forbid)
    if force_termination is None:
        return Draw(*draw)
    token, *log_probs = draw
    return Draw(
        token.masked_fill(force_termination, stop),
        *(x.masked_fill(force_termination, 0.0) for x in log_probs),
    )


def _checked_draw(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        return gumbel_draw(*arguments)
    except ValueError as error:
        raise checks.InputError(str(error)) from None


def _per_draw(num_draws: int, temperature: float | Tensor, trajectory: Tensor, position: Tensor) -> Tensor:
    """The temperature of each draw, after the shapes of the three are checked."""
    temperature = torch.as_tensor(temperature, dtype=torch.float32)
    if temperature.dim() == 0:
        temperature = temperature.expand(num_draws)
    for name, value in (("temperature", temperature), ("trajectory", trajectory), ("position", position)):
        checks.check_shape(NAME, name, value, (num_draws,), "give one value per draw")
    bad = temperature[~((temperature > 0) & temperature.isfinite())]
    checks.check(
        not len(bad),
        NAME,
        "temperature",
        "finite and > 0",
        bad[:1].tolist(),
        "use argmax for greedy decoding",
    )
    return temperature


def _check(logits, rows, logit_bias, termination_token_id, forbid, force) -> int:
    checks.check_shape(NAME, "logits", logits, ("R", "V"), "flatten the leading dimensions")
    if logits.dtype not in (torch.float32, torch.float64):
        want = "float32 or float64"
        checks.fail(NAME, "logits", want, logits.dtype, "call .float()", kind=checks.InputTypeError)
    checks.check(logits.device.type == "cpu", NAME, "logits", "on cpu", logits.device, "call .cpu()")
    num_rows, vocab = logits.shape
    if rows is not None:
        checks.check_shape(NAME, "rows", rows, ("K",), "give one row number per draw")
    num_draws = num_rows if rows is None else rows.shape[0]
    if logit_bias is not None:
        checks.check_shape(NAME, "logit_bias", logit_bias, (vocab,), "give one value per token")
    checks.check(
        termination_token_id is None or 0 <= termination_token_id < vocab,
        NAME,
        "termination_token_id",
        f"in [0, {vocab})",
        termination_token_id,
        "pass an id of the vocabulary",
    )
    for name, mask in (("forbid_termination", forbid), ("force_termination", force)):
        if mask is None:
            continue
        checks.check_shape(NAME, name, mask, (num_draws,), "give one value per draw")
        if mask.dtype != torch.bool:
            checks.fail(NAME, name, "bool", mask.dtype, "cast it", kind=checks.InputTypeError)
        checks.check(
            termination_token_id is not None,
            NAME,
            "termination_token_id",
            f"given with {name}",
            None,
            "pass the id of the token that stops",
        )
    return num_draws
