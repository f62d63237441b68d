"""The states that windows begin and end at, and the weighted sum of a tree's windows."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgfn import checks
from fastgfn.objectives.pooling import Pooling, Residual, check_normalization, pooled
from fastgfn.ops.scan import subtree_sum, tree_cumsum
from fastgfn.ops.subtb import subtb_pairwise, subtb_tree, subtb_tree_pairs
from fastgfn.ops.tree import gather_nodes, path_nodes
from fastgfn.types import TokenTree


class States(NamedTuple):
    """S states: the nodes of a tree, or these and one sink below every node at which a trajectory stops.

    parent: (S,), depth-first. valid: (S,) bool, windows begin and end here. leaf: (N,), of the trajectories.
    node: (S,) the node of the tree, of a sink that of its parent; None: S is T. is_sink: (S,) bool or None.
    """

    parent: Tensor
    valid: Tensor
    leaf: Tensor
    node: Tensor | None = None
    is_sink: Tensor | None = None

    def of(self, values: Tensor, at_sink: Tensor | None = None) -> Tensor:
        """(S,) values (T,) of the nodes; of a sink those of its parent, or at_sink (T,) there."""
        if self.node is None:
            return values
        if at_sink is None:
            return values[self.node]
        return torch.where(self.is_sink, at_sink[self.node], values[self.node])


def has_anchor(tree: TokenTree) -> bool:
    """Whether s_0 cannot stop, so that the loss reads log Z(X), by default a mean over a prompt's samples.

    It is the same for every prompt. Under a grammar it is read from the tree, which waits for a GPU.
    """
    if tree.allowed is not None:
        return bool((tree.is_root_state & ~tree.terminable).any())
    return tree.constraints.termination == "forced" and tree.constraints.min_length > 0


def stop_states(tree: TokenTree, *, include_sink: bool = False) -> States:
    """The states of the modified objectives: prefixes that may stop, and s_0."""
    ends = tree.terminable | tree.is_root_state if has_anchor(tree) else tree.terminable
    return _with_sinks(tree, ends) if include_sink else States(tree.parent, ends, tree.leaf)


def flow_states(tree: TokenTree) -> States:
    """The states of the objectives with explicit flows: s_0, every prefix at which stopping is not certain,
    and x where a trajectory stops."""
    return _with_sinks(tree, tree.is_state & (tree.is_root_state | ~tree.must_stop))


def _with_sinks(tree: TokenTree, ends: Tensor) -> States:
    stops = torch.zeros_like(tree.is_state).index_fill(0, tree.leaf, True)
    node = torch.arange(tree.num_nodes, device=stops.device).repeat_interleave(1 + stops.long())
    is_sink = pad(node.diff() == 0, (1, 0)) if len(node) else stops
    # a node's own number among the states, the sinks before it counted
    number = torch.arange(tree.num_nodes, device=stops.device) + pad(stops.long().cumsum(0), (1, 0))[:-1]
    above = tree.parent[node].long()
    parent = torch.where(above < 0, above, number[above.clamp(min=0)])
    parent = torch.where(is_sink, number[node], parent).to(tree.parent.dtype)
    return States(parent, ends[node] | is_sink, number[tree.leaf] + 1, node, is_sink)


def window_coefficients(
    tree: TokenTree,
    *,
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
    include_sink: bool = False,
) -> Tensor:
    """(N,) float64 coefficients a with which `modified_subtb_loss` is the sum over trajectories n and windows
    of n of a_n lambda^(k-1) phi(U_j - U_i).

    They depend on the tree's structure alone, so they are known before any of it is scored.

    Args and raises: as `modified_subtb_loss`.
    """
    name, states = "window_coefficients", stop_states(tree, include_sink=include_sink)
    return coefficients_of(name, tree, states, subtb_lambda, Pooling(normalization, weights))


def flow_coefficients(
    tree: TokenTree,
    *,
    subtb_lambda: float = 1.0,
    normalization: str = "group",
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """`window_coefficients` of `subtb_loss`."""
    name, states = "flow_coefficients", flow_states(tree)
    return coefficients_of(name, tree, states, subtb_lambda, Pooling(normalization, weights))


def coefficients_of(
    name: str, tree: TokenTree, states: States, subtb_lambda: float, pooling: Pooling
) -> Tensor:
    """(N,) those of `pooling`, or what it makes of the weights of every trajectory's windows."""
    want, fix = "in [0, 1]", "1.0 is the paper's"
    checks.check(0.0 <= subtb_lambda <= 1.0, name, "subtb_lambda", want, subtb_lambda, fix)
    check_normalization(name, pooling.normalization)
    if pooling.coefficients is not None:
        return pooling.coefficients
    pairs = subtb_tree_pairs(states.parent, states.valid, subtb_lambda) * states.valid
    mass = tree_cumsum(pairs, states.parent)[states.leaf]
    return pooled(name, tree, mass, pooling.normalization, pooling.weights)


def window_sum(
    tree: TokenTree,
    states: States,
    log_pf: Tensor,  # (S,)
    log_flow: Tensor,  # (S,)
    coefficients: Tensor,  # (N,)
    subtb_lambda: float,
    residual: Residual,
) -> Tensor:
    """() sum over trajectories and their windows of coefficient lambda^(k-1) phi(U_j - U_i), with
    U = log_pf along the path - log_flow. O(S) for squares; others take the windows of every trajectory, in
    O(N L^2) time.
    """
    if residual.loss in ("squared", "half_squared"):
        at_leaf = torch.zeros(len(states.parent), dtype=coefficients.dtype, device=coefficients.device)
        weight = subtree_sum(at_leaf.index_add(0, states.leaf, coefficients), states.parent).to(log_flow)
        loss = subtb_tree(log_pf, log_flow, states.parent, states.valid, weight, subtb_lambda)
        return loss if residual.loss == "squared" else 0.5 * loss
    nodes = state_rows(tree, states)
    potential = tree_cumsum(log_pf.double(), states.parent) - log_flow
    rows = -gather_nodes(potential, nodes)
    lengths = ((nodes >= 0).sum(1) - 1).clamp(min=0)
    sums, _ = subtb_pairwise(torch.zeros_like(rows[:, 1:]), rows, lengths, subtb_lambda, *residual)
    return (coefficients * sums).sum().to(log_pf.dtype)


def state_rows(tree: TokenTree, states: States) -> Tensor:
    """(N, L) the valid states on the path of every trajectory, s_0 first, padded with -1."""
    extra = 1 if states.node is None else 2
    width = tree.constraints.max_length + extra
    nodes = path_nodes(states.parent, states.leaf, tree.length[tree.leaf].long() + extra, width)
    kept = (nodes >= 0) & states.valid[nodes.clamp(min=0)]
    order = (~kept).long().argsort(dim=1, stable=True)
    return nodes.masked_fill(~kept, -1).gather(1, order)
