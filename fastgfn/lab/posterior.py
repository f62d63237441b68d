"""Exact posteriors: every string that the policy can draw, in one tree, forwarded in parts of a few nodes.

With R(Z)^(1/T) known for every string Z, log Z(X) is a sum and every conditional of the target is a ratio of
subtree sums; log q of every string costs one forward of the same parts. All sums are in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack, split_tree
from fastgfn.rewards import Reward
from fastgfn.rewards import log_reward as node_log_reward
from fastgfn.scoring import score
from fastgfn.types import Constraints, Grammar, LogProbs, Rollouts, TokenTree, TreePart, as_int64

NAME = "exact_posterior"
# Strings of all lengths; a tree of them has little more nodes.
MOST_STRINGS = 200_000
# Prefixes that a grammar is asked about at a time.
PREFIXES = 4096
# What float32 log-probs leave of 1 minus the sum of all q.
ROUNDING = 1e-5
# The share of the target's mass that its modes hold together.
MODE_MASS = 0.9
# Nats between strings that are as probable as each other.
TIE = 1e-9


@dataclass(frozen=True)
class Posterior:
    """The target R^(1/T) / Z of one prompt over its S strings, which are all that a policy can draw.

    sequences: S strings, in the order of the leaves of `tree`.
    raw_log_reward: (S,) float64, un-tempered log R.
    log_reward: (S,) float64, log R / T.
    log_target: (S,) float64, log R / T - log Z.
    log_flow: (T,) float64, log of the sum of R^(1/T) over the strings through each node of the tree.
    log_stop: (T,) float64, log of the target's probability of stopping at each node; -inf where none may.
    tree: of all strings. parts: the same, cut for the forwards.
    """

    prompt: list[int]
    sequences: list[list[int]]
    reward_temperature: float
    raw_log_reward: Tensor
    log_reward: Tensor
    log_target: Tensor
    log_z: float
    log_flow: Tensor
    log_stop: Tensor
    tree: TokenTree
    parts: tuple[TreePart, ...]

    def tempered(self, reward_temperature: float) -> "Posterior":
        """The target of the same rewards at another temperature."""
        kept = (self.prompt, self.sequences, self.raw_log_reward, self.tree, self.parts)
        return _posterior(*kept, reward_temperature)


@torch.no_grad()
def exact_posterior(
    prompt: Sequence[int],
    *,
    constraints: Constraints,
    reward: Reward,
    vocabulary: Sequence[int],
    reward_temperature: float = 1.0,
    grammar: Grammar | None = None,
    device: torch.device | str = "cpu",
    max_tokens: int | None = 512,
) -> Posterior:
    """Enumerate the strings over `vocabulary` and sum their rewards.

    Args:
        constraints: the limits of the strings, under "forced" termination. Their logit_bias has to rule out
            every token outside `vocabulary` but the termination tokens, e.g. by -99.
        reward: of the un-tempered log R, as in training.
        vocabulary: the tokens of Z; under a grammar those that it may allow.
        max_tokens: nodes that are forwarded at a time.

    Raises:
        InputError: repeated tokens or a termination token in `vocabulary`, "own" termination, more than
            MOST_STRINGS strings, none at all, or as `log_reward`.
    """
    fix = "'own' takes stopping for possible everywhere, so that its q has no sum of 1"
    termination = constraints.termination
    checks.check(termination == "forced", NAME, "constraints.termination", "'forced'", repr(termination), fix)
    checks.check(reward_temperature > 0, NAME, "reward_temperature", "> 0", reward_temperature, "raise it")
    tokens, lengths = enumerate_strings(constraints, vocabulary=vocabulary, grammar=grammar)
    num = len(lengths)
    rollouts = Rollouts(
        (as_int64(prompt),),
        torch.zeros(num, dtype=torch.int64),
        tokens,
        lengths,
        torch.full((num,), torch.nan),
        constraints,
        has_grammar=grammar is not None,
    )
    tree = pack(rollouts, grammar=grammar, device=device)
    leaf, order = tree.leaf.sort()
    tree, order = replace(tree, leaf=leaf), order.cpu()
    rows = zip(tokens[order].tolist(), lengths[order].tolist(), strict=True)
    sequences = [row[:n] for row, n in rows]
    parts = split_tree(tree, max_tokens=max_tokens)
    raw = torch.empty(num, dtype=torch.float64)
    for part in parts:
        value = node_log_reward(part.tree, reward=reward)[part.tree.leaf]
        raw[part.trajectories.cpu()] = value.double().cpu()
    return _posterior(list(prompt), sequences, raw, tree, parts, reward_temperature)


def enumerate_strings(
    constraints: Constraints, *, vocabulary: Sequence[int], grammar: Grammar | None = None
) -> tuple[Tensor, Tensor]:
    """Every string over `vocabulary` that may stop or that max_length ends, shorter ones first: tokens
    (S, max_length) int64, padded with 0, and lengths (S,)."""
    letters = as_int64(list(vocabulary))
    want, fix = "distinct tokens without the termination tokens", "list every token of Z once"
    stops = constraints.termination_token_ids
    is_plain = len(letters) == len(letters.unique()) and not bool(torch.isin(letters, as_int64(stops)).any())
    checks.check(is_plain and len(letters) > 0, NAME, "vocabulary", want, letters.tolist()[:20], fix)
    longest = constraints.max_length
    found: list[Tensor] = []
    level, total = torch.zeros(1, 0, dtype=torch.int64), 0
    for length in range(longest + 1):
        may_stop, may_follow = _choices(level, letters, constraints, grammar)
        done = level[may_stop]
        found.append(torch.nn.functional.pad(done, (0, longest - length)))
        total += len(done)
        grown = int(may_follow.sum())
        want, have = f"at most {MOST_STRINGS} strings", f"{max(total, grown)} and more"
        checks.check(max(total, grown) <= MOST_STRINGS, NAME, "the problem", want, have, "lower max_length")
        row, letter = may_follow.nonzero(as_tuple=True)
        level = torch.cat([level[row], letters[letter, None]], dim=1)
    checks.check(total > 0, NAME, "the problem", "of at least one string", 0, "relax its constraints")
    tokens = torch.cat(found)
    lengths = torch.arange(longest + 1).repeat_interleave(as_int64([len(f) for f in found]))
    return tokens, lengths


def _choices(
    prefixes: Tensor, letters: Tensor, constraints: Constraints, grammar: Grammar | None
) -> tuple[Tensor, Tensor]:
    """(K,) bool, which of K prefixes of one length may stop; (K, A) bool, which letters may follow."""
    num, length = prefixes.shape
    if length == constraints.max_length:
        return torch.ones(num, dtype=torch.bool), torch.zeros(num, len(letters), dtype=torch.bool)
    late = length >= constraints.min_length
    if grammar is None:
        return torch.full((num,), late), torch.ones(num, len(letters), dtype=torch.bool)
    stops = list(constraints.termination_token_ids)
    allowed = [grammar.allowed(some.tolist()).cpu() for some in prefixes.split(PREFIXES)]
    may_stop = torch.cat([a[:, stops].any(1) for a in allowed]) & late
    return may_stop, torch.cat([a[:, letters] for a in allowed])


def _posterior(
    prompt: list[int],
    sequences: list[list[int]],
    raw: Tensor,
    tree: TokenTree,
    parts: tuple[TreePart, ...],
    reward_temperature: float,
) -> Posterior:
    log_reward = raw / reward_temperature
    ends = torch.full((tree.num_nodes,), -torch.inf, dtype=torch.float64)
    ends[tree.leaf.cpu()] = log_reward
    log_flow = _subtree_logsumexp(ends, tree.parent.cpu().long(), tree.position.cpu())
    log_z = float(log_flow[0])
    return Posterior(
        prompt=prompt,
        sequences=sequences,
        reward_temperature=reward_temperature,
        raw_log_reward=raw,
        log_reward=log_reward,
        log_target=log_reward - log_z,
        log_z=log_z,
        log_flow=log_flow,
        log_stop=ends - log_flow,
        tree=tree,
        parts=parts,
    )


def _subtree_logsumexp(values: Tensor, parent: Tensor, depth: Tensor) -> Tensor:
    """log of the sum of exp(values) over each node and its descendants, from the deepest nodes up. A running
    sum of exponentials would lose the subtrees whose mass is small."""
    flow = values.clone()
    for level in range(int(depth.max()), 0, -1):
        nodes = (depth == level).nonzero()[:, 0]
        above = parent[nodes]
        top = flow.scatter_reduce(0, above, flow[nodes], "amax")
        total = (flow - top).exp().index_add(0, above, (flow[nodes] - top[above]).exp())
        parents = above.unique()
        flow[parents] = (top + total.log())[parents]
    return flow


@torch.no_grad()
def node_log_probs(posterior: Posterior, policy: Policy) -> LogProbs:
    """Exact log q on the nodes of `posterior.tree`, on the CPU: log_pf (T,) and log_pterm (T,) float64, as of
    `score`."""
    shape = dict(size=(posterior.tree.num_nodes,), dtype=torch.float64)
    log_pf, log_pterm = torch.zeros(**shape), torch.zeros(**shape)
    for part in posterior.parts:
        log_probs, nodes = score(part.tree, policy=policy), part.nodes.cpu()
        log_pf[nodes] = log_probs.log_pf.double().cpu()
        log_pterm[nodes] = log_probs.log_pterm.double().cpu()
    return LogProbs(log_pf=log_pf, log_pterm=log_pterm)


def log_probs(posterior: Posterior, policy: Policy) -> Tensor:
    """(S,) float64, exact log q of every string, the stop included."""
    return _of_strings(node_log_probs(posterior, policy), posterior)


def _of_strings(log_probs: LogProbs, posterior: Posterior) -> Tensor:
    paths = tree_cumsum(log_probs.log_pf, posterior.tree.parent.cpu()) + log_probs.log_pterm
    return paths[posterior.tree.leaf.cpu()]


def log_flow_at_start(posterior: Posterior, log_q: Tensor, log_pterm: Tensor) -> float:
    """log F(s_0) that the policy implies. Where s_0 may stop, log R(s_0 stop) / T - log q(stop | s_0). Where
    it may not, the mean of log R / T - log q over the policy's own strings: log Z - KL(q || target), which is
    what the anchor of modified SubTB estimates from a batch of q."""
    first = len(posterior.prompt) - 1
    if posterior.log_stop[first] > -torch.inf:
        return float(posterior.log_stop[first]) + posterior.log_z - float(log_pterm[first])
    q = log_q.exp()
    return float((q * (posterior.log_reward - log_q)).sum() / q.sum())


def evaluate_exactly(posterior: Posterior, policy: Policy) -> dict[str, float]:
    """Exact distances between a policy and its target; one forward, nothing is sampled.

    tv, kl_target_to_model, kl_model_to_target: over the strings and one cell for everything else, of which
        the target has none. Up to ROUNDING the mass there is rounding, beyond it the second KL is infinite.
    invalid_mass: that cell, 1 - the sum of q.
    log_f, log_z_error: log F(s_0) as of `log_flow_at_start`, and |log F(s_0) - log Z|.
    mode_coverage: of the fewest strings that hold MODE_MASS of the target, and those as probable as the last
        of them, the share to which q gives at least half their probability.
    termination_drift: mean over the target's strings of log q(stop) - log target(stop); below 0 the policy
        goes on where it should stop.
    early_stop_drift: the same mean over the prefixes that the target's strings pass and that may stop; above
        0 the policy stops too early. 0 where there are none.
    mean_length, target_mean_length: tokens of Z.
    """
    nodes = node_log_probs(posterior, policy)
    log_q, log_p = _of_strings(nodes, posterior), posterior.log_target
    q, p = log_q.exp(), log_p.exp()
    invalid = max(0.0, 1.0 - float(q.sum()))
    beyond = torch.inf if invalid > ROUNDING else 0.0
    log_f = log_flow_at_start(posterior, log_q, nodes.log_pterm)
    order = log_p.argsort(descending=True)
    last = order[int((p[order].cumsum(0) < MODE_MASS * p.sum()).sum())]
    # all that are as probable as the last, or it would be up to their order which of them count
    modes = log_p >= log_p[last] - TIE
    leaf = posterior.tree.leaf.cpu()
    drift = nodes.log_pterm - posterior.log_stop
    # the probability that a string of the target passes each prefix and goes on there
    passing = (posterior.log_flow - posterior.log_z).exp() * -torch.expm1(posterior.log_stop.clamp(max=0.0))
    passing = torch.zeros_like(passing).index_copy(0, leaf, passing[leaf])
    lengths = posterior.tree.length.cpu()[leaf].double()
    return {
        "tv": 0.5 * (float((q - p).abs().sum()) + invalid),
        "kl_target_to_model": float((p * (log_p - log_q)).sum()),
        "kl_model_to_target": float((q * (log_q - log_p)).sum()) + beyond,
        "invalid_mass": invalid,
        "log_f": log_f,
        "log_z": posterior.log_z,
        "log_z_error": abs(log_f - posterior.log_z),
        "mode_coverage": float((q[modes] >= 0.5 * p[modes]).double().mean()),
        "termination_drift": float((p * drift[leaf]).sum()),
        "early_stop_drift": float((passing[leaf] * drift[leaf]).sum() / passing.sum().clamp(min=1e-300)),
        "mean_length": float((q * lengths).sum() / q.sum()),
        "target_mean_length": float((p * lengths).sum()),
    }
