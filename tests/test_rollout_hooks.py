"""Grammars, tools and drafts."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack
from fastgfn.passes import score_and_reward
from fastgfn.rewards import LMReward
from fastgfn.rollout import DraftRequest, Drafts, PromptLookup, SamplingOptions, sample
from fastgfn.rollout.nodes import NodePool
from fastgfn.scoring import score
from fastgfn.testing import assert_fits
from fastgfn.types import Constraints, Role

PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3, 1, 2]]


def rows(rollouts):
    return list(zip(rollouts.group.tolist(), map(tuple, rollouts.sequences()), strict=True))


def log_probs(policy, ids, start, bias=0.0):
    """(len(ids) - start + 1, V) log-probs of what follows ids[:start], ids[:start + 1], ... in one pass."""
    ids = torch.tensor(ids)
    size = len(ids)
    hidden = policy.tree_hidden(ids, torch.arange(size), torch.full((size,), size, dtype=torch.int32))
    return (hidden[start - 1 :] @ policy.head.weight.T + bias).log_softmax(-1).detach()


class EvenThenOdd:
    """An even token first, then odd ones; it stops only after an odd one. 0 is the termination token."""

    def __init__(self, vocab):
        self.vocab = vocab

    def allowed(self, sequences):
        tokens = torch.arange(self.vocab)
        out = torch.zeros(len(sequences), self.vocab, dtype=torch.bool)
        for row, z in zip(out, sequences, strict=True):
            row[(tokens % 2 == (len(z) > 0)) & (tokens > 0)] = True
            row[0] = len(z) > 1
        return out


@pytest.mark.parametrize("settings", [{}, dict(epsilon=0.5), dict(top_k=2, prefixes=True)], ids=str)
def test_a_grammar_bounds_the_draws_and_renormalises_the_log_probs(tiny_policy, settings):
    policy, constraints = tiny_policy(vocab=9), Constraints(0, max_length=4)
    if "prefixes" in settings:
        settings = settings | {"prefixes": [[2]] * 3 + [[]] * 3 + [[4, 3]] * 6}
    grammar = EvenThenOdd(9)
    rollouts = sample(
        PROMPTS[:2], policy=policy, constraints=constraints, num_samples=6, grammar=grammar,
        options=SamplingOptions(**settings),
    )  # fmt: skip
    for n, (group, z) in enumerate(rows(rollouts)):
        assert z[0] % 2 == 0 and all(t % 2 == 1 for t in z[1:]) and len(z) > 1
        want = log_probs(policy, PROMPTS[group] + list(z), len(PROMPTS[group]))
        for k in range(len(z) + (len(z) < 4)):
            mask = grammar.allowed([z[:k]])[0]
            masked = want[k].masked_fill(~mask, -torch.inf).log_softmax(-1)
            assert float(rollouts.log_pterm[n, k]) == pytest.approx(float(masked[0]), abs=1e-5)
            if k < len(z):
                assert float(rollouts.log_pf[n, k]) == pytest.approx(float(masked[z[k]]), abs=1e-5)


def test_grammar_draws_follow_the_masked_distribution(tiny_policy):
    policy, constraints, grammar = tiny_policy(vocab=5), Constraints(0, max_length=3), EvenThenOdd(5)
    draws = 100_000
    rollouts = sample(
        [[1, 2]], policy=policy, constraints=constraints, num_samples=draws, grammar=grammar,
        batch_size=draws, seed=2,
    )  # fmt: skip
    space = [z for k in range(4) for z in product(range(1, 5), repeat=k)]
    p = []
    for z in space:
        steps, total = log_probs(policy, [1, 2, *z], 2), 1.0
        for k, token in enumerate([*z, 0][:3]):
            mask = grammar.allowed([z[:k]])[0]
            total *= float(steps[k].masked_fill(~mask, -torch.inf).softmax(-1)[token])
        p.append(total)
    assert sum(p) == pytest.approx(1.0, abs=1e-6)
    place = {z: i for i, z in enumerate(space)}
    drawn = torch.tensor([place[z] for _, z in rows(rollouts)])
    assert_fits(torch.bincount(drawn, minlength=len(space)), torch.tensor(p))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda n: torch.zeros(n, 13, dtype=torch.bool), "grammar mask must be True somewhere in every row"),
        (lambda n: torch.ones(n, 12, dtype=torch.bool), r"grammar mask must be \(2, 13\), got \(2, 12\)"),
    ],
)
def test_a_wrong_grammar_is_refused(tiny_policy, mask, message):
    class Wrong:
        def allowed(self, sequences):
            return mask(len(sequences))

    with pytest.raises(InputError, match=message):
        sample([[1]], policy=tiny_policy(), constraints=Constraints(0), num_samples=2, grammar=Wrong())


class Calculator:
    """Answers every 5 with 7 7 7, of trajectories with an even number only."""

    def __init__(self):
        self.calls = []

    def __call__(self, trajectory, sequence):
        self.calls.append((trajectory, tuple(sequence)))
        return [7, 7, 7] if sequence[-1] == 5 and trajectory % 2 == 0 else None


@pytest.mark.parametrize("batch_size", [None, 3])
def test_tool_output_is_appended_and_is_no_action(tiny_policy, batch_size):
    policy, tool = tiny_policy(), Calculator()
    bias = torch.zeros(13).index_fill_(0, torch.tensor([5]), 4.0)
    bias[7] = -99.0
    constraints = Constraints(0, max_length=9, logit_bias=bias)
    rollouts = sample(
        PROMPTS, policy=policy, constraints=constraints, num_samples=10, tool=tool, batch_size=batch_size
    )
    answered = 0
    for n, (group, z) in enumerate(rows(rollouts)):
        want = log_probs(policy, PROMPTS[group] + list(z), len(PROMPTS[group]), bias)
        density, k = 0.0, 0
        while k < len(z):
            assert bool(rollouts.is_action[n, k])
            assert float(rollouts.log_pf[n, k]) == pytest.approx(float(want[k, z[k]]), abs=1e-5)
            density += float(want[k, z[k]])
            k += 1
            if n % 2 == 0 and z[k - 1] == 5:
                seen = z[k : k + 3]
                assert seen == (7, 7, 7)[: len(seen)] and len(seen) == min(3, 9 - k)
                assert not rollouts.is_action[n, k : k + 3].any()
                assert bool((rollouts.log_pf[n, k : k + 3] == 0).all())
                assert bool(rollouts.log_pterm[n, k : k + len(seen)].isnan().all())
                answered += 1
                k += len(seen)
        assert not rollouts.is_action[n, len(z) :].any()
        if rollouts.terminated[n]:
            density += float(want[len(z), 0])
        assert float(rollouts.log_behavior[n]) == pytest.approx(density, abs=1e-4)
    assert answered > 5
    assert tool.calls and all(sequence[-1] != 7 for _, sequence in tool.calls)


def test_the_score_of_tool_rollouts_is_that_of_their_actions(tiny_policy):
    policy, tool = tiny_policy(), Calculator()
    bias = torch.zeros(13).index_fill_(0, torch.tensor([5]), 4.0)
    constraints = Constraints(0, max_length=9, logit_bias=bias)
    rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=10, tool=tool)
    tree = pack(rollouts)
    log_pf = score(tree, policy=policy).log_pf
    assert bool((tree.role == Role.OBSERVATION).any())
    total = tree_cumsum(log_pf, tree.parent)[tree.leaf]
    torch.testing.assert_close(total.detach().float(), rollouts.log_pf.sum(1), rtol=0, atol=1e-4)


def test_rollouts_that_stop_after_tool_output_are_scored_there(tiny_policy):
    """The whole density: of the actions, and of stopping wherever a trajectory ends."""
    policy, bias = tiny_policy(), torch.zeros(13)
    bias[[0, 5]] = 3.0
    constraints = Constraints(0, max_length=9, logit_bias=bias)
    rollouts = sample(
        PROMPTS,
        policy=policy,
        constraints=constraints,
        num_samples=30,
        tool=lambda i, z: [7, 7] if z[-1] == 5 else None,
    )
    tree = pack(rollouts)
    ends_in_answer = (tree.role[tree.leaf] == Role.OBSERVATION) & rollouts.terminated
    assert int(ends_in_answer.sum()) > 5 and bool(tree.terminable[tree.leaf].all())
    scored, reward = score_and_reward(tree, policy=policy, reward=LMReward(policy.reference))
    density = (tree_cumsum(scored.log_pf, tree.parent) + scored.log_pterm)[tree.leaf].detach()
    torch.testing.assert_close(rollouts.log_behavior, density.float(), rtol=0, atol=1e-4)
    assert bool((reward[tree.leaf] < 0).all())


def test_given_prefixes_go_on_after_tool_output(tiny_policy):
    rollouts = sample(
        [[1]], policy=tiny_policy(), constraints=Constraints(0, max_length=9), num_samples=2,
        tool=lambda i, z: [9, 9] if z[-1] == 5 else None, options=SamplingOptions(prefixes=[[5, 6, 7]] * 2),
    )  # fmt: skip
    assert all(z[:5] == [5, 9, 9, 6, 7] for z in rollouts.sequences())


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ([13], InputError, r"tool output must be ids in \[0, 13\) without \[0\], got \[13\]"),
        ([-1], InputError, r"tool output must be ids in"),
        (["a"], TypeError, r"tool output must be token ids, got \['a'\]; return a list of token ids"),
        ([1.5], TypeError, "tool output must be token ids"),
        (7, TypeError, "tool output must be token ids, got 7"),
    ],
)
def test_what_is_no_tool_output_is_refused(tiny_policy, output, kind, message):
    with pytest.raises(kind, match=message):
        sample(
            [[1], [2]],
            policy=tiny_policy(),
            constraints=Constraints(0),
            num_samples=4,
            tool=lambda i, z: output,
        )


def test_a_tensor_is_tool_output(tiny_policy):
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=6), num_samples=4)
    drawn = [
        sample([[1]], tool=tool, **options).sequences()
        for tool in (lambda i, z: [7], lambda i, z: torch.tensor([7]))
    ]
    assert drawn[0] == drawn[1]


def test_trajectories_that_a_tool_parts_keep_their_own_text(tiny_policy):
    """Without the tool the even and odd trajectories of one seed share their prefixes."""
    options = dict(policy=tiny_policy(), constraints=Constraints(0, max_length=6), num_samples=20, seed=3)
    with_tool = sample([[1, 2]], tool=Calculator(), **options).sequences()
    without = sample([[1, 2]], **options).sequences()
    assert [z for i, z in enumerate(with_tool) if i % 2] == [z for i, z in enumerate(without) if i % 2]


def test_tool_output_with_the_termination_token_is_refused(tiny_policy):
    with pytest.raises(
        InputError, match=r"tool output must be ids in \[0, 13\) without \[0\], got \[3, 0\]; use"
    ):
        sample(
            [[1]], policy=tiny_policy(), constraints=Constraints(0), num_samples=4, tool=lambda i, z: [3, 0]
        )


class Oracle:
    """Drafts the right tokens of one batch of rollouts, or (wrong) always another."""

    node_bytes = 0

    def __init__(self, rollouts, wrong=False):
        self.known = {}
        self.wrong = wrong
        for group, z in rows(rollouts):
            for k in range(1, len(z)):
                self.known.setdefault((tuple(PROMPTS[group]), z[:k]), z[k:])

    def begin(self, *batch):
        return self

    def propose(self, request):
        found = []
        for prefix, count in zip(request.prefixes, request.count.tolist(), strict=True):
            for prompt in PROMPTS:
                key = (tuple(prompt), tuple(prefix[len(prompt) :]))
                if key in self.known and list(prompt) == prefix[: len(prompt)]:
                    draft = list(self.known[key])[:count]
                    break
            else:
                draft = []
            found.append([1 + t % 12 for t in draft] if self.wrong else draft)
        return found


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("batch_size", [None, 4, 2, 1])
@pytest.mark.parametrize("kind", ["right", "wrong", "lookup"])
def test_drafts_change_nothing_but_the_passes(tiny_policy, monkeypatch, kind, batch_size, length):
    from fastgfn.models import Policy

    options = dict(policy=tiny_policy(), constraints=Constraints(0, 1, 7), num_samples=5, seed=6)
    passes, hidden = [], Policy.hidden
    monkeypatch.setattr(Policy, "hidden", lambda self, *args: passes.append(1) or hidden(self, *args))
    want = sample(PROMPTS, batch_size=batch_size, **options)
    without = len(passes)
    sources = {"right": Oracle(want), "wrong": Oracle(want, wrong=True), "lookup": PromptLookup(2)}
    drafts = Drafts(sources[kind], length)
    del passes[:]
    got = sample(PROMPTS, drafts=drafts, batch_size=batch_size, **options)
    assert rows(got) == rows(want)
    for name in ("log_behavior", "log_pf", "log_pterm"):
        have, true = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(have, true, rtol=0, atol=1e-5, equal_nan=True)
    assert len(passes) <= without and 0 <= drafts.accepted <= drafts.offered
    if kind == "right":
        assert drafts.acceptance > 0.5 and (length == 1 or len(passes) < without)
    if kind == "wrong":
        assert drafts.offered > 0 and drafts.accepted < drafts.offered / 2


def test_drafts_work_beside_grammars_tools_and_prefixes(tiny_policy):
    options = dict(
        policy=tiny_policy(vocab=9), constraints=Constraints(0, max_length=7), num_samples=6, seed=6,
        options=SamplingOptions(prefixes=[[2, 1]] * 9 + [[]] * 9),
    )  # fmt: skip
    extra = dict(grammar=EvenThenOdd(9), tool=lambda i, z: [3, 4, 3] if z[-1] == 3 and i % 3 == 0 else None)
    want = sample(PROMPTS, **extra, **options)
    got = sample(PROMPTS, drafts=Drafts(Oracle(want), 3), **extra, **options)
    assert rows(got) == rows(want) and torch.equal(got.is_action, want.is_action)


def request_of(texts, counts):
    """What the engine asks for after these texts."""
    pool, width = NodePool(99), max(map(len, texts))
    path = torch.zeros(len(texts), width, dtype=torch.int32)
    for row, text in zip(path, texts, strict=True):
        nodes = pool.take(len(text))
        pool.token[nodes], row[: len(text)] = torch.tensor(text), nodes.int()
    zeros = torch.zeros(len(texts), dtype=torch.int64)
    length = torch.tensor([len(text) for text in texts])
    return DraftRequest(pool, path, length, torch.tensor(counts), zeros, zeros, zeros + 1.0)


def test_prompt_lookup():
    source = PromptLookup(2)
    texts = [[5, 1, 2, 3, 4, 1, 2], [1, 2, 9, 2], [1], [7, 8], [3, 3, 3]]
    request = request_of(texts, [3, 3, 3, 3, 2])
    assert request.prefixes == texts
    assert source.propose(request) == [[3, 4, 1], [9, 2], [], [], [3]]
    drafts = Drafts(source)
    assert drafts.propose(source, request_of(texts, [2, 0, 3, 3, 2]), 10, [4]) == [[3], [], [], [], [3]]
    assert drafts.offered == 2


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (lambda r: [], "drafts must be 2 lists, got 0"),
        (lambda r: [[1] * 9] * 2, r"drafts\[0\] must be at most 4 ids in \[0, 13\)"),
        (lambda r: [[], [13]], r"drafts\[1\] must be at most 4 ids in \[0, 13\), got \[13\]"),
    ],
)
def test_wrong_drafts_are_refused(propose, message):
    drafter = SimpleNamespace(propose=propose)
    with pytest.raises(InputError, match=message):
        Drafts(PromptLookup()).propose(drafter, request_of([[1], [2]], [4, 4]), 13, [0])


def test_what_is_no_source_of_drafts_is_refused(tiny_policy):
    with pytest.raises(InputError, match="Drafts: source must be a DraftSource, got Policy; pass"):
        Drafts(tiny_policy())
    # its memory could not be told
    with pytest.raises(InputError, match="Drafts: source must be a DraftSource, got SimpleNamespace; pass"):
        Drafts(SimpleNamespace(begin=lambda *batch: None))


@pytest.mark.parametrize("make", [lambda: PromptLookup(0), lambda: Drafts(PromptLookup(), 0)])
def test_nothing_to_look_at_is_refused(make):
    with pytest.raises(InputError, match="must be >= 1, got 0"):
        make()


def test_the_log_probs_above_are_those_of_transformers(tiny_policy):
    policy, ids = tiny_policy(), torch.tensor([1, 2, 3, 4])
    with policy.plain() as model:
        want = model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    torch.testing.assert_close(log_probs(policy, ids.tolist(), 1), want.detach(), rtol=0, atol=1e-9)
