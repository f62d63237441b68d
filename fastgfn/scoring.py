"""Stage 3: TokenTree -> LogProbs. One teacher-forced forward, in the convention of the tree's constraints."""

from dataclasses import replace

from fastgfn.models import Policy, Reference
from fastgfn.phases import phase
from fastgfn.types import LogProbs, Role, TokenTree


@phase("score")
def score(tree: TokenTree, *, policy: Policy | Reference) -> LogProbs:
    """log q of every action and of stopping, for the policy that `sample` draws from at temperature 1.

    Under "forced" termination, with p the model's softmax over logits + logit_bias:
        below min_length   log q(z) = log p(z | not stop); stopping is impossible
        at max_length      log q(stop) = 0
        otherwise          log q = log p
    Under a grammar, p is the softmax over the tokens that it allows in the state, see `pack`. Under "own",
    log q = log p everywhere.

    Returns:
        LogProbs, node-aligned (see LogProbs), float32 (float64 for a float64 model), differentiable in the
        policy's trainable parameters. log_pf is 0 off the action nodes, log_pterm 0 off the terminable ones.
    """
    raw = policy.tree_log_probs(tree, tree.constraints.logit_bias, **limits(tree))
    return constrained(raw, tree)


def limits(tree: TokenTree) -> dict:
    """How log q(z) is renormalised: by the masks of the tree, or without the stop token below some length."""
    if tree.allowed is not None:
        return {"masked": True}
    return {"no_stop_below": tree.constraints.min_length if tree.constraints.termination == "forced" else 0}


def constrained(raw: LogProbs, tree: TokenTree) -> LogProbs:
    """log q, as `score` returns it, from the model's node-aligned log p."""
    constraints = tree.constraints
    log_pf = raw.log_pf.masked_fill(tree.role != Role.ACTION, 0.0)
    log_pterm = raw.log_pterm
    if constraints.termination == "forced":
        log_pterm = log_pterm.masked_fill(tree.length >= constraints.max_length, 0.0)
    return replace(raw, log_pf=log_pf, log_pterm=log_pterm.masked_fill(~tree.terminable, 0.0))
