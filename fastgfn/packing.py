"""Stage 2: Rollouts -> TokenTree. Shared prompts, shared prefixes and duplicates become one node each."""

import torch

from fastgfn.functional.tree import build_tree
from fastgfn.phases import phase
from fastgfn.types import Role, Rollouts, TokenTree


@phase("pack")
def pack(rollouts: Rollouts, *, device: torch.device | str | None = None) -> TokenTree:
    """The token tree of a batch of rollouts, leaf[n] being the node at which trajectory n stops.

    Trees are built on the host (T depends on the data) and then moved to `device`. Expected O(total tokens).
    What a tool returned becomes observation nodes.
    """
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
    return tree if device is None else tree.to(device)
