"""The linear layers of a backbone, run by the ops of `fastgfn.ops.linear` wherever those cover them."""

from typing import NamedTuple

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
        self.merged: Merged | None = None
        self.spare: Merged | None = None

    def __call__(self, x: Tensor, *args, **options) -> Tensor:
        if args or options or torch.is_autocast_enabled(x.device.type):
            return self.own_forward(x, *args, **options)
        merged = self.merged
        if merged is not None and self._takes(merged, x):
            return product(x.to(merged.dtype), merged.weight, merged.bias).to(x.dtype)
        weight = self.weight
        fits = x.dtype == weight.dtype and x.device.type == weight.device.type
        if not fits or not self.is_covered:
            return self.own_forward(x)
        if self.without_adapter:
            return frozen_linear(x, weight, self.base.bias)
        return lora_linear(x, weight, self.base.bias, *self.lora)

    def _takes(self, merged: "Merged", x: Tensor) -> bool:
        same_adapter = merged.without_adapter == self.without_adapter
        same_device = x.device.type == self.base.weight.device.type
        return same_adapter and same_device and x.is_floating_point() and not torch.is_grad_enabled()

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
        """Whether the ops compute this layer, all of it in one dtype."""
        return self._is_mergeable and (not self.has_adapter or self.lora[0].dtype == self.base.weight.dtype)

    @property
    def _is_mergeable(self) -> bool:
        weight, bias = self.base.weight, self.base.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        # what quantises keeps its weight in a subclass of Tensor
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return False
        return not self.has_adapter or (not _is_hooked(self.base) and _is_plain_lora(self.layer))

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Until `unmerge`, one product with W + scale B A, rounded to `dtype` (None: that of W), wherever no
        gradient is recorded and the adapter is on, or off, as it is now.

        The layer's own tensors stay as they are. Not for a layer whose adapter is not plain LoRA.
        """
        if not self._is_mergeable:
            return
        weight, bias = self.weight, self.base.bias
        dtype = weight.dtype if dtype is None else dtype
        if not self.without_adapter:
            a, b, scale = self.lora
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight = product(b.to(wide), a.T.to(wide)).mul_(scale).add_(weight)
        weight, bias = packed(weight.to(dtype)), None if bias is None else bias.to(dtype)
        if self.spare is not None:
            weight, bias = _in_place_of(self.spare.weight, weight), _in_place_of(self.spare.bias, bias)
        self.merged, self.spare = Merged(weight, bias, dtype, self.without_adapter), None

    def unmerge(self, keep: bool = False) -> None:
        """keep: the memory of the copy, for the next `merge`; a CUDA graph holds its address."""
        merged, self.merged = self.merged, None
        is_copy = merged is not None and not merged.weight.is_mkldnn
        is_copy = is_copy and merged.weight.data_ptr() != self.base.weight.data_ptr()
        self.spare = merged if keep and is_copy else None


class Merged(NamedTuple):
    """A layer's weight with its adapter in it, as `product` reads it fastest."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    without_adapter: bool


def _in_place_of(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """new, in the memory of old if that fits."""
    if old is None or new is None or old.data_ptr() == new.data_ptr():
        return new
    fits = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if fits else new


def _is_plain_lora(layer: nn.Module) -> bool:
    names = layer.active_adapters
    if layer.merged or len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if _is_hooked(a) or _is_hooked(b):
        return False
    dropout = getattr(layer.lora_dropout[names[0]], "p", 0.0)
    return b.bias is None and a.weight.dtype == b.weight.dtype and not dropout


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
