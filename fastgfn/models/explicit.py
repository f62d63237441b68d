"""Model classes outside transformers' AttentionInterface, such as GPT-J: they get the token tree as an
additive mask, and in decoding a Cache that hands them the keys and values of every row's path.

A tree forward is one sequence under a (1, 1, T, T) mask. A decoding step is a batch of rows of one token, as
`generate` makes it, but for the keys and values: they are gathered from the pool, one layer at a time.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastgfn import checks
from fastgfn.attention import KeyValues, PathAttention, TreeAttention
from fastgfn.ops.attention import RowBlock

# Most nodes of a tree: such a class makes scores (H, T, T) in every layer, and keeps them for the backward.
MAX_NODES = 4096


def arguments(
    tokens: Tensor, position: Tensor, attention: TreeAttention | PathAttention, dtype: torch.dtype
) -> dict:
    """Keywords of the backbone's forward; its hidden states are (1, T, D) or (n, 1, D).

    Raises:
        InputError: the tree has more than MAX_NODES nodes.
    """
    if isinstance(attention, PathAttention):
        width = int(attention.length.max())
        seen = torch.arange(width, device=tokens.device) < attention.length[:, None]
        path = torch.where(seen, attention.path[:, :width].long(), attention.nodes[:, None])
        cache = PooledCache(attention.kv, attention.nodes, path)
        tokens, position, mask = tokens[:, None], position[:, None], _additive(seen[:, None], dtype)
    else:
        fix = "lower num_samples or the lengths, or use a class that transformers' AttentionInterface serves"
        want, size = f"of at most {MAX_NODES} nodes for this model class", len(tokens)
        checks.check(size <= MAX_NODES, "Policy.hidden", "tokens", want, size, fix)
        whole = RowBlock(0, size, torch.zeros(0, dtype=torch.int64, device=tokens.device))
        cache = None if attention.kv is None else PooledCache(attention.kv, attention.nodes)
        mask = attention.mask.additive(whole, None, dtype)[None]
        tokens, position = tokens[None], position[None]
    return {
        "input_ids": tokens,
        "position_ids": position,
        "attention_mask": mask[:, None],
        "past_key_values": cache,
        "use_cache": cache is not None,
    }


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


class PooledCache(Cache):
    """Keeps the new keys and values in a pool as those of `nodes`; with `path` (n, W), row n attends to the
    nodes path[n] of the pool, and otherwise the new ones to each other."""

    def __init__(self, kv: KeyValues, nodes: Tensor, path: Tensor | None = None) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self.nodes = nodes
        self.path = path

    def update(self, key_states, value_states, layer_idx, *args, **options):
        """Keys and values of a tree (1, Hkv, T, d), or (n, Hkv, 1, d) -> (n, Hkv, W, d)."""
        new = (x.transpose(0, 1).flatten(1, 2) for x in (key_states, value_states))
        self.kv.write(layer_idx, self.nodes, *new)
        if self.path is None:
            return key_states, value_states
        return tuple(pool[self.path].transpose(1, 2) for pool in self.kv.layers[layer_idx])
