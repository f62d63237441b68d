"""Plain truth of sub-trajectory balance, on padded rows and token trees, and the derivation of the O(T) form.

The potential of state s is U_s = (sum of log_pf along the path to s) - log_flow_s. The window (i, j), i a
strict ancestor of j, has the residual U_j - U_i and the weight lambda^(m-1), m the number of states in (i, j]
(0^0 = 1, so lambda = 0 keeps windows of one step). The objective is the weighted sum of squared residuals.

Linear form. Let S_k(j) = sum_i lambda^(m-1) (U_j - U_i)^k over the windows that end at j, k = 0, 1, 2, and
B_k(j) = lambda S_k(p) + [k = 0] for the parent p of j: the same sum measured from U_p, with p as a start of
its own. With d = U_j - U_p = log_pf_j + log_flow_p - log_flow_j,

    S_0 = B_0,   S_1 = B_1 + d B_0,   S_2 = B_2 + 2 d B_1 + d^2 B_0,

and the objective is the sum of S_2. Only differences of neighbouring potentials enter, so nothing cancels.
Where p is not a state (a prompt token, a prefix that may not stop) it starts no window and does not lengthen
one: B_k = S_k(p), and its log_flow counts as 0.

Gradient. Let R_k(j) = sum_c lambda^(m-1) (U_c - U_j)^k over the windows that start at j, k = 0, 1. Seen from
the parent p of c, the windows that end at c or below it sum to

    E_0 = 1 + lambda R_0(c),   E_1 = lambda R_1(c) + d_c E_0,   R_k(p) = sum of E_k over the children c

(E_k = R_k, shifted likewise, where c is not a state). A state's potential is in the windows on both sides and
log_pf_j is in every window that crosses the edge into j:

    d/dlog_flow_j = -2 (S_1(j) - R_1(j)),      d/dlog_pf_j = 2 (B_0(j) E_1(j) + B_1(j) E_0(j)).

The latter is also minus the sum of d/dlog_flow over j and its descendants, which is what the padded rows use.
With a weight w_j on the windows that end at j, the 1 in E_0 becomes w_j and S_1(j) becomes w_j S_1(j).
Source: Madan et al. 2023 (arXiv:2209.12782) for the objective; the linear form is our own.
"""

import torch
from torch import Tensor

from fastgfn.reference.residual import residual_loss


def subtb_padded(
    log_pf: Tensor,  # (N, T)
    log_flow: Tensor,  # (N, T + 1)
    lengths: Tensor,  # (N,)
    subtb_lambda: float,
    loss: str = "squared",
    limit: float = 100.0,
) -> tuple[Tensor, Tensor]:
    """Weighted loss and total weight of every row's windows, each (N,), through all (T + 1)^2 pairs."""
    states = torch.arange(log_flow.shape[1], device=lengths.device)
    is_step = states[None, :-1] < lengths[:, None]
    is_state = states[None] <= lengths[:, None]
    path = torch.nn.functional.pad(torch.where(is_step, log_pf, 0).cumsum(1), (1, 0))
    potential = path - torch.where(is_state, log_flow, 0)
    residual = potential[:, None, :] - potential[:, :, None]
    steps = states[None, :] - states[:, None]
    weight = torch.tensor(subtb_lambda, dtype=log_pf.dtype) ** (steps - 1).clamp(min=0)
    weight = weight.to(log_pf.device) * ((steps > 0) & is_state[:, None, :])
    return (weight * residual_loss(residual, loss, limit)).sum((1, 2)), weight.sum((1, 2))


def subtb_tree(
    log_pf: Tensor,  # (T,)
    log_flow: Tensor,  # (T,)
    parent: Tensor,  # (T,)
    valid: Tensor,  # (T,) bool
    weight: Tensor,  # (T,)
    subtb_lambda: float,
) -> Tensor:
    """() sum of weight[j] * lambda^(m-1) * (U_j - U_i)^2 over all pairs of valid nodes i above j."""
    total = log_pf.new_zeros(())
    for j, i, between in _windows(parent, valid):
        residual = sum(log_pf[k] for k in between) - log_flow[j] + log_flow[i]
        num_states = sum(bool(valid[k]) for k in between)
        total = total + weight[j] * subtb_lambda ** (num_states - 1) * residual**2
    return total


def subtb_tree_pairs(parent: Tensor, valid: Tensor, subtb_lambda: float) -> Tensor:
    """(T,) float64 total weight of the windows that end at each node; 0 at nodes that are not valid."""
    pairs = torch.zeros(parent.shape[0], dtype=torch.float64)
    for j, _, between in _windows(parent, valid):
        pairs[j] += subtb_lambda ** (sum(bool(valid[k]) for k in between) - 1)
    return pairs


def _windows(parent: Tensor, valid: Tensor):
    """Every (j, i, nodes after i up to j) with i a strict ancestor of j and both valid."""
    above = parent.tolist()
    for j in range(len(above)):
        between, i = [j], above[j]
        while bool(valid[j]) and i >= 0:
            if bool(valid[i]):
                yield j, i, list(between)
            between.append(i)
            i = above[i]
