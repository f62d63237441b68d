"""Trees with random log-probs, and every objective on them in its tree and its padded form."""

import torch

from fastgfn import functional as F
from fastgfn import objectives
from fastgfn.packing import pack
from fastgfn.types import Constraints, LogProbs, Rollouts

PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3], [7]]
# duplicates, shared prefixes, all lengths, two equal prompts, a prompt with a single sequence, an order that
# is no involution of that of the leaves
SEQUENCES = [
    [6, 7, 8], [6, 7, 8], [6], [6, 7, 9, 1, 2], [5], [5, 5, 5, 5, 5], [2, 1], [2], [2, 1, 4], [2], [8],
]  # fmt: skip
GROUP = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
MAX_LENGTH = 5


def make_tree(sequences=SEQUENCES, group=GROUP, is_action=None, **limits):
    tokens = torch.zeros(len(sequences), MAX_LENGTH, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    constraints = Constraints(0, **({"max_length": MAX_LENGTH} | limits))
    lengths = torch.tensor([len(s) for s in sequences])
    prompts, zeros = tuple(torch.tensor(p) for p in PROMPTS), torch.zeros(len(sequences))
    return pack(
        Rollouts(prompts, torch.tensor(group), tokens, lengths, zeros, constraints, is_action=is_action)
    )


def tool_tree():
    """Some tokens are what a tool answered: their parents are no states."""
    is_action = torch.zeros(len(SEQUENCES), MAX_LENGTH, dtype=torch.bool)
    for row, s in zip(is_action, SEQUENCES, strict=True):
        row[: len(s)] = torch.tensor([t not in (7, 1) for t in s])
    return make_tree(is_action=is_action)


def random_values(tree, seed=0):
    """(LogProbs of leaves that require a gradient, log R, log_z, prior), float64, as `score` would be."""
    generator = torch.Generator().manual_seed(seed)

    def draw(where):
        values = torch.randn(tree.num_nodes, generator=generator, dtype=torch.float64)
        return (values * where).requires_grad_()

    action = tree.role == 1
    log_probs = LogProbs(draw(action), draw(tree.terminable), log_flow=draw(tree.is_state))
    prior = LogProbs(draw(action).detach(), draw(tree.terminable).detach())
    log_z = torch.randn(tree.num_groups, generator=generator, dtype=torch.float64).requires_grad_()
    return log_probs, draw(tree.terminable).detach(), log_z, prior


def paths(tree):
    """Nodes from s_0 to the leaf of every trajectory."""
    above, first = tree.parent.tolist(), tree.is_root_state.tolist()
    found = []
    for leaf in tree.leaf.tolist():
        path = [leaf]
        while not first[path[0]]:
            path.insert(0, above[path[0]])
        found.append(path)
    return found


def rows(tree, values, width=MAX_LENGTH + 1):
    """(N, width) values along the paths, 0 past their ends."""
    padding = values.new_zeros(1)
    return torch.stack(
        [
            torch.cat([values[p], padding.expand(width - len(p))])
            for p in (torch.tensor(p) for p in paths(tree))
        ]
    )


def with_stop(tree, log_pf, log_pterm, at=None):
    """(N, L + 1) transitions, the stop last; it is a part of transition `at` (N,)."""
    steps = torch.cat([rows(tree, log_pf)[:, 1:], log_pf.new_zeros(len(tree.leaf), 1)], 1)
    stops = torch.nn.functional.one_hot(tree.length[tree.leaf].long() if at is None else at, MAX_LENGTH + 1)
    return steps + stops * log_pterm[tree.leaf][:, None]


def padded_loss(name, tree, log_probs, log_reward, log_z, prior, **options):
    """The objective in its padded form; options are those of the padded functions."""
    pf, pterm = log_probs.log_pf, log_probs.log_pterm
    lengths = tree.length[tree.leaf].long()
    of_row = tree.group[tree.leaf].long()
    value = None if log_z is None else log_z[of_row]
    whole = with_stop(tree, pf, pterm), log_reward[tree.leaf], lengths + 1
    states = rows(tree, pf)[:, 1:], rows(tree, pterm), rows(tree, log_reward), lengths
    may_stop = rows(tree, tree.terminable.double()) > 0
    if name == "tb":
        return F.trajectory_balance_loss(*whole, log_z=value, **options)
    if name == "vargrad":
        return F.vargrad_loss(*whole, **({"group_ids": of_row} | options))
    base = None if prior is None else with_stop(tree, prior.log_pf, prior.log_pterm)
    if name == "rtb":
        return F.relative_trajectory_balance_loss(whole[0], base, *whole[1:], log_z=value, **options)
    if name == "length_normalized_tb":
        return F.trajectory_balance_loss(
            *whole, log_z=value, log_prior=base, length_normalize=True, **options
        )
    if name in ("subtb", "db"):
        # where stopping is certain, the state that stops and the end are one
        end = lengths + 1 - (tree.must_stop[tree.leaf] & (lengths > 0)).long()
        sinks = torch.nn.functional.one_hot(end, MAX_LENGTH + 2)
        flows = torch.cat([rows(tree, log_probs.log_flow), pf.new_zeros(len(lengths), 1)], 1)
        flows = flows * (1 - sinks) + sinks * log_reward[tree.leaf][:, None]
        loss = F.subtb_loss if name == "subtb" else F.detailed_balance_loss
        return loss(with_stop(tree, pf, pterm, end - 1), flows, end, **options)
    loss = {
        "modified_subtb": F.modified_subtb_loss,
        "modified_db": F.modified_detailed_balance_loss,
        "rooted_prefix_tb": F.rooted_prefix_tb_loss,
        "interpolated_subtb": F.interpolated_subtb_loss,
    }[name]
    return loss(*states, log_z=value, terminable=may_stop, **options)


def tree_loss(name, tree, log_probs, log_reward, log_z, prior, **options):
    """The objective in its tree form, as an Objective."""
    spec = objectives.REGISTRY[name]
    if spec.reads_prior:
        options["prior"] = prior
    if not spec.reads_flow:
        options["log_z"] = log_z
    return spec.loss(log_probs, tree=tree, log_reward=log_reward, **options)
