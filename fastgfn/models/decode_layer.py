"""Decoder layers of Llama's kind in few kernels, for passes without gradient under merged weights.

A decoding step of a small model is bound by the number of its kernels. Here a layer has 9: norm; one product
for queries, keys and values; rotary positions and write to the pool; attention; product; sum and norm; one
product for gates and ups; their product; product, added to the sum. In passes over a tree, such as those of
prompts, torch rotates, and the tree's attention writes.
"""

import inspect
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from fastgfn.attention import PathAttention, TreeAttention
from fastgfn.models.linear import Linear, Packed, is_hooked
from fastgfn.models.mlp import GatedMLP, computes
from fastgfn.ops.decode_layer import MAX_WIDTH, add_rms_norm, rms_norm, rope, rope_write, silu_mul_row
from fastgfn.ops.linear import add_product


class DecoderLayer:
    """Stands in for the `forward` of a decoder layer; what it does not cover goes to the layer's own:
    gradients, autocast, weights that are not merged, another attention than ours, hooks inside the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.own_forward = layer, layer.forward
        attention, mlp = layer.self_attn, layer.mlp
        self.window = WINDOWS[_attends(type(attention))]
        linear = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        linear = [m.forward for m in (*linear, attention.o_proj, mlp.down_proj)]
        self.qkv, self.gate_up = Packed(linear[:3]), Packed(linear[3:5])
        self.output, self.down = linear[5:]
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm, *self.head_norms]
        # the modules that a pass here does not call, with what stands in for their forward
        self.skipped = dict.fromkeys((attention, *self.norms)) | {mlp: mlp.forward}
        self.skipped |= {m.layer: m for m in linear}

    def __call__(self, x: Tensor, *args, **options) -> Tensor:
        attention, angles = options.get("attention"), options.get("position_embeddings")
        if args or not self._takes(x, attention, angles, options.get("past_key_values")):
            return self.own_forward(x, *args, **options)
        first, second = self.norms[:2]
        total = x.flatten(0, 1)
        row = self.qkv.product(rms_norm(total, first.weight, first.variance_epsilon))
        seen = self._attend(row, [t[0] for t in angles], attention, x.dtype)
        delta = self.output.merged.product(seen)
        total, normed = add_rms_norm(total, delta, second.weight, second.variance_epsilon)
        inner = silu_mul_row(self.gate_up.product(normed))
        weight, bias, dtype = self.down.merged[:3]
        add_product(total, inner.to(dtype), weight, bias)
        return total.view(x.shape)

    def _takes(self, x: Tensor, attention, angles, past_key_values) -> bool:
        if torch.is_grad_enabled() or type(attention) not in (PathAttention, TreeAttention):
            return False
        if past_key_values is not None or torch.is_autocast_enabled(x.device.type):
            return False
        width = self.layer.self_attn.head_dim
        is_row = x.dim() == 3 and x.shape[0] == 1 and isinstance(angles, tuple) and len(angles) == 2
        if not is_row or any(t.shape != (1, x.shape[1], width) for t in angles):
            return False
        parts = (self.qkv, self.gate_up, self.output, self.down)
        if not all(part.takes(x) for part in parts) or any(n.weight.dtype != x.dtype for n in self.norms):
            return False
        return not any(is_hooked(module, forward) for module, forward in self.skipped.items())

    def _attend(self, row: Tensor, angles: list[Tensor], attention, dtype: torch.dtype) -> Tensor:
        """(n, H d) from rows (n, (H + 2 Hkv) d) of queries, keys and values."""
        own = self.layer.self_attn
        layer, width = own.layer_idx, own.head_dim
        kv_heads = self.qkv.members[1].weight.shape[0] // width
        norms = tuple(n.weight for n in self.head_norms) or None
        eps = self.head_norms[0].variance_epsilon if norms else 0.0
        options = dict(scale=own.scaling, softcap=None, window=self.window(own))
        if isinstance(attention, PathAttention):
            if layer not in attention.kv.layers:
                like = row.new_empty(kv_heads, 0, width, dtype=dtype)
                attention.kv.allocate(layer, like, like)
            query = rope_write(row, *angles, attention.nodes, *attention.kv.layers[layer], norms, eps)
            return attention.attend(layer, query, **options).flatten(1)
        heads = rope(row, *angles, kv_heads, norms, eps, dtype)
        return attention(layer, *(x.transpose(0, 1)[None] for x in heads), **options)[0].flatten(1)


def take_over_layers(backbone: nn.Module) -> list[DecoderLayer]:
    """Put a `DecoderLayer` in the place of the forward of every layer that computes what Llama's does, or
    what it does with the attention of Mistral or Qwen. After the linear layers and the MLPs."""
    taken = [DecoderLayer(m) for m in backbone.modules() if _is_covered(m)]
    for forward in taken:
        forward.layer.forward = forward
    return taken


def _is_covered(layer: nn.Module) -> bool:
    if "forward" in layer.__dict__ or computes(type(layer).forward) != computes(LlamaDecoderLayer.forward):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if _attends(type(attention)) not in WINDOWS or not isinstance(mlp.__dict__.get("forward"), GatedMLP):
        return False
    projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    projections += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    if layer.input_layernorm.weight.numel() > MAX_WIDTH:
        return False
    return all(isinstance(m.__dict__.get("forward"), Linear) for m in projections) and all(
        computes(type(n).forward) == computes(LlamaRMSNorm.forward) for n in norms
    )


def _attends(kind: type[nn.Module]) -> tuple:
    """What an attention computes, and the functions that rotate its queries and keys."""
    scope = inspect.unwrap(kind.forward).__globals__
    rotations = [scope.get(name) for name in ("apply_rotary_pos_emb", "rotate_half")]
    return computes(kind.forward), *((computes(f), f.__defaults__) for f in rotations if f is not None)


def _no_window(own: nn.Module) -> None:
    return None


def _window_of_config(own: nn.Module) -> int | None:
    return getattr(own.config, "sliding_window", None)


# What the attention of a class computes -> the window that it hands to the attention function. By functions
# with names: models are pickled.
WINDOWS: dict[tuple, Callable[[nn.Module], int | None]] = {
    _attends(LlamaAttention): _no_window,
    _attends(MistralAttention): _window_of_config,
    _attends(Qwen2Attention): operator.attrgetter("sliding_window"),
    _attends(Qwen3Attention): operator.attrgetter("sliding_window"),
}
