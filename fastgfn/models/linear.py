"""The linear layers of a backbone, run by the ops of `fastgfn.ops.linear` wherever those cover them."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastgfn.ops.linear import frozen_linear, lora_linear, product, rollout_weight
from fastgfn.ops.quantized import DTYPES, QuantizedWeight


class Linear:
    """Stands in for the `forward` of one linear layer, with or without a LoRA adapter.

    A layer that the ops do not cover keeps its own forward: a trainable base weight, several adapters or a
    LoRA variant, quantised or offloaded weights, hooks on what the ops would skip, autocast.
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
        if self.takes(x):
            out, rows = self.merged.product(x), self.merged.rows
            return (out if rows is None else out[..., slice(*rows)]).to(x.dtype)
        weight = self.weight
        fits = x.dtype == weight.dtype and x.device.type == weight.device.type
        if not fits or not self.is_covered:
            return self.own_forward(x)
        if self.without_adapter:
            return frozen_linear(x, weight, self.base.bias)
        a, b, scale = self.lora
        # float32 adapters of a 16-bit base are rounded for the products, as peft rounds the sum of both
        return lora_linear(x, weight, self.base.bias, a.to(x.dtype), b.to(x.dtype), scale)

    def takes(self, x: Tensor) -> bool:
        """Whether the merged weight is that of a pass over x, without gradient."""
        if self.merged is None or torch.is_grad_enabled() or not x.is_floating_point():
            return False
        same_adapter = self.merged.without_adapter == self.without_adapter
        return same_adapter and x.device.type == self.base.weight.device.type

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
        """Whether the ops compute this layer, with and without gradient, and merge it."""
        weight, bias = self.base.weight, self.base.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        # what quantises keeps its weight in a subclass of Tensor
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return False
        return not self.has_adapter or (not is_hooked(self.base) and _is_plain_lora(self.layer))

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Until `unmerge`, one product with W + scale B A, rounded to `dtype` (None: that of W; those of
        8 bits: row by row), wherever no gradient is recorded and the adapter is on, or off, as it is now.

        The layer's own tensors stay as they are. Not for a layer whose adapter is not plain LoRA.
        """
        if not self.is_covered:
            return
        dtype = self.base.weight.dtype if dtype is None else dtype
        self.merged = _merged(self.summed(), self.base.bias, dtype, self)
        self._keep_place()

    def summed(self) -> Tensor:
        """(N, K) W + scale B A, or W with the adapter off."""
        weight = self.weight
        if self.without_adapter:
            return weight
        a, b, scale = self.lora
        wide = torch.promote_types(weight.dtype, torch.float32)
        return product(b.to(wide), a.T.to(wide)).mul_(scale).add_(weight)

    def _keep_place(self) -> None:
        """The merged weight and bias, in the memory of the spare ones."""
        merged, spare, self.spare = self.merged, self.spare, None
        if spare is not None:
            weight, bias = _in_place_of(spare.weight, merged.weight), _in_place_of(spare.bias, merged.bias)
            self.merged = merged._replace(weight=weight, bias=bias)

    def unmerge(self, keep: bool = False) -> None:
        """keep: the memory of the copy, for the next `merge`; a CUDA graph holds its address."""
        merged, self.merged = self.merged, None
        values = None if merged is None else merged.tensors[0]
        is_copy = values is not None and not values.is_mkldnn
        is_copy = is_copy and values.data_ptr() != self.base.weight.data_ptr()
        self.spare = merged if keep and is_copy else None


class Merged(NamedTuple):
    """A layer's weight with its adapter in it, as `product` reads it fastest."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype  # of the inputs of its product
    without_adapter: bool
    rows: tuple[int, int] | None = None  # of weight and bias, where layers share one

    def product(self, x: Tensor) -> Tensor:
        """Of all rows, in `dtype`."""
        return product(x.to(self.dtype), self.weight, self.bias)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the weight."""
        return (self.weight,) if isinstance(self.weight, Tensor) else tuple(self.weight)


def _merged(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, layer: Linear) -> Merged:
    """Of a weight and bias that are to be held in `dtype`, for a layer or for several that are like it."""
    weight = rollout_weight(weight, dtype)
    # products of 8 bits take x and the bias as they come
    own = layer.base.weight.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    return Merged(weight, None if bias is None else bias.to(own), own, layer.without_adapter)


class Packed:
    """Linear layers that read one input, merged into one weight, the rows of one after those of another:
    a copy that all of them share. The first keeps its memory."""

    def __init__(self, members: list[Linear]) -> None:
        self.members = members

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> bool:
        """`Linear.merge` of all members; or False, and nothing is done, where one of them cannot be merged,
        they differ in kind, or no copy is needed."""
        first = self.members[0]
        if not all(m.is_covered for m in self.members):
            return False
        bases = [m.base for m in self.members]
        kinds = {(m.base.weight.dtype, m.base.weight.device, m.without_adapter) for m in self.members}
        dtype = bases[0].weight.dtype if dtype is None else dtype
        copies = not first.without_adapter or dtype != bases[0].weight.dtype or first.spare is not None
        if len(kinds) > 1 or not copies:
            return False
        sums = (m.summed() for m in self.members)
        weight = torch.cat([w if dtype in DTYPES else w.to(dtype) for w in sums])
        sizes = [m.weight.shape[0] for m in self.members]
        bias = [
            b.weight.new_zeros(n) if b.bias is None else b.bias for b, n in zip(bases, sizes, strict=True)
        ]
        bias = None if all(b.bias is None for b in bases) else torch.cat(bias)
        first.merged = _merged(weight, bias, dtype, first)
        first._keep_place()
        ends = list(itertools.accumulate(sizes, initial=0))
        for member, rows in zip(self.members, itertools.pairwise(ends), strict=True):
            member.spare, member.merged = None, first.merged._replace(rows=rows)
        return True

    def takes(self, x: Tensor) -> bool:
        """Whether the merged weights are those of a pass over x, without gradient."""
        return all(m.takes(x) for m in self.members)

    def product(self, x: Tensor) -> Tensor:
        """(n, sum N) of x (n, K), side by side."""
        merged = [m.merged for m in self.members]
        if merged[0].rows is not None:
            return merged[0].product(x)
        return torch.cat([m.product(x) for m in merged], -1)


def _in_place_of(old: Tensor | QuantizedWeight | None, new: Tensor | QuantizedWeight | None):
    """new, in the memory of old if that fits."""
    if isinstance(old, QuantizedWeight) and isinstance(new, QuantizedWeight):
        return QuantizedWeight(*map(_in_place_of, old, new))
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or new.is_mkldnn:
        return new
    if old.data_ptr() == new.data_ptr():
        return new
    fits = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if fits else new


def _is_plain_lora(layer: nn.Module) -> bool:
    names = layer.active_adapters
    if layer.merged or len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if is_hooked(a) or is_hooked(b):
        return False
    dropout = getattr(layer.lora_dropout[names[0]], "p", 0.0)
    same = next(a.parameters()).dtype == b.weight.dtype  # `weight` of a conditioned adapter is computed
    return b.bias is None and same and not dropout


def is_hooked(module: nn.Module, forward: object = None) -> bool:
    """Whether calling the module does more than its class, or than `forward` in its place: hooks, or another
    forward (offloading)."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any((*hooks, module._backward_pre_hooks)) or module.__dict__.get("forward") is not forward


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


def merged_bytes(layers: list[Linear], dtype: torch.dtype | None = None) -> int:
    """Memory that merging all of them takes: the copies, and while the largest is made the sum that it is
    rounded from. Nothing where copies were made in that dtype and their memory kept."""
    spares = [(layer.spare.dtype, dtype or layer.weight.dtype) for layer in layers if layer.spare is not None]
    if any(has == wanted for has, wanted in spares):
        return 0
    copies = summed = 0
    for layer in (x for x in layers if x.is_covered):
        weight = layer.weight
        own = weight.dtype if dtype is None else dtype
        # on a CPU `packed` copies whatever the dtype
        if not layer.without_adapter or own != weight.dtype or weight.device.type == "cpu":
            copies += weight.numel() * own.itemsize
            summed = max(summed, weight.numel() * torch.promote_types(weight.dtype, torch.float32).itemsize)
    return copies + summed
