"""The running batch: refilling, sharing, memory; and the options of the behaviour policy."""

from itertools import product

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.functional.sampling import kept
from fastgfn.ops.scan import tree_cumsum
from fastgfn.ops.tree import path_nodes
from fastgfn.packing import pack
from fastgfn.rewards import LMReward
from fastgfn.rollout import SamplingOptions, engine, sample, sampling
from fastgfn.rollout.nodes import NodePool, PrefixTree
from fastgfn.scoring import score
from fastgfn.testing import assert_fits
from fastgfn.types import Constraints

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 4, 6], [1]]


def rows(rollouts):
    return list(zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True))


@pytest.fixture
def engines(monkeypatch):
    """The engines that `sample` makes, in order."""
    made = []

    class Kept(engine.Engine):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(sampling, "Engine", Kept)
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 30])
def test_draws_and_log_probs_do_not_depend_on_the_batch_size(tiny_policy, engines, batch_size):
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=6), num_samples=6, seed=4)
    want = sample(PROMPTS, **options)
    got = sample(PROMPTS, batch_size=batch_size, **options)
    assert rows(got) == rows(want) and len(set(rows(want))) > 10
    for name in ("log_behavior", "log_pf", "log_pterm", "terminated"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=0, atol=1e-5, equal_nan=True, msg=name
        )
    for one in engines:
        assert one.pool.num_taken == 0 and not one.resident
        assert bool((one.pool.holds == 0).all())


def test_every_distinct_prefix_is_computed_once(tiny_policy, seen_tokens):
    """Prompts that are equal or begin alike, and samples that do, share rows."""
    policy, constraints = tiny_policy(), Constraints(0, max_length=6)
    del seen_tokens[:]
    rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=8, seed=4)
    assert seen_tokens[0] == 7  # 1, 2, 3; 4, 6 below 1, 2; 4, 5
    prefixes = {
        (tuple(PROMPTS[group]), sequence[:k])
        for group, sequence in rows(rollouts)
        for k in range(1, len(sequence) + 1)
        # after max_length tokens nothing is drawn any more
        if k < constraints.max_length
    }
    assert sum(seen_tokens[1:]) == len(prefixes)


def test_prompts_are_prefilled_in_parts(tiny_policy, seen_tokens, monkeypatch):
    policy, options = tiny_policy(), dict(constraints=Constraints(0, max_length=3), num_samples=2, seed=4)
    want = sample(PROMPTS, policy=policy, **options)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    del seen_tokens[:]
    assert rows(sample(PROMPTS, policy=policy, **options)) == rows(want)
    assert max(seen_tokens[:4]) <= 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_prompts_that_come_in_turns_find_room(tiny_policy, engines, batch_size):
    """More of them wait than the pool holds: the last of the queue is forgotten, and computed again."""
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 3, 5], [2, 4]] * 3
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=1), num_samples=1)
    want = sample(prompts, batch_size=15, **options)
    assert rows(sample(prompts, batch_size=batch_size, **options)) == rows(want)
    assert engines[-1].pool.num_taken == 0


@pytest.mark.parametrize("termination", ["forced", "own"])
@pytest.mark.parametrize("options", [None, SamplingOptions(top_k=3, epsilon=0.3)], ids=str)
def test_log_probs_step_by_step_are_those_of_the_score(tiny_policy, options, termination):
    policy = tiny_policy()
    bias = torch.where(torch.arange(13) < 9, 0.0, -99.0)
    constraints = Constraints(0, 2, 5, logit_bias=bias, termination=termination)
    rollouts = sample(
        PROMPTS, policy=policy, constraints=constraints, num_samples=6, temperature=1.5, options=options
    )
    assert rollouts.terminated.any() and not rollouts.terminated.all()
    tree = pack(rollouts)
    scored = score(tree, policy=policy)
    for n, length in enumerate(rollouts.lengths.tolist()):
        nodes = path_nodes(tree.parent, tree.leaf[n : n + 1], torch.tensor([length + 1]), length + 1)[0]
        if termination == "forced":
            torch.testing.assert_close(
                rollouts.log_pf[n, :length].double(), scored.log_pf[nodes[1:]], rtol=0, atol=1e-5
            )
            seen = slice(constraints.min_length, None)
            have = rollouts.log_pterm[n, : length + 1].double()
            torch.testing.assert_close(have[seen], scored.log_pterm[nodes][seen], rtol=0, atol=1e-5)
            assert bool((have[: constraints.min_length] == -torch.inf).all())
        assert bool(rollouts.log_pterm[n, length + 1 :].isnan().all())
        assert bool((rollouts.log_pf[n, length:] == 0).all())
        ended = length == constraints.max_length
        assert ended == (not rollouts.terminated[n])
        if termination == "own" and ended:
            assert bool(rollouts.log_pterm[n, length].isnan())


@pytest.mark.parametrize("min_length", [0, 2])
def test_several_termination_tokens(tiny_policy, min_length):
    """Sampled, scored and rewarded as one event, whose probability is the sum."""
    policy = tiny_policy()
    constraints = Constraints(0, min_length, 5, extra_termination_token_ids=(4, 7))
    rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=8, seed=2)
    assert not {0, 4, 7} & {t for z in rollouts.sequences() for t in z} and rollouts.terminated.any()
    tree = pack(rollouts)
    scored, reward = score(tree, policy=policy), LMReward(policy.reference)(tree)
    density = (tree_cumsum(scored.log_pf, tree.parent) + scored.log_pterm)[tree.leaf].detach()
    torch.testing.assert_close(rollouts.log_behavior.double(), density, rtol=0, atol=1e-4)
    with policy.plain() as model, model.disable_adapter(), torch.no_grad():
        for n, (group, z) in enumerate(rows(rollouts)):
            prompt = PROMPTS[group]
            log_p = model(torch.tensor([[*prompt, *z]]), use_cache=False).logits[0].double().log_softmax(-1)
            want = sum(float(log_p[len(prompt) - 1 + k, t]) for k, t in enumerate(z))
            want += float(log_p[-1, [0, 4, 7]].logsumexp(0))
            assert float(reward[tree.leaf[n]]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("ids", [(0,), (3, 3), (-1,)])
def test_termination_tokens_are_distinct(ids):
    with pytest.raises(InputError, match="extra_termination_token_ids must be distinct ids >= 0 without 0"):
        Constraints(0, extra_termination_token_ids=ids)


def test_given_prefixes(tiny_policy):
    policy, constraints = tiny_policy(), Constraints(0, min_length=1, max_length=5)
    prefixes = [[], [3], [3, 4], [5, 6, 7, 8, 9], [2, 2, 2]]
    options = SamplingOptions(prefixes=prefixes)
    rollouts = sample([[1, 2]], policy=policy, constraints=constraints, num_samples=5, options=options)
    tree = pack(rollouts)
    scored = score(tree, policy=policy)
    for n, (prefix, sequence) in enumerate(zip(prefixes, rollouts.sequences(), strict=True)):
        assert sequence[: len(prefix)] == prefix
        nodes = path_nodes(tree.parent, tree.leaf[n : n + 1], torch.tensor([len(sequence) + 1]), 6)[0]
        log_pf = scored.log_pf[nodes[1 : len(sequence) + 1]].detach()
        torch.testing.assert_close(rollouts.log_pf[n, : len(sequence)].double(), log_pf, rtol=0, atol=1e-5)
        drawn = log_pf[len(prefix) :].sum() + scored.log_pterm[nodes[len(sequence)]].detach()
        assert float(rollouts.log_behavior[n]) == pytest.approx(float(drawn), abs=1e-5)
    assert rollouts.sequences()[3] == prefixes[3] and not rollouts.terminated[3]


BEHAVIORS = {
    "plain": {},
    "tempered": dict(temperature=1.7),
    "top_k": dict(top_k=2),
    "top_p": dict(top_p=0.7, temperature=0.8),
    "min_p": dict(min_p=0.3),
    "epsilon": dict(epsilon=0.4, temperature=0.5),
    "epsilon_masked": dict(epsilon=0.4, masked=3),
    "uniform": dict(epsilon=1.0),
    "two_stops": dict(stops=(3,), temperature=1.4),
    "everything": dict(top_k=3, top_p=0.9, min_p=0.05, epsilon=0.2, temperature=2.0),
}


def exact_behavior(policy, prompt, constraints, temperature, options):
    """Log-density of every sequence, by one plain forward per prefix and the definition of the options."""
    vocab, stops = policy.vocab_size, list(constraints.termination_token_ids)
    bias = torch.zeros(vocab) if constraints.logit_bias is None else constraints.logit_bias
    with policy.plain() as model, torch.no_grad():

        def step(prefix):
            logits = model(torch.tensor([prompt + prefix]), use_cache=False).logits[0, -1].double() + bias
            allowed = bias > -30
            if len(prefix) < constraints.min_length:
                logits[stops], allowed = (
                    -torch.inf,
                    allowed.clone().index_fill_(0, torch.tensor(stops), False),
                )
            z = logits / temperature
            left = kept(z[None], *options.filters.values())[0]
            p = z.masked_fill(~left, -torch.inf).softmax(0)
            return (1 - options.epsilon) * p + options.epsilon * allowed / allowed.sum()

        found, front = {}, {(): 1.0}
        for _ in range(constraints.max_length):
            grown = {}
            for prefix, mass in front.items():
                p = step(list(prefix))
                found[prefix] = mass * float(p[stops].sum())
                grown |= {(*prefix, t): mass * float(p[t]) for t in range(vocab) if t not in stops}
            front = grown
    return found | front


@pytest.mark.parametrize("name", BEHAVIORS)
def test_samples_follow_the_exact_behavior(tiny_policy, name):
    """Chi-squared over all sequences at 100,000 draws; 10 tests at 1e-4 keep the family at 1e-3."""
    settings = dict(BEHAVIORS[name])
    temperature, masked = settings.pop("temperature", 1.0), settings.pop("masked", None)
    stops = settings.pop("stops", ())
    bias = None if masked is None else torch.zeros(5).index_fill_(0, torch.tensor([masked]), -99.0)
    policy, constraints = tiny_policy(vocab=5), Constraints(0, 1, 3, "forced", bias, stops)
    options = SamplingOptions(**settings)
    expected = exact_behavior(policy, [1, 2], constraints, temperature, options)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    draws = 100_000
    rollouts = sample(
        [[1, 2]], policy=policy, constraints=constraints, num_samples=draws, temperature=temperature,
        options=options, seed=5, batch_size=30_000,
    )  # fmt: skip
    space = [z for k in range(4) for z in product(range(1, 5), repeat=k)]
    place = {z: i for i, z in enumerate(space)}
    sequences = [tuple(z) for z in rollouts.sequences()]
    counts = torch.bincount(torch.tensor([place[z] for z in sequences]), minlength=len(space))
    p = torch.tensor([expected.get(z, 0.0) for z in space], dtype=torch.float64)
    assert_fits(counts, p, level=1e-4)
    log_p = torch.tensor([expected[z] for z in sequences[:500]]).log()
    torch.testing.assert_close(rollouts.log_behavior[:500], log_p.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epsilon=1.5), r"SamplingOptions: epsilon must be in \[0, 1\], got 1.5"),
        (dict(top_k=0), "SamplingOptions: top_k must be >= 1 or None, got 0"),
        (dict(top_p=0.0), r"SamplingOptions: top_p must be in \(0, 1\] or None"),
        (dict(min_p=2.0), r"SamplingOptions: min_p must be in \[0, 1\] or None"),
        (dict(prefixes=[[1]]), "sample: prefixes must be 2 lists, got 1"),
        (dict(prefixes=[[], [0]]), r"prefixes\[1\] must be at most 6 ids in .* without \[0\], got \[0\]"),
        (dict(prefixes=[[1] * 7, []]), r"prefixes\[0\] must be at most 6 ids"),
    ],
)
def test_refuses_bad_options(tiny_policy, options, message):
    with pytest.raises(InputError, match=message):
        given = SamplingOptions(**options)
        policy, constraints = tiny_policy(), Constraints(0, max_length=6)
        sample([[1]], policy=policy, constraints=constraints, num_samples=2, options=given)


def test_a_batch_size_below_one_is_refused(tiny_policy):
    with pytest.raises(InputError, match="sample: batch_size must be >= 1 or None, got 0"):
        sample([[1]], policy=tiny_policy(), constraints=Constraints(0), num_samples=2, batch_size=0)


def test_prefix_tree_lists_every_prefix_once():
    sequences = [[3, 1], [3], [3, 1, 2], [5], [3, 2], [3, 1]]
    tree = PrefixTree(sequences)
    assert len(tree.tokens) == len({tuple(s[:k]) for s in sequences for k in range(1, len(s) + 1)})
    for sequence, path in zip(sequences, tree.path, strict=True):
        assert tree.tokens[path].tolist() == sequence
        assert tree.position[path].tolist() == list(range(len(sequence)))
        assert tree.parent[path].tolist() == [-1, *path[:-1]]
    for i in range(len(tree.tokens)):
        below = {n for path in tree.path if i in path for n in path[path.index(i) :]}
        assert below == set(range(i, int(tree.end[i])))


def test_nodes_are_free_when_nothing_holds_them():
    pool = NodePool(6)
    root, child, other = pool.take(1), pool.take(1), pool.take(1)
    pool.link(child, root)
    pool.link(other, root)
    pool.release(root)
    assert pool.num_taken == 3
    pool.hold(other)
    pool.release(torch.cat([child, other]))
    assert pool.num_taken == 2
    again = pool.take(4)
    assert set(again.tolist()).isdisjoint([int(root), int(other)]) and pool.num_taken == 6
    with pytest.raises(InputError, match="free nodes must be >= 1, got 0; lower batch_size"):
        pool.take(1)
    pool.release(torch.cat([other, again]))
    assert pool.num_taken == 0
