"""Plain truth for the gate of a gated MLP (Shazeer, 2020, GLU Variants Improve Transformer, SwiGLU)."""

from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate * sigmoid(gate) * up."""
    return gate * gate.sigmoid() * up
