"""The linear layers of a backbone, run by the ops of `fastgfn.ops.linear` wherever those cover them."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastgfn.ops.linear import frozen_linear, lora_linear, packed, product


class Linear:
    """Stands in for the `forward` of one linear layer, with or without a LoRA adapter.

    A layer that the ops do not cover keeps its own forward: a trainable base weight, several adapters or a
    LoRA variant, an adapter of another dtype than the base, quantised or offloaded weights, hooks on what
    the ops would skip, autocast.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.own_forward = layer.forward
        self.has_adapter = hasattr(layer, "lora_A")
        self.base = layer.get_base_layer() if self.has_adapter else layer
        self.merged_weight: Tensor | None = None
        self.merged_without_adapter = False

    def __call__(self, x: Tensor, *args, **options) -> Tensor:
        merged = self.merged_weight
        weight = self.weight if merged is None else merged
        fits = x.dtype == weight.dtype and x.device.type == weight.device.type
        if args or options or not fits or torch.is_autocast_enabled(x.device.type):
            return self.own_forward(x, *args, **options)
        if merged is not None:
            if not torch.is_grad_enabled() and self.merged_without_adapter == self.without_adapter:
                return product(x, merged, self.base.bias)
            weight = self.weight
        if not self.is_covered:
            return self.own_forward(x)
        if self.without_adapter:
            return frozen_linear(x, weight, self.base.bias)
        return lora_linear(x, weight, self.base.bias, *self.lora)

    @property
    def weight(self) -> Tensor:
        """(N, K), whichever way the layer stores it."""
        return self.base.weight.T if type(self.base) is Conv1D else self.base.weight

    @property
    def without_adapter(self) -> bool:
        return not self.has_adapter or self.layer.disable_adapters

    @property
    def lora(self) -> tuple[Tensor, Tensor, float]:
        (name,) = self.layer.active_adapters
        return self.layer.lora_A[name].weight, self.layer.lora_B[name].weight, self.layer.scaling[name]

    @property
    def is_covered(self) -> bool:
        weight, bias = self.base.weight, self.base.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        # what quantises keeps its weight in a subclass of Tensor
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return False
        return not self.has_adapter or (
            not _is_hooked(self.base) and _is_plain_lora(self.layer, weight.dtype)
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Until `unmerge`, one product with W + scale B A wherever no gradient is recorded and the adapter is
        on, or off, as it is now; the layer's own tensors stay as they are.

        Not below float32, which would round the adapter away, nor for a layer that is not covered.
        """
        weight = self.weight
        if not self.is_covered or weight.dtype not in (torch.float32, torch.float64):
            return
        self.merged_without_adapter = self.without_adapter
        if not self.without_adapter:
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
    if _is_hooked(a) or _is_hooked(b):
        return False
    dropout = getattr(layer.lora_dropout[names[0]], "p", 0.0)
    return b.bias is None and a.weight.dtype == b.weight.dtype == dtype and not dropout


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class: hooks, or a forward of its own (offloading)."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any((*hooks, module._backward_pre_hooks)) or "forward" in module.__dict__


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
