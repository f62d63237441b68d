"""Stage 2: Rollouts -> TokenTree. Shared prompts, shared prefixes and duplicates become one node each."""

from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.functional.parts import split_tree
from fastgfn.functional.tree import build_tree, node_sequences
from fastgfn.phases import phase
from fastgfn.types import Grammar, Role, Rollouts, TokenTree

__all__ = ["pack", "split_tree"]

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
        InputError: a sequence that begins with an observation, so that s_0 would be none of its states;
            rollouts of a grammar without it, or of none with one; "own" termination under a grammar;
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
    if is_action is not None:
        answered = bool((~is_action[:, :1] & (rollouts.lengths > 0)[:, None]).any())
        want, fix = "True of every first token", "what is known before the first action is of the prompt"
        checks.check(not answered, "pack", "is_action", want, "False", fix)
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
