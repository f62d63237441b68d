"""Plain truth of the residual losses: what is paid for a balance residual r.

    squared        r^2
    half_squared   r^2 / 2
    huber          r^2 / 2 up to |r| = 1, |r| - 1/2 beyond
    shifted_cosh   e^r + e^-r - 2
    linex          e^r - r - 1
    clamped        clamp(r, -limit, limit)^2: a residual beyond the limit has a cost and no gradient

All are 0, with slope 0, at r = 0 and positive elsewhere, so that they share the fixed points of the square.
The exponential ones continue along their tangent beyond |r| = 80, where they would overflow float32.
Source: Hu et al. 2025 (arXiv:2410.02596) for shifted_cosh and linex.
"""

from torch import Tensor, where

TANGENT = 80.0


def residual_loss(residual: Tensor, loss: str, limit: float = 100.0) -> Tensor:
    """phi(residual), elementwise."""
    inside = residual.clamp(-TANGENT, TANGENT)
    outside = residual - inside
    if loss == "squared":
        return residual**2
    if loss == "half_squared":
        return residual**2 / 2
    if loss == "huber":
        return where(residual.abs() <= 1, 0.5 * residual**2, residual.abs() - 0.5)
    if loss == "shifted_cosh":
        return inside.exp() + (-inside).exp() - 2 + outside * (inside.exp() - (-inside).exp()).detach()
    if loss == "linex":
        return inside.exp() - inside - 1 + outside * (inside.exp() - 1).detach()
    if loss == "clamped":
        return where(residual.abs() <= limit, residual**2, limit**2)
    raise AssertionError(loss)
