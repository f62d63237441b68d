"""Stage 2: Rollouts -> TokenTree. Shared prompts, shared prefixes and duplicates become one node each.

`split_tree` cuts a tree that is too large for one pass into parts of whole trajectories.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn import checks
from fastgfn.functional.tree import build_tree, node_sequences
from fastgfn.ops.scan import subtree_sum
from fastgfn.phases import phase
from fastgfn.types import Grammar, Role, Rollouts, TokenTree, TreePart

# States that a grammar is asked about at a time: 32 MiB of masks for a vocabulary of 128 Ki.
STATES = 256


@phase("pack")
def pack(
    rollouts: Rollouts, *, grammar: Grammar | None = None, device: torch.device | str | None = None
) -> TokenTree:
    """The token tree of a batch of rollouts, leaf[n] being the node at which trajectory n stops.

    Trees are built on the host (T depends on the data) and then moved to `device`. Expected O(total tokens).
    What a tool returned becomes observation nodes.

    grammar: the one that the rollouts were drawn under. It is asked once about every state of the tree but
        those at max_length, where stopping is certain whatever it says; the tree keeps the distinct masks, V
        bits each. States that it lets not stop are not terminable.

    Raises:
        InputError: rollouts of a grammar without it, or of none with one; "own" termination under a grammar;
            a mask that is no (K, V) bool, or lacks a token that was drawn or any token at all.
    """
    if grammar is None:
        fix = "pass the grammar to pack, too"
        checks.check(not rollouts.has_grammar, "pack", "rollouts", "drawn without a grammar", "one", fix)
    else:
        want, fix = "drawn under a grammar", "pass it to sample, too, or set has_grammar"
        checks.check(rollouts.has_grammar, "pack", "rollouts", want, "none", fix)
        termination, fix = rollouts.constraints.termination, "'own' takes stopping for possible everywhere"
        checks.check(
            termination == "forced", "pack", "termination", "'forced' under a grammar", termination, fix
        )
    is_action = rollouts.is_action
    roles = (
        None if is_action is None else torch.where(is_action, Role.ACTION, Role.OBSERVATION).to(torch.int8)
    )
    tree = build_tree(
        prompts=rollouts.prompts,
        group=rollouts.group,
        tokens=rollouts.tokens,
        lengths=rollouts.lengths,
        roles=roles,
        constraints=rollouts.constraints,
    )
    if grammar is not None and tree.num_nodes:
        tree = _masked(tree, grammar)
    return tree if device is None else tree.to(device)


def _masked(tree: TokenTree, grammar: Grammar) -> TokenTree:
    """The tree with what the grammar allows in its states, the shorter of which it is asked about first."""
    limits, row = tree.constraints, torch.full((tree.num_nodes,), -1)
    place: dict[bytes, int] = {}
    for length in range(int(tree.length.max()) + 1):
        level = tree.length == length
        _check_drawn(tree, (level & (tree.role == Role.ACTION)).nonzero()[:, 0], row, list(place))
        if length == limits.max_length:
            break
        for nodes in filter(len, (level & tree.is_state).nonzero()[:, 0].split(STATES)):
            for node, mask in zip(nodes.tolist(), _ask(tree, nodes, grammar), strict=True):
                row[node] = place.setdefault(mask, len(place))
    bits = torch.frombuffer(bytearray().join(place), dtype=torch.uint8).view(len(place), -1)
    tree = replace(tree, allowed=bits, allowed_row=row)
    leaves = tree.leaf[~tree.terminable[tree.leaf]]
    if len(leaves):
        _refuse("stopping", node_sequences(tree, leaves[:1])[0])
    return tree


def _ask(tree: TokenTree, nodes: Tensor, grammar: Grammar) -> list[bytes]:
    """What q may choose in each of K states of one length, ceil(V / 8) packed bytes."""
    sequences, stops = node_sequences(tree, nodes), tree.constraints.termination_token_ids
    allowed = grammar.allowed(sequences)
    is_mask = isinstance(allowed, Tensor) and allowed.dtype == torch.bool
    have = getattr(allowed, "dtype", type(allowed).__name__)
    checks.check(is_mask, "pack", "grammar mask", "a bool tensor", have, "return (K, V) bool")
    checks.check_shape("pack", "grammar mask", allowed, (len(nodes), "V"), "return a row per sequence")
    vocab = 1 + max(*stops, int(tree.tokens.max()))
    fix = "return a column per token of the model"
    checks.check(allowed.shape[1] >= vocab, "pack", "grammar mask", f"{vocab} columns", allowed.shape[1], fix)
    if int(tree.length[nodes[0]]) < tree.constraints.min_length:
        allowed = allowed.index_fill(1, torch.tensor(stops, device=allowed.device), False)
    empty = (~allowed.any(1)).nonzero()[:, 0]
    if len(empty):
        _refuse("every token", sequences[int(empty[0])])
    return [mask.tobytes() for mask in np.packbits(allowed.cpu().numpy(), axis=1, bitorder="little")]


def _check_drawn(tree: TokenTree, nodes: Tensor, row: Tensor, masks: list[bytes]) -> None:
    """That the token of every node is allowed in its parent."""
    parents = tree.parent[nodes].long()
    at = zip(nodes.tolist(), tree.tokens[nodes].tolist(), row[parents].tolist(), strict=True)
    for node, token, mask in at:
        if not masks[mask][token // 8] >> (token % 8) & 1:
            _refuse(f"token {token}", node_sequences(tree, torch.tensor([node]))[0][:-1])


def _refuse(what: str, sequence: list[int]) -> NoReturn:
    want = "the one that the rollouts were drawn under"
    have = f"one that forbids {what} after {sequence[-20:]}"
    checks.fail("pack", "grammar", want, have, "pass sample's")


def split_tree(tree: TokenTree, *, max_tokens: int | None) -> tuple[TreePart, ...]:
    """Parts of at most `max_tokens` nodes which together hold every trajectory once, and whole.

    Trajectories are taken in the order of their leaves, so that neighbours share prefixes, and a part ends
    where the next one's nodes no longer fit: no other cut of that order has fewer parts. A tree that fits, or
    any for max_tokens None, is its only part; of others, nodes that no trajectory passes are in no part.

    Raises:
        InputError: one trajectory and its prompt alone have more than max_tokens nodes.

    Numerics: exact integers, O(T) time and memory for every part; it synchronises with the host.
    """
    device, num = tree.tokens.device, tree.leaf.shape[0]
    if max_tokens is None or tree.num_nodes <= max_tokens:
        nodes = torch.arange(tree.num_nodes, device=device)
        return (TreePart(tree, nodes, torch.arange(num, device=device)),)
    leaves, order = tree.leaf.sort(stable=True)
    alone = tree.position[leaves] + 1
    longest = int(alone.max()) if num else 0
    name = "split_tree"
    want = f">= {longest}, the nodes of trajectory {int(order[alone.argmax()]) if num else 0} and its prompt"
    fix = "raise it, or shorten the prompt or max_length"
    checks.check(longest <= max_tokens, name, "max_tokens", want, max_tokens, fix)
    # In the order of the leaves a node is new to the first trajectory whose leaf is not before it.
    passed = (tree.count > 0).nonzero()[:, 0]
    new = torch.bincount(torch.searchsorted(leaves, passed), minlength=num)
    starts, size = [], max_tokens + 1
    for n, (whole, added) in enumerate(zip(alone.tolist(), new.tolist(), strict=True)):
        size += added
        if size > max_tokens:
            starts.append(n)
            size = whole
    return tuple(_part(tree, order[i:j]) for i, j in pairwise([*starts, num]))


def _part(tree: TokenTree, trajectories: Tensor) -> TreePart:
    at_leaf = torch.zeros(tree.num_nodes, dtype=torch.int64, device=tree.tokens.device)
    ones = torch.ones_like(trajectories)
    count = subtree_sum(at_leaf.index_add(0, tree.leaf[trajectories], ones), tree.parent)
    nodes = count.nonzero()[:, 0]
    # kept nodes before each node: its new number
    number = pad((count > 0).cumsum(0), (1, 0))
    parent = tree.parent[nodes].long()
    part = TokenTree(
        tokens=tree.tokens[nodes],
        position=tree.position[nodes],
        end=number[tree.end[nodes].long()].int(),
        parent=number[parent.clamp(min=0)].masked_fill(parent < 0, -1).int(),
        count=count[nodes].int(),
        group=tree.group[nodes],
        role=tree.role[nodes],
        leaf=number[tree.leaf[trajectories]],
        length=tree.length[nodes],
        is_state=tree.is_state[nodes],
        constraints=tree.constraints,
        allowed=tree.allowed,
        allowed_row=None if tree.allowed_row is None else tree.allowed_row[nodes],
    )
    return TreePart(part, nodes, trajectories)
