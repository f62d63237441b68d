"""Gradient checkpointing of a backbone in eval(), where transformers' own switch waits for train mode."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fastgfn import checks
from fastgfn.models.mlp import GatedMLP


class CheckpointedLayer:
    """Stands in for the `forward` of a decoder layer: of what backward needs, only its inputs are kept, and
    the layer runs again. It computes the same bits: no pass has dropout."""

    def __init__(self, layer: nn.Module) -> None:
        self.instance_forward = layer.__dict__.get("forward")
        self.own_forward = layer.forward

    def __call__(self, *args, **options):
        if not torch.is_grad_enabled():
            return self.own_forward(*args, **options)
        return checkpoint(self.own_forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def checkpoint_layers(backbone: nn.Module, enabled: bool) -> None:
    """Put a `CheckpointedLayer` in the place of the forward of every decoder layer, or take it out again.

    Raises:
        InputError: the backbone has no layers that transformers would checkpoint.
    """
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
    name, want = "gradient_checkpointing", "of a class with checkpointable layers"
    checks.check(
        bool(layers) or not enabled, name, "model", want, type(backbone).__name__, "leave it switched off"
    )
    for layer in layers:
        current = layer.__dict__.get("forward")
        if enabled and not isinstance(current, CheckpointedLayer):
            layer.forward = CheckpointedLayer(layer)
        elif not enabled and isinstance(current, CheckpointedLayer):
            del layer.forward
            if current.instance_forward is not None:
                layer.forward = current.instance_forward
    for module in backbone.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, GatedMLP):
            forward.is_checkpointed = enabled
