"""The residual losses, elementwise: values with their slopes. Equations: `reference/residual.py`."""

from torch import Tensor

from fastgfn import checks

LOSSES = ("squared", "half_squared", "huber", "shifted_cosh", "linex", "clamped")
# Beyond it the exponential losses continue along their tangent: no overflow.
TANGENT = 80.0
CLAMPED_LIMIT = 100.0


def residual_loss(residual: Tensor, loss: str = "squared", limit: float | None = None) -> Tensor:
    """phi(residual), elementwise; differentiable.

    limit: of "clamped", in nats; None is 100.
    """
    checks.check(
        loss in LOSSES, "residual_loss", "loss", "one of " + ", ".join(LOSSES), repr(loss), "pick one"
    )
    return value_and_slope(residual, loss, limit)[0]


def value_and_slope(residual: Tensor, loss: str, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """phi and phi', each of residual's shape; autograd of the first is the second."""
    if loss == "squared":
        return residual * residual, 2 * residual
    if loss == "half_squared":
        return 0.5 * residual * residual, residual
    if loss == "huber":
        slope = residual.clamp(-1, 1)
        return slope * (residual - 0.5 * slope), slope
    if loss == "clamped":
        limit = CLAMPED_LIMIT if limit is None else limit
        inside = residual.clamp(-limit, limit)
        return inside * inside, 2 * inside * (residual.abs() <= limit)
    inside = residual.clamp(-TANGENT, TANGENT)
    outside = residual - inside
    if loss == "shifted_cosh":
        slope = 2 * inside.sinh()
        return 4 * (0.5 * inside).sinh() ** 2 + outside * slope, slope
    slope = inside.expm1()
    return slope - inside + outside * slope, slope
