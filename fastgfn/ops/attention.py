"""Tree attention and decode attention: the two attention patterns of the road.

Tree attention is one packed row in which node j is visible from node i exactly when `j <= i < end[j]`, and,
with a sliding window W, `position[i] - position[j] < W`. Decode attention lets every sample read its prompt's
shared keys and values and its own suffix.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.tree_attention import flash_attention, triton_attention

MASK_BYTES = 64 * 2**20
PROVIDERS = ("triton", "sdpa", "flex", "flash_attn")


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

    def nodes(self) -> tuple[Tensor, Tensor]:
        """end and position, (T,) int32."""
        if "nodes" not in self._cache:
            self._cache["nodes"] = (self.end.int(), self.position.int())
        return self._cache["nodes"]

    def bounds(self, block: int) -> Tensor:
        """(4, blocks) int32: least and greatest end, least and greatest position of every block of nodes."""
        key = ("bounds", block)
        if key not in self._cache:
            nodes, high = torch.stack(self.nodes()), torch.iinfo(torch.int32).max
            short = -nodes.shape[1] % block
            least = F.pad(nodes, (0, short), value=high).view(2, -1, block).amin(2)
            greatest = F.pad(nodes, (0, short), value=-high).view(2, -1, block).amax(2)
            self._cache[key] = torch.stack([least, greatest], dim=1).flatten(0, 1)
        return self._cache[key]

    def plan(self, queries: int, keys: int, window: int | None, by_key: bool = False) -> Tensor:
        """The blocks of `keys` nodes that each block of `queries` rows meets, or by key block the reverse.

        (blocks, 2 + other blocks) int32. A row holds the number of blocks seen in full, the number of blocks
        seen, and all indices: the full ones, then the partial ones, then those never read. No visible pair is
        left out. The shapes are fixed by T, and nothing synchronises with the host.
        """
        key = ("plan", queries, keys, window, by_key)
        if key not in self._cache:
            size, device = self.end.shape[0], self.end.device
            least_end, greatest_end, least_key, greatest_key = self.bounds(keys)
            least_query, greatest_query = self.bounds(queries)[2:, :, None]
            start = torch.arange(0, size, queries, dtype=torch.int32, device=device)[:, None]
            last = (start + (queries - 1)).clamp_(max=size - 1)
            first_key = torch.arange(0, size, keys, dtype=torch.int32, device=device)
            seen = (first_key <= last) & (greatest_end > start)
            # a block that runs past the last node is never full: first_key + keys > start
            full = (first_key + (keys - 1) <= start) & (least_end > last)
            if window is not None:
                seen &= least_query - greatest_key < window
                full &= greatest_query - least_key < window
            rank = 2 - seen.to(torch.uint8) - (seen & full).to(torch.uint8)
            rank = rank.T if by_key else rank
            counts = [(rank == 0).sum(1, keepdim=True), (rank < 2).sum(1, keepdim=True)]
            self._cache[key] = torch.cat([*counts, rank.argsort(dim=1, stable=True)], dim=1).int()
        return self._cache[key]

    def chains(self) -> tuple[Tensor, int] | None:
        """(starts of the chains and T (n + 1,) int32, longest), or None where a node branches.

        Synchronises with the host.
        """
        if "chains" not in self._cache:
            end, _ = self.nodes()
            after = torch.arange(1, end.shape[0] + 1, dtype=torch.int32, device=end.device)
            stops = F.pad(after[after >= end], (1, 0))
            straight = bool((end == stops[torch.searchsorted(stops, after)]).all())
            longest = int(stops.diff().max()) if end.shape[0] else 0
            self._cache["chains"] = (stops, longest) if straight else None
        return self._cache["chains"]


def tree_attention(
    query: Tensor,  # (H, T, d)
    key: Tensor,  # (Hkv, T, d)
    value: Tensor,  # (Hkv, T, d)
    mask: TreeMask,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    provider: str | None = None,
) -> Tensor:
    """(H, T, d) softmax(scale * q k^T, soft-capped, masked) v on one packed token tree.

    Equal to `reference.attention.tree_attention`. Differentiable in query, key and value.

    Args:
        provider: None is "triton" on CUDA and "sdpa" on CPU. "triton" is kernels/tree_attention.py; "sdpa" a
            dense additive mask, in row blocks so that no mask exceeds 64 MB; "flex" FlexAttention;
            "flash_attn" that package, for chains only.

    Raises:
        InputError, InputTypeError: the provider does not exist, or cannot run these tensors or this tree.
        MissingPackageError: "flash_attn" without the package.
    """
    if provider == "triton" or (provider is None and query.is_cuda):
        return triton_attention(query, key, value, mask, scale, softcap, window)
    if provider == "flex":
        return _flex_attention(query, key, value, mask, scale, softcap, window)
    if provider == "flash_attn":
        return flash_attention(query, key, value, mask, scale, softcap, window)
    if provider is not None and provider != "sdpa":
        known = ", ".join(repr(p) for p in PROVIDERS)
        checks.fail(
            "tree_attention", "provider", f"None or one of {known}", repr(provider), "use one of them"
        )
    size = query.shape[1]
    step = max(1, min(size, MASK_BYTES // (max(1, size) * query.element_size())))
    blocks = []
    for start in range(0, max(1, size), step):
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
