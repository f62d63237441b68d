"""The attention function registered with transformers; it reads what a forward pass hands it as a keyword.

Custom keyword arguments of a transformers backbone reach the attention function of every layer, so one
registered function serves the packed token tree (score, reward, prefill) and decoding: the `attention`
keyword holds one of the two objects below.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface

from fastgfn import checks
from fastgfn.ops.attention import TreeMask, decode_attention, tree_attention

NAME = "fastgfn"


@dataclass(slots=True)
class TreeAttention:
    """One forward over a packed token tree; `keep_kv` records each layer's keys and values (prefill)."""

    mask: TreeMask
    keep_kv: bool = False
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer, query, key, value, **options):
        if self.keep_kv:
            self.kv[layer] = (key[0], value[0])
        return tree_attention(query[0], key[0], value[0], self.mask, **options).transpose(0, 1)[None]


class DecodeAttention:
    """Keys and values of a running batch: the prompts' part shared, the samples' own part appended per step.

    shared: per layer, the prefill's (Hkv, P_total, d) keys and values; spans[g] = (start, stop) of prompt g.
    Rows of the running batch are ordered by group; `sizes[g]` of them belong to prompt g.
    """

    def __init__(self, shared: dict[int, tuple[Tensor, Tensor]], spans: list[tuple[int, int]]) -> None:
        self.shared = shared
        self.spans = spans
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.sizes: list[int] = []

    def select(self, rows: Tensor | None, sizes: list[int]) -> None:
        """Continue with `rows` (indices into the current batch, or None for all) of `sizes` per group."""
        self.sizes = sizes
        if rows is not None:
            self.own = {i: (k[rows], v[rows]) for i, (k, v) in self.own.items()}

    def __call__(self, layer, query, key, value, **options):
        query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        key, value = key[:, :, None], value[:, :, None]
        if layer in self.own:
            old_key, old_value = self.own[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.own[layer] = (key, value)
        shared_key, shared_value = self.shared[layer]
        out, row = [], 0
        for size, (start, stop) in zip(self.sizes, self.spans, strict=True):
            if size:
                rows = slice(row, row + size)
                prompt_kv = (shared_key[:, start:stop], shared_value[:, start:stop])
                out.append(decode_attention(query[rows], *prompt_kv, key[rows], value[rows], **options))
                row += size
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


def _forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """(1, H, T, d) queries -> ((1, T, H, d), None), as transformers' AttentionInterface asks."""
    attention = kwargs.get("attention")
    if attention is None:
        checks.fail(
            "attention",
            "attention",
            "a TreeAttention or DecodeAttention object",
            None,
            "call the model through fastgfn.models.Policy, or load it with another attn_implementation",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window")
    out = attention(module.layer_idx, query, key, value, scale=scale, softcap=softcap, window=window)
    return out, None


AttentionInterface.register(NAME, _forward)
