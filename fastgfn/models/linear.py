"""The linear layers of a backbone, run by the ops of `fastgfn.ops.linear` wherever those cover them."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastgfn.ops.linear import frozen_linear, lora_linear, packed, product


class Linear:
    """Stands in for the `forward` of one linear layer, with or without a LoRA adapter.

    A layer that the ops do not cover (a trainable base weight, several adapters or a LoRA variant, an adapter
    of another dtype than the base, quantised weights) keeps its own forward.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.own_forward = layer.forward
        self.has_adapter = hasattr(layer, "lora_A")
        self.base = layer.get_base_layer() if self.has_adapter else layer
        self.merged_weight: Tensor | None = None

    def __call__(self, x: Tensor, *args, **options) -> Tensor:
        if self.merged_weight is not None:
            return product(x, self.merged_weight, self.base.bias)
        weight = self.weight
        if args or options or not self.is_covered or x.dtype != weight.dtype:
            return self.own_forward(x, *args, **options)
        if not self.has_adapter or self.layer.disable_adapters:
            return frozen_linear(x, weight, self.base.bias)
        return lora_linear(x, weight, self.base.bias, *self.lora)

    @property
    def weight(self) -> Tensor:
        """(N, K), whichever way the layer stores it."""
        return self.base.weight.T if type(self.base) is Conv1D else self.base.weight

    @property
    def lora(self) -> tuple[Tensor, Tensor, float]:
        (name,) = self.layer.active_adapters
        return self.layer.lora_A[name].weight, self.layer.lora_B[name].weight, self.layer.scaling[name]

    @property
    def is_covered(self) -> bool:
        bias = self.base.bias
        if self.base.weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        return not self.has_adapter or _is_plain_lora(self.layer, self.base.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Until `unmerge`, one product with W + scale B A; the layer's own tensors stay as they are.

        Not below float32, which would round the adapter away, nor for a layer that is not covered.
        """
        weight = self.weight
        if not self.is_covered or weight.dtype not in (torch.float32, torch.float64):
            return
        if self.has_adapter and not self.layer.disable_adapters:
            a, b, scale = self.lora
            weight = product(b, a.T).mul_(scale).add_(weight)
        self.merged_weight = packed(weight)

    def unmerge(self) -> None:
        self.merged_weight = None


def _is_plain_lora(layer: nn.Module, dtype: torch.dtype) -> bool:
    names = layer.active_adapters
    if layer.merged or len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    dropout = getattr(layer.lora_dropout[names[0]], "p", 0.0)
    return b.bias is None and a.weight.dtype == b.weight.dtype == dtype and not dropout


def take_over(backbone: nn.Module) -> list[Linear]:
    """Put a `Linear` in the place of the forward of every linear layer of the backbone."""
    layers, inner = [], set()
    for module in backbone.modules():
        base = module.get_base_layer() if hasattr(module, "lora_A") else module
        if type(base) not in (nn.Linear, Conv1D) or id(module) in inner:
            continue
        if base is not module:
            inner.update(map(id, module.modules()))
        layers.append(Linear(module))
    for layer in layers:
        layer.layer.forward = layer
    return layers
