"""`build_tree`: sequences over prompts -> TokenTree. It synchronises with the host: T depends on the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops import scan
from fastgfn.ops import tree as tree_ops
from fastgfn.types import Constraints, Role, TokenTree, as_int64

NAME = "build_tree"


def build_tree(
    sequences: Sequence[Sequence[int]] | None = None,
    *,
    prompts: Sequence[Tensor | Sequence[int]],
    group: Tensor | Sequence[int],  # (N,) int64
    tokens: Tensor | None = None,  # (N, L) int64
    lengths: Tensor | None = None,  # (N,) int64
    roles: Tensor | Sequence[Sequence[int]] | None = None,  # (N, L) int8, or as ragged as sequences
    constraints: Constraints,
) -> TokenTree:
    """Merge N sequences into one forest with a node per distinct (prompt, prefix, role), depth first.

    Equal to inserting every sequence into a trie below its prompt and listing the nodes in preorder, groups
    in order and children in order of first appearance.

    Args:
        sequences: N lists of token ids, without the termination token; or pass `tokens` and `lengths`.
        prompts: G non-empty token lists; equal prompts are not merged.
        group: which prompt each sequence continues, in [0, G).
        tokens: padded form of `sequences`; content past `lengths` is ignored.
        roles: role of every token, see Role; None: every token is an action.
        constraints: the sequence set that the sequences belong to.

    Returns:
        A TokenTree on the CPU with T <= prompt tokens + sequence tokens nodes. A prompt without a sequence
        keeps its nodes, with count 0. `length` counts action and observation nodes; a suffix keeps its
        prefix's.

    Raises:
        InputError: an empty prompt, a group or length out of range, a sequence longer than
            constraints.max_length, the termination token within a sequence, or both or neither input form.

    Numerics: exact integers, O(prompt tokens + sequence tokens) time and memory.
    """
    prompts = [as_int64(p) for p in prompts]
    group = as_int64(group)
    tokens, lengths, roles = _padded(sequences, tokens, lengths, roles)
    _check(prompts, group, tokens, lengths, roles)
    arrays = tree_ops.build_tree(prompts, tokens, lengths, group, roles)
    names = ("tokens", "position", "end", "parent", "count", "group", "role", "leaf")
    fields = dict(zip(names, arrays, strict=True))
    role, parent = fields["role"], fields["parent"]
    in_sequence = (role == Role.ACTION) | (role == Role.OBSERVATION)
    length = scan.tree_cumsum(in_sequence.long(), parent).int()
    tree = TokenTree(
        **fields,
        length=length,
        is_state=_is_state(fields),
        constraints=constraints,
    )
    _check_constraints(tree)
    return tree


def node_sequences(tree: TokenTree, nodes: Tensor) -> list[list[int]]:
    """The tokens of Z that lead to each node."""
    lengths = tree.length[nodes].long()
    width = int(lengths.max()) if len(nodes) else 0
    path = tree_ops.path_nodes(tree.parent, nodes, lengths, width)
    tokens = tree.tokens[path.clamp(min=0)].tolist()
    return [row[:n] for row, n in zip(tokens, lengths.tolist(), strict=True)]


def _is_state(fields: dict[str, Tensor]) -> Tensor:
    """Where the policy chooses what follows: not where a tool answered, unless a trajectory ends or another
    action follows there."""
    role, parent = fields["role"], fields["parent"]
    can_be = (role == Role.ACTION) | (role == Role.OBSERVATION) | _is_last_prompt_node(role, fields["group"])

    def is_parent(of: Role) -> Tensor:
        parents = parent[(role == of) & (parent >= 0)].long()
        return torch.zeros_like(can_be).index_fill_(0, parents, True)

    ends = torch.zeros_like(can_be).index_fill_(0, fields["leaf"], True)
    return can_be & (ends | is_parent(Role.ACTION) | ~is_parent(Role.OBSERVATION))


def _is_last_prompt_node(role: Tensor, group: Tensor) -> Tensor:
    """The prompt nodes of a group come first, so the last one is followed by another role or group."""
    is_prompt = role == Role.PROMPT
    continued = torch.zeros_like(is_prompt)
    continued[:-1] = is_prompt[1:] & (group[1:] == group[:-1])
    return is_prompt & ~continued


def _padded(sequences, tokens, lengths, roles) -> tuple[Tensor, Tensor, Tensor | None]:
    if sequences is None:
        given = [n for n, v in (("tokens", tokens), ("lengths", lengths)) if v is None]
        checks.check(not given, NAME, "sequences", "given, or tokens and lengths", "none", f"pass {given}")
        return tokens, lengths, roles
    checks.check(
        tokens is None and lengths is None,
        NAME,
        "sequences",
        "the only input form",
        "tokens or lengths beside it",
        "pass sequences, or tokens and lengths",
    )
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    if roles is not None and not isinstance(roles, Tensor):
        same = [len(r) for r in roles] == lengths.tolist()
        checks.check(same, NAME, "roles", "as ragged as sequences", "other lengths", "give a role per token")
        roles = _pad(roles, lengths, torch.int8)
    return _pad(sequences, lengths, torch.int64), lengths, roles


def _pad(rows, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    width = int(lengths.max()) if len(lengths) else 0
    padded = torch.zeros(len(lengths), width, dtype=dtype)
    flat = torch.tensor([value for row in rows for value in row], dtype=dtype)
    padded[torch.arange(width) < lengths[:, None]] = flat
    return padded


def _check(prompts, group: Tensor, tokens: Tensor, lengths: Tensor, roles: Tensor | None) -> None:
    for g, prompt in enumerate(prompts):
        ok = prompt.dim() == 1 and prompt.numel() > 0
        checks.check(ok, NAME, f"prompts[{g}]", "a non-empty (P,)", tuple(prompt.shape), "start it with BOS")
    checks.check_shape(NAME, "tokens", tokens, ("N", "L"), "pad the sequences to one length")
    num_sequences, width = tokens.shape
    checks.check_integer(NAME, "tokens", tokens)
    checks.check_integer(NAME, "lengths", lengths)
    checks.check_shape(NAME, "lengths", lengths, (num_sequences,), "give one length per sequence")
    checks.check_shape(NAME, "group", group, (num_sequences,), "give one prompt number per sequence")
    if roles is not None:
        have = roles.dtype
        if have != torch.int8:
            checks.fail(NAME, "roles", "int8", have, "cast it", kind=checks.InputTypeError)
        checks.check_shape(NAME, "roles", roles, (num_sequences, width), "give one role per token")
    for name, values, high in (("group", group, len(prompts) - 1), ("lengths", lengths, width)):
        bad = values[(values < 0) | (values > high)]
        checks.check(not len(bad), NAME, name, f"in [0, {high}]", bad[:1].tolist(), "correct that entry")


def _check_constraints(tree: TokenTree) -> None:
    limits = tree.constraints
    longest = int(tree.length.max()) if tree.num_nodes else 0
    checks.check(
        longest <= limits.max_length,
        NAME,
        "sequences",
        f"at most constraints.max_length = {limits.max_length} tokens long",
        longest,
        "raise max_length or cut the sequences",
    )
    shortest = int(tree.length[tree.leaf].min()) if len(tree.leaf) else limits.min_length
    checks.check(
        limits.termination == "own" or shortest >= limits.min_length,
        NAME,
        "sequences",
        f"at least constraints.min_length = {limits.min_length} tokens long",
        shortest,
        "drop them: the policy cannot stop there",
    )
    stops = torch.isin(tree.tokens, torch.tensor(limits.termination_token_ids)) & (tree.role == Role.ACTION)
    checks.check(
        not bool(stops.any()),
        NAME,
        "sequences",
        f"free of the termination tokens {limits.termination_token_ids}",
        f"it at node {int(stops.int().argmax()) if tree.num_nodes else -1}",
        "strip it: stopping is scored by log_pterm",
    )
