"""Plain truth for a linear layer with a LoRA adapter (Hu et al., 2021, LoRA, section 4.1)."""

from torch import Tensor


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """y = x (W + scale B A)^T + bias."""
    return frozen_linear(x, weight, bias) + scale * (x @ lora_a.T) @ lora_b.T


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias."""
    out = x @ weight.T
    return out if bias is None else out + bias
