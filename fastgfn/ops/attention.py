"""Tree attention: one packed row in which node j is visible from node i exactly when `j <= i < end[j]`, and,
with a sliding window W, `position[i] - position[j] < W`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgfn import checks
from fastgfn.ops.tree_attention import check_inputs, flash_attention, triton_attention

MASK_BYTES = 64 * 2**20
# Rows of one dense block on the CPU: 128 and 64 tie within 15%, 256 is slower from 650 nodes on.
ROW_BLOCK = 128
PROVIDERS = ("triton", "sdpa", "flex", "flash_attn")


class RowBlock(NamedTuple):
    """Rows [start, stop) and `above`: of earlier nodes they see only the ancestors of row `start`."""

    start: int
    stop: int
    above: Tensor  # (A,) int64, ascending

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return self.above.shape[0] + self.num_rows


class TreeMask:
    """Visibility of a token tree, built once per forward and shared by all layers.

    end: (T,) int32, one past the last descendant. position: (T,) int64, depth.
    """

    def __init__(self, end: Tensor, position: Tensor) -> None:
        self.end = end
        self.position = position
        self._cache: dict = {}

    def row_blocks(self, window: int | None) -> list[RowBlock]:
        """The rows in blocks of ROW_BLOCK. Synchronises with the host once per window."""
        key = ("row_blocks", window)
        if key not in self._cache:
            size = self.end.shape[0]
            starts = range(0, max(1, size), ROW_BLOCK)
            self._cache[key] = [self._row_block(s, min(size, s + ROW_BLOCK), window) for s in starts]
        return self._cache[key]

    def _row_block(self, start: int, stop: int, window: int | None) -> RowBlock:
        visible = self.end[:start] > start
        if window is not None and start:
            visible &= self.position[start:stop].min() - self.position[:start] < window
        return RowBlock(start, stop, visible.nonzero()[:, 0])

    def additive(self, block: RowBlock, window: int | None, dtype: torch.dtype) -> Tensor:
        """(rows, keys) 0 or -inf: the rows of a block against its `above` and itself."""
        query = torch.arange(block.start, block.stop, device=self.end.device)
        node = torch.cat([block.above, query])
        visible = (node <= query[:, None]) & (query[:, None] < self.end[node])
        if window is not None:
            visible &= self.position[query][:, None] - self.position[node] < window
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)

    def kept_masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor] | None:
        """The additive masks of all row blocks, made once for all layers; None if they exceed MASK_BYTES."""
        key = ("masks", window, dtype)
        if key not in self._cache:
            blocks = self.row_blocks(window)
            pairs = sum(b.num_rows * b.num_keys for b in blocks)
            fits = pairs * dtype.itemsize <= MASK_BYTES
            self._cache[key] = [self.additive(b, window, dtype) for b in blocks] if fits else None
        return self._cache[key]

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
        """end and position, (T,) int32 contiguous."""
        if "nodes" not in self._cache:
            self._cache["nodes"] = (self.end.int().contiguous(), self.position.int().contiguous())
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
        provider: None is "triton" on CUDA and "sdpa" on CPU. "triton" is kernels/tree_attention.py; "sdpa" is
            torch's with an additive mask, in blocks of 128 rows against the ancestors that these see; "flex"
            FlexAttention; "flash_attn" that package, for chains only.

    Raises:
        InputError, InputTypeError: shapes, dtypes or devices disagree, a softcap or window is not positive,
            the provider does not exist or cannot run these tensors or this tree.
        MissingPackageError: "flash_attn" without the package.
    """
    known = "None or one of " + ", ".join(repr(p) for p in PROVIDERS)
    checks.check(
        provider is None or provider in PROVIDERS,
        "tree_attention",
        "provider",
        known,
        repr(provider),
        "use one of them",
    )
    check_inputs(query, key, value, mask.end, softcap, window)
    provider = provider or ("triton" if query.is_cuda else "sdpa")
    function = {"triton": triton_attention, "flex": _flex_attention, "flash_attn": flash_attention}
    return function.get(provider, _sdpa_attention)(query, key, value, mask, scale, softcap, window)


def _sdpa_attention(query, key, value, mask, scale, softcap, window):
    blocks = mask.row_blocks(window)
    masks = mask.kept_masks(window, query.dtype)
    settings = (mask, scale, softcap, window)
    outs = []
    for i, block in enumerate(blocks):
        args = (query, key, value, block, None if masks is None else masks[i], *settings)
        if masks is None:
            # autograd would keep a mask per layer and block; the backward makes it and the block again
            options = dict(use_reentrant=False, preserve_rng_state=False)
            outs.append(checkpoint(_attend_block, *args, **options))
        else:
            outs.append(_attend_block(*args))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_block(query, key, value, block, additive, mask, scale, softcap, window):
    if additive is None:
        additive = mask.additive(block, window, query.dtype)
    own = slice(block.start, block.stop)
    if block.start:
        key, value = (torch.cat([x.index_select(1, block.above), x[:, own]], dim=1) for x in (key, value))
    else:
        key, value = key[:, own], value[:, own]
    args = (query[:, own], key, value, additive, scale)
    return _masked_attention(*args) if softcap is None else _softcapped_attention(*args, softcap)


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
