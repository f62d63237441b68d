"""The gated MLPs of a backbone, without their product in the autograd graph: it is the largest activation of
a layer, and one elementwise pass makes it again from the two projections that are saved anyway."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from fastgfn.ops.silu_mul import silu_mul


class GatedMLP:
    """Stands in for the `forward` of an MLP that computes down(silu(gate(x)) * up(x)).

    is_checkpointed: its layer keeps nothing and runs again in backward; a hook here would hide what is saved
        from the layer's own.
    """

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = mlp
        self.is_checkpointed = False

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.mlp.gate_proj(x), self.mlp.up_proj(x)
        product = silu_mul(gate, up)
        if self.is_checkpointed or not product.requires_grad:
            return self.mlp.down_proj(product)

        # autograd keeps the hook, so it must not keep the product
        address, inputs = product.data_ptr(), (gate.detach(), up.detach())

        def pack(saved: Tensor):
            return (*inputs, saved.shape) if saved.data_ptr() == address else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return self.mlp.down_proj(product)


def _unpack(saved):
    if isinstance(saved, Tensor):
        return saved
    gate, up, shape = saved
    return silu_mul(gate, up).view(shape)


def take_over_mlps(backbone: nn.Module) -> int:
    """Put a `GatedMLP` in the place of the forward of every MLP that computes the same; returns how many."""
    count = 0
    for mlp in backbone.modules():
        if computes(type(mlp).forward) == computes(LlamaMLP.forward) and "forward" not in mlp.__dict__:
            if isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
                mlp.forward = GatedMLP(mlp)
                count += 1
    return count


def computes(function: Callable) -> tuple:
    """What a function does, in bytecode, and all that wrap it: the same text elsewhere gives the same."""
    found = []
    while (code := getattr(function, "__code__", None)) is not None:
        constants = tuple(c for c in code.co_consts if c != function.__doc__)
        found.append((code.co_code, code.co_names, constants, code.co_varnames))
        function = getattr(function, "__wrapped__", None)
    return tuple(found)
