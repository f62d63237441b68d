"""Drafts: guesses of what rows will draw, checked by the policy in the pass that computes them anyway."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.attention import KeyValues, PathAttention, TreeAttention
from fastgfn.models import Policy, Reference
from fastgfn.ops.attention import TreeMask
from fastgfn.phases import phase
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.nodes import NodePool, PrefixTree, in_parts

# Prefix tokens of one pass of a draft model.
PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """R rows of the running batch, each a distinct prefix, before any of them is computed.

    path[i, :length[i]] are the nodes of row i in `pool`, those of the prompt first; the count[i] nodes after
    them will be those of its draft, token by token.
    """

    pool: NodePool
    path: Tensor  # (R, W) int32
    length: Tensor  # (R,) int64
    count: Tensor  # (R,) int64, most tokens to draft
    trajectory: Tensor  # (R,) int64, the first of those that share the row; it keys the noise of their draws
    position: Tensor  # (R,) int64, tokens of Z so far
    temperature: Tensor  # (R,) float32, of that trajectory

    @property
    def prefixes(self) -> list[list[int]]:
        """The tokens of every row, prompt and Z."""
        pairs = zip(self.path, self.length, strict=True)
        return [self.pool.token[path[:length].long()].tolist() for path, length in pairs]


class Drafter(Protocol):
    """Drafts for one running batch."""

    def propose(self, request: DraftRequest) -> Sequence[Sequence[int]]:
        """For each row up to count[i] tokens that may follow one another."""


class DraftSource(Protocol):
    """Where drafts come from.

    node_bytes: memory per token of the running batch that its drafters take.
    """

    node_bytes: int

    def begin(self, policy: Policy, drawer: Drawer, pool: NodePool, width: int) -> Drafter:
        """A drafter for a batch that begins, whose nodes will be of `pool`, at most `width` on a path.

        Called by every `sample`, and again after running out of memory, before the first token.
        """


class PromptLookup:
    """Drafts what followed the last tokens where they stood before in the same text.

    ngram: the longest context looked for; shorter ones follow, down to one token. O(length) per row and step.
    Source: prompt lookup decoding (Saxena 2023).
    """

    node_bytes = 0

    def __init__(self, ngram: int = 3) -> None:
        checks.check(ngram >= 1, "PromptLookup", "ngram", ">= 1", ngram, "raise it")
        self.ngram = ngram

    def begin(self, *batch) -> "PromptLookup":
        return self

    def propose(self, request: DraftRequest) -> list[list[int]]:
        return [self._after(p, n) for p, n in zip(request.prefixes, request.count.tolist(), strict=True)]

    def _after(self, text: list[int], count: int) -> list[int]:
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            last = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == last:
                    return text[start + size : start + size + count]
        return []


class ModelDrafts:
    """Drafts of a model with the policy's vocabulary: a smaller Policy, or `policy.reference`, the base.

    It draws from the very noise that the policy will draw from, at the same temperature, options, mask and
    limits: a draft is accepted wherever the two models' perturbed argmax agrees, which two nearby models do
    far more often than the likeliest token is drawn. Trajectories that share a row get the draft of the first
    of them. Grammars, tools and given prefixes are not looked at; what they rule out is not accepted.

    Cost: `length` passes of the model per step, with every token once; its keys and values take node_bytes
    per token for as long as the batch runs. Where a pass of the policy takes no longer for 1 + length tokens
    per row, tokens per second change by (1 + accepted) / (1 + length * c), with what is accepted per row and
    step and the cost c of the model's pass over the policy's. So the base gains nothing on a merged policy
    (c = 1), and nothing gains where the cost grows with the tokens, as on a CPU.

    Raises (in `sample`):
        InputError: the model has another vocabulary or device, or too short a context.
    """

    def __init__(self, model: Policy | Reference) -> None:
        ok, have = isinstance(model, (Policy, Reference)), type(model).__name__
        fix = "pass e.g. policy.reference"
        checks.check(ok, "ModelDrafts", "model", "a Policy or a Reference", have, fix)
        self.model = model
        self._policy = model.policy if isinstance(model, Reference) else model

    @property
    def node_bytes(self) -> int:
        return self._policy.node_bytes

    def begin(self, policy: Policy, drawer: Drawer, pool: NodePool, width: int) -> "ModelDrafter":
        own, limit = self._policy, self._policy.max_positions
        for what, want, have in (
            ("of the policy's vocabulary size", policy.vocab_size, own.vocab_size),
            ("on the policy's device", policy.device, own.device),
        ):
            fix = "use a draft model of the same tokenizer and device"
            checks.check(want == have, "sample", "draft model", f"{what} ({want})", have, fix)
        fix = "shorten the prompts, lower max_length or use another draft model"
        want = f"of a context of prompt + max_length = {width} tokens"
        checks.check(limit is None or width <= limit, "sample", "draft model", want, limit, fix)
        same_draws = Drawer(self.model, drawer.constraints, drawer.options, drawer.seed)
        return ModelDrafter(self.model, same_draws, pool)


class ModelDrafter:
    """A draft model beside one running batch: it keeps keys and values for the batch's own nodes."""

    def __init__(self, model: Policy | Reference, drawer: Drawer, pool: NodePool) -> None:
        self.model = model
        self.drawer = drawer
        self.pool = pool
        self.kv = KeyValues(pool.capacity)
        # The pool's count of takes when the node's keys and values were computed; 0: never.
        self.computed = torch.zeros_like(pool.takes)

    @phase("draft")
    def propose(self, request: DraftRequest) -> list[list[int]]:
        chains: list[list[int]] = [[] for _ in range(len(request.length))]
        own = (request.count > 0).nonzero()[:, 0]
        path, length = request.path[own], request.length[own]
        hidden = self._catch_up(path, length) if len(own) else None
        depth = 0
        while len(own):
            draw = self.drawer(
                hidden, torch.arange(len(own)), request.temperature[own], request.trajectory[own],
                request.position[own] + depth,
            )  # fmt: skip
            goes_on = draw.token != self.drawer.constraints.termination_token_id
            for i, token in zip(own[goes_on].tolist(), draw.token[goes_on].tolist(), strict=True):
                chains[i].append(token)
            depth += 1
            goes_on &= request.count[own] > depth
            own, token, path, length = (x[goes_on] for x in (own, draw.token, path, length + 1))
            if len(own):
                hidden = self._forward(token, path, length)
        return chains

    def _catch_up(self, path: Tensor, length: Tensor) -> Tensor:
        """(R, D) hidden states of the last node of every path, once all that leads to it is computed."""
        # A row that ran before lacks its last node and the last token of an accepted draft, at most.
        fresh = (self._is_new(path, length).sum(1) > 2).nonzero()[:, 0].tolist()
        for part in in_parts({tuple(path[i, : length[i] - 1].tolist()): None for i in fresh}, PREFILL_TOKENS):
            self._prefill(part)
        row, depth = self._is_new(path, length).nonzero(as_tuple=True)
        nodes, place = path[row, depth].unique(return_inverse=True)
        # Any of the rows that share a node has its path.
        first = torch.full_like(nodes, len(row)).long()
        first.scatter_reduce_(0, place, torch.arange(len(row)), "amin")
        row, depth = row[first], depth[first]
        hidden = self._forward(self.pool.token[nodes.long()], path[row], depth + 1)
        last = path[torch.arange(len(path)), length - 1]
        return hidden[torch.searchsorted(nodes, last).to(hidden.device)]

    def _is_new(self, path: Tensor, length: Tensor) -> Tensor:
        """(R, W) bool: the node has no keys and values yet."""
        nodes = path.long()
        is_known = self.computed[nodes] == self.pool.takes[nodes]
        return ~is_known & (torch.arange(path.shape[1]) < length[:, None])

    def _prefill(self, paths: Sequence[Sequence[int]]) -> None:
        # a tree whose tokens are the nodes of the pool
        tree = PrefixTree(paths)
        device, nodes = self.drawer.device, tree.tokens
        position = tree.position.to(device)
        attention = TreeAttention(TreeMask(tree.end.to(device), position), self.kv, nodes.to(device))
        self.model.hidden(self.pool.token[nodes].to(device), position, attention)
        self.computed[nodes] = self.pool.takes[nodes]

    def _forward(self, token: Tensor, path: Tensor, length: Tensor) -> Tensor:
        """(n, D) hidden states of the last node of each path."""
        device = self.drawer.device
        nodes = path[torch.arange(len(path)), length - 1].long()
        attention = PathAttention(self.kv, nodes.to(device), path.to(device), length.to(device))
        hidden = self.model.hidden(token.to(device), (length - 1).to(device), attention)
        self.computed[nodes] = self.pool.takes[nodes]
        return hidden


@dataclass(slots=True)
class Drafts:
    """A source and how far it looks ahead; `sample` counts in it what was offered and what was accepted.

    A draft is accepted if the policy draws that very token, from the noise that it would draw from without
    drafts, so drafts change the speed and never the draws.
    """

    source: DraftSource
    length: int = 4
    offered: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        checks.check(self.length >= 1, "Drafts", "length", ">= 1", self.length, "raise it")
        fix, have = "pass PromptLookup() or ModelDrafts(model)", type(self.source).__name__
        is_source = all(hasattr(self.source, name) for name in ("begin", "node_bytes"))
        checks.check(is_source, "Drafts", "source", "a DraftSource", have, fix)

    @property
    def acceptance(self) -> float:
        """Share of the offered tokens that were drawn; nan before the first."""
        return self.accepted / self.offered if self.offered else float("nan")

    def propose(
        self, drafter: Drafter, request: DraftRequest, vocab: int, stops: Sequence[int]
    ) -> list[list[int]]:
        """Checked drafts, cut at the first termination token."""
        counts = request.count.tolist()
        found = [list(d) for d in drafter.propose(request)]
        fix = "return one list per row"
        checks.check(len(found) == len(counts), "Drafts", "drafts", f"{len(counts)} lists", len(found), fix)
        for i, (draft, count) in enumerate(zip(found, counts, strict=True)):
            ok = len(draft) <= count and all(0 <= t < vocab for t in draft)
            want = f"at most {count} ids in [0, {vocab})"
            checks.check(ok, "Drafts", f"drafts[{i}]", want, draft[:20], "use this model's token ids")
            found[i] = list(takewhile(lambda t: t not in stops, draft))
        self.offered += sum(map(len, found))
        return found
