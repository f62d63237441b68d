"""Log-probabilities on the nodes of a tree: of a policy, of its reference, or of both from one head pass.

Node-aligned: log_pf (T,) is log p(node's token | its parent), 0 on prompt nodes; log_pterm (T,) is
log p(stop | node), 0 off the states; float32, or float64 for float64 hidden states. `masked`: each state's p
is renormalised over what `tree.allowed` lets it choose, which holds the termination tokens' limits too.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgfn.functional.log_probs import linear_log_probs, policy_reward_log_probs
from fastgfn.phases import phase
from fastgfn.types import LogProbs, Role, TokenTree


class _Reads(NamedTuple):
    """One stream of the head: the hidden `rows` (R,) that it sees, and for the token of each of `nodes` (M,)
    the `index` (M,) among them of the row that predicts it."""

    nodes: Tensor
    rows: Tensor
    index: Tensor


def tree_log_probs(
    model,
    tree: TokenTree,
    logit_bias: Tensor | None,
    no_stop_below: int,
    masked: bool,
    hidden: Tensor | None = None,
) -> LogProbs:
    """log p of a Policy or Reference: one forward of the tree, unless `hidden` is its result; the head sees
    each hidden row once, or twice below `no_stop_below` tokens, where the tokens that follow are under p
    without the stop token."""
    if hidden is None:
        hidden = model.tree_hidden(tree.tokens, tree.position, tree.end)
    first, renormalised = _reads(tree, no_stop_below)
    with phase("head"):
        raw = linear_log_probs(
            hidden[first.rows],
            targets=_targets(tree, first),
            rows=_rows(tree, first),
            logit_bias=_on(hidden, logit_bias),
            termination_token_id=tree.constraints.termination_token_id,
            **_masks(tree, first, masked),
            **_options(model),
        )
        raw = _renormalised(model, tree, hidden, _on_nodes(tree, first, raw), renormalised, logit_bias)
        return _with_flow(model, tree, hidden, raw)


def paired_log_probs(
    policy,
    tree: TokenTree,
    logit_bias: Tensor | None,
    reference_logit_bias: Tensor | None,
    no_stop_below: int,
    masked: bool,
) -> tuple[LogProbs, LogProbs]:
    """`tree_log_probs` of a policy, with `logit_bias`, `no_stop_below` and `masked`, and of its reference,
    with `reference_logit_bias` and without gradient: two forwards of the tree, then one pass over the head
    that both share (and the policy's renormalised rows, if any, in one of their own)."""
    with phase("score"):
        hidden = policy.tree_hidden(tree.tokens, tree.position, tree.end)
    with phase("reward"):
        base = policy.reference.tree_hidden(tree.tokens, tree.position, tree.end)
    (first, renormalised), (every, _) = _reads(tree, no_stop_below), _reads(tree, 0)
    biases = [_on(hidden, b) for b in (logit_bias, reference_logit_bias)]
    if all(b is not None for b in biases):
        wide = torch.promote_types(*(b.dtype for b in biases))
        biases = [b.to(wide) for b in biases]
    with phase("head"):
        raw, raw_base = policy_reward_log_probs(
            hidden[first.rows],
            base[every.rows],
            targets=(_targets(tree, first), _targets(tree, every)),
            rows=(_rows(tree, first), _rows(tree, every)),
            policy_logit_bias=biases[0],
            reward_logit_bias=biases[1],
            termination_token_id=tree.constraints.termination_token_id,
            **_masks(tree, first, masked),
            **_options(policy),
        )
        ours = _renormalised(policy, tree, hidden, _on_nodes(tree, first, raw), renormalised, logit_bias)
        return _with_flow(policy, tree, hidden, ours), _on_nodes(tree, every, raw_base)


def _with_flow(model, tree: TokenTree, hidden: Tensor, raw: LogProbs) -> LogProbs:
    """`raw` with log F of the model's flow head at the states, if it has one."""
    if model.flow_head is None:
        return raw
    states = tree.is_state.nonzero()[:, 0]
    values = model.flow_head(hidden[states], tree.length[states])
    zeros = torch.zeros(tree.num_nodes, dtype=values.dtype, device=values.device)
    return replace(raw, log_flow=zeros.index_copy(0, states, values))


def _reads(tree: TokenTree, no_stop_below: int) -> tuple[_Reads, _Reads]:
    """(stops and tokens under p, tokens under p without the stop token)."""
    nodes = (tree.role != Role.PROMPT).nonzero()[:, 0]
    early = tree.length[tree.parent[nodes].long()] < no_stop_below
    return _stream(tree, nodes[~early], tree.is_state), _stream(tree, nodes[early])


def _stream(tree: TokenTree, nodes: Tensor, states: Tensor | None = None) -> _Reads:
    parents = tree.parent[nodes].long()
    needed = torch.zeros_like(tree.is_state) if states is None else states
    needed = needed.index_fill(0, parents, True)
    return _Reads(nodes, needed.nonzero()[:, 0], (needed.cumsum(0) - 1)[parents])


def _targets(tree: TokenTree, read: _Reads) -> Tensor:
    """The tokens of the nodes, then every further termination token for every row."""
    stops = tree.tokens.new_tensor(tree.constraints.extra_termination_token_ids)
    return torch.cat([tree.tokens[read.nodes], stops.repeat_interleave(len(read.rows))])


def _rows(tree: TokenTree, read: _Reads) -> Tensor:
    every_row = torch.arange(len(read.rows), device=read.index.device)
    return torch.cat([read.index, every_row.repeat(len(tree.constraints.extra_termination_token_ids))])


def _masks(tree: TokenTree, read: _Reads, masked: bool) -> dict:
    if not masked or tree.allowed is None:
        return {}
    return {"allowed": tree.allowed, "allowed_row": tree.allowed_row[read.rows]}


def _on_nodes(tree: TokenTree, read: _Reads, raw: LogProbs) -> LogProbs:
    """From the log-probs of `_targets`; stopping is the sum over all termination tokens."""
    zeros = torch.zeros(tree.num_nodes, dtype=raw.log_pf.dtype, device=raw.log_pf.device)
    log_pterm = raw.log_pterm
    if tree.constraints.extra_termination_token_ids:
        others = raw.log_pf[len(read.nodes) :].view(-1, len(read.rows))
        every = torch.cat([log_pterm[None], others])
        # where none is allowed, logsumexp has no gradient but nan
        never = (every == -torch.inf).all(0)
        log_pterm = every.masked_fill(never, 0.0).logsumexp(0).masked_fill(never, -torch.inf)
    log_pterm = zeros.index_copy(0, read.rows, log_pterm).masked_fill(~tree.is_state, 0.0)
    log_pf = zeros.index_copy(0, read.nodes, raw.log_pf[: len(read.nodes)])
    return LogProbs(log_pf=log_pf, log_pterm=log_pterm)


def _renormalised(
    model, tree: TokenTree, hidden: Tensor, raw: LogProbs, read: _Reads, logit_bias: Tensor | None
) -> LogProbs:
    """`raw` with the tokens of `read` under p without the stop token."""
    if not len(read.nodes):
        return raw
    forbidden = torch.zeros(model.head.weight.shape[0], device=hidden.device)
    forbidden[list(tree.constraints.termination_token_ids)] = -torch.inf
    bias = _on(hidden, logit_bias)
    without_stop = linear_log_probs(
        hidden[read.rows],
        targets=tree.tokens[read.nodes],
        rows=read.index,
        logit_bias=forbidden if bias is None else bias + forbidden,
        **_options(model),
    )
    return LogProbs(raw.log_pf.index_copy(0, read.nodes, without_stop.log_pf), raw.log_pterm)


def _options(model) -> dict:
    head = model.head
    return {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "final_logit_softcap": head.softcap,
    }


def _on(hidden: Tensor, logit_bias: Tensor | None) -> Tensor | None:
    return None if logit_bias is None else logit_bias.to(hidden.device)
