"""The attention function registered with transformers; it reads what a forward pass hands it as a keyword.

Custom keyword arguments of a transformers backbone reach the attention function of every layer, so one
registered function serves the packed token tree (score, reward, prefill) and decoding: the `attention`
keyword holds one of the two objects below.

Under torch.autocast a float32 model computes what plain transformers would in 16 bits: the products of its
layers and head, and attention, whose keys and values are kept in 16 bits; log-probs stay float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface

from fastgfn import checks
from fastgfn.ops.attention import TreeMask, tree_attention
from fastgfn.ops.path_attention import SharedPrompts, path_attention

NAME = "fastgfn"


class KeyValues:
    """Keys and values of `capacity` nodes, per layer two (capacity, Hkv, d), allocated at the first write."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, nodes: Tensor, *new: Tensor) -> None:
        """Keys and values (Hkv, n, d) of `nodes` (n,)."""
        if layer not in self.layers:
            self.allocate(layer, *new)
        for pool, x in zip(self.layers[layer], new, strict=True):
            pool.index_copy_(0, nodes, x.transpose(0, 1))

    def allocate(self, layer: int, *new: Tensor) -> None:
        """The pools of a layer, for keys and values such as these (Hkv, n, d)."""
        self.layers[layer] = tuple(x.new_empty(self.capacity, x.shape[0], x.shape[2]) for x in new)


@dataclass(slots=True)
class TreeAttention:
    """One forward over a packed token tree; with `kv`, keys and values are kept there as those of `nodes`."""

    mask: TreeMask
    kv: KeyValues | None = None
    nodes: Tensor | None = None  # (T,) int64

    def __call__(self, layer, query, key, value, **options):
        if self.kv is not None:
            self.kv.write(layer, self.nodes, key[0], value[0])
        return tree_attention(query[0], key[0], value[0], self.mask, **options).transpose(0, 1)[None]


@dataclass(slots=True)
class PathAttention:
    """One decoding step: row n is node nodes[n] of `kv` and sees the nodes path[n, :length[n]], it last."""

    kv: KeyValues
    nodes: Tensor  # (n,) int64
    path: Tensor  # (n, W) int32
    length: Tensor  # (n,) int64
    shared: SharedPrompts | None = None

    def __call__(self, layer, query, key, value, **options):
        self.write(layer, key[0], value[0])
        return self.attend(layer, query[0].transpose(0, 1), **options)[None]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keys and values (Hkv, n, d) of the step's nodes."""
        self.kv.write(layer, self.nodes, key, value)

    def attend(self, layer: int, query: Tensor, **options) -> Tensor:
        """(n, H, d) for queries of the same shape, once their keys and values are written."""
        pool = self.kv.layers[layer]
        return path_attention(query, *pool, self.path, self.length, shared=self.shared, **options)


def _forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """(1, H, T, d) queries -> ((1, T, H, d), None), as transformers' AttentionInterface asks."""
    attention = kwargs.get("attention")
    if attention is None:
        checks.fail(
            "attention",
            "attention",
            "a TreeAttention or PathAttention object",
            None,
            "call the model through fastgfn.models.Policy, or load it with another attn_implementation",
        )
    if kwargs.get("s_aux") is not None:
        have = f"{type(module).__name__}, which adds a sink to every softmax"
        checks.fail("attention", "model", "without attention sinks", have, "use a model without them")
    query, key, value = (_autocast(x) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window")
    out = attention(module.layer_idx, query, key, value, scale=scale, softcap=softcap, window=window)
    return out, None


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype in which torch's own attention would compute it: under autocast queries and keys come
    from rotary angles in float32, values from a product in 16 bits."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


AttentionInterface.register(NAME, _forward)
