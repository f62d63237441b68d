"""Tree attention and decode attention: the two attention patterns of the road.

Tree attention is one packed row in which node j is visible from node i exactly when `j <= i < end[j]`, and,
with a sliding window W, `position[i] - position[j] < W`. Decode attention lets every sample read its prompt's
shared keys and values and its own suffix.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_BYTES = 64 * 2**20


class TreeMask:
    """Visibility of a token tree, built once per forward and shared by all layers.

    end: (T,) int32, one past the last descendant. position: (T,) int64, depth.
    """

    def __init__(self, end: Tensor, position: Tensor) -> None:
        self.end = end
        self.position = position
        self._cache: dict = {}

    def rows(self, start: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(stop - start, stop) additive mask of query rows [start, stop) against keys [0, stop)."""
        key = (start, stop, window, dtype)
        if key in self._cache:
            return self._cache[key]
        query = torch.arange(start, stop, device=self.end.device)[:, None]
        node = torch.arange(stop, device=self.end.device)[None]
        visible = (node <= query) & (query < self.end[None, :stop])
        if window is not None:
            visible &= self.position[start:stop, None] - self.position[None, :stop] < window
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.end.device).masked_fill_(
            ~visible, -torch.inf
        )
        if stop - start == self.end.shape[0]:
            # one block serves all layers; several would add up to the whole mask, so they are made anew
            self._cache[key] = mask
        return mask

    def block_mask(self, window: int | None):
        """FlexAttention BlockMask of the same visibility."""
        if window not in self._cache:
            from torch.nn.attention.flex_attention import create_block_mask

            end, position, size = self.end, self.position, self.end.shape[0]

            def visible(b, h, i, j):
                keep = (j <= i) & (i < end[j])
                return keep if window is None else keep & (position[i] - position[j] < window)

            self._cache[window] = create_block_mask(visible, None, None, size, size, device=end.device)
        return self._cache[window]


def tree_attention(
    query: Tensor,  # (H, T, d)
    key: Tensor,  # (Hkv, T, d)
    value: Tensor,  # (Hkv, T, d)
    mask: TreeMask,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(H, T, d) softmax(scale * q k^T, soft-capped, masked) v on one packed token tree.

    Equal to `reference.attention.tree_attention`. On CPU: SDPA with a dense additive mask, in row blocks so
    that no mask exceeds 64 MB; on CUDA: FlexAttention. Differentiable in query, key and value.
    """
    if query.is_cuda:
        return _flex_attention(query, key, value, mask, scale, softcap, window)
    size = query.shape[1]
    step = max(1, min(size, MASK_BYTES // (max(1, size) * query.element_size())))
    blocks = []
    for start in range(0, size, step):
        stop = min(size, start + step)
        additive = mask.rows(start, stop, window, query.dtype)
        args = (query[:, start:stop], key[:, :stop], value[:, :stop], additive, scale)
        blocks.append(_masked_attention(*args) if softcap is None else _softcapped_attention(*args, softcap))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _masked_attention(query, key, value, additive, scale):
    repeat = query.shape[0] // key.shape[0]
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=additive, scale=scale, enable_gqa=repeat > 1
    )
    return out[0]


def _softcapped_attention(query, key, value, additive, scale, softcap):
    repeat = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(repeat, 0).transpose(1, 2) * scale
    weights = (softcap * torch.tanh(scores / softcap) + additive).softmax(-1)
    return weights @ value.repeat_interleave(repeat, 0)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_attention(query, key, value, mask, scale, softcap, window):
    def cap(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    out = _compiled_flex()(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else cap,
        block_mask=mask.block_mask(window),
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0]


def decode_attention(
    query: Tensor,  # (n, H, d)
    shared_key: Tensor,  # (Hkv, P, d)
    shared_value: Tensor,  # (Hkv, P, d)
    own_key: Tensor,  # (n, Hkv, t, d)
    own_value: Tensor,  # (n, Hkv, t, d)
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(n, H, d) attention of n samples of one prompt, each over the prompt and its own t tokens.

    Equal to attention over the concatenation [shared | own]; the prompt's part is one matrix product for all
    samples. The query is at depth P + t - 1. No gradient is needed here.
    """
    n, heads, width = query.shape
    kv_heads, prompt, _ = shared_key.shape
    repeat = heads // kv_heads
    grouped = query.view(n, kv_heads, repeat, width) * scale
    flat = grouped.transpose(0, 1).reshape(kv_heads, n * repeat, width)
    shared = (flat @ shared_key.transpose(1, 2)).view(kv_heads, n, repeat, prompt).transpose(0, 1)
    own = grouped @ own_key.transpose(2, 3)
    scores = torch.cat([shared, own], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        scores[..., : max(0, scores.shape[-1] - window)] = -torch.inf
    weights = scores.softmax(-1)
    from_prompt = weights[..., :prompt].transpose(0, 1).reshape(kv_heads, n * repeat, prompt) @ shared_value
    out = from_prompt.view(kv_heads, n, repeat, width).transpose(0, 1)
    out = out + weights[..., prompt:] @ own_value
    return out.reshape(n, heads, width)
