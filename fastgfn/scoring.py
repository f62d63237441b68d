"""Stage 3: TokenTree -> LogProbs. One teacher-forced forward, in the convention of the tree's constraints."""

import torch
from torch import Tensor

from fastgfn.models import Policy, Reference
from fastgfn.types import LogProbs, Role, TokenTree


def score(tree: TokenTree, *, policy: Policy | Reference) -> LogProbs:
    """log q of every action and of stopping, for the policy that `sample` draws from at temperature 1.

    Under "forced" termination, with p the model's softmax over logits + logit_bias:
        below min_length   log q(z) = log p(z) - log(1 - p(stop)); stopping is impossible
        at max_length      log q(stop) = 0
        otherwise          log q = log p
    Under "own", log q = log p everywhere.

    Returns:
        LogProbs, node-aligned (see LogProbs), float32 (float64 for a float64 model), differentiable in the
        policy's trainable parameters. log_pf is 0 off the action nodes, log_pterm 0 off the terminable ones.
    """
    constraints = tree.constraints
    raw = policy.tree_log_probs(tree, constraints.logit_bias)
    log_pf = raw.log_pf.masked_fill(tree.role != Role.ACTION, 0.0)
    log_pterm = raw.log_pterm
    if constraints.termination == "forced":
        if constraints.min_length > 0:
            short = (tree.role == Role.ACTION) & (tree.length <= constraints.min_length)
            go = _log_not_stop(log_pterm[tree.parent[short].long()])
            log_pf = log_pf - torch.zeros_like(log_pf).masked_scatter(short, go)
        log_pterm = log_pterm.masked_fill(tree.length >= constraints.max_length, 0.0)
    return LogProbs(log_pf=log_pf, log_pterm=log_pterm.masked_fill(~tree.terminable, 0.0))


def _log_not_stop(log_pterm: Tensor) -> Tensor:
    """log(1 - exp(log_pterm)), accurate at both ends."""
    close = log_pterm > -0.6931
    near_zero = torch.where(close, log_pterm, torch.full_like(log_pterm, -0.6931))
    far = torch.where(close, torch.full_like(log_pterm, -0.6931), log_pterm)
    return torch.where(close, torch.log(-torch.expm1(near_zero)), torch.log1p(-torch.exp(far)))
