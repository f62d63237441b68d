"""Training under a grammar: q on its language is exact, from the draw to the posterior."""

import pytest
import torch
from grammar_cases import CASES, PROMPTS, language, make, rollouts_of

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.objectives import has_anchor, modified_subtb_loss
from fastgfn.ops.scan import tree_cumsum
from fastgfn.ops.tree import path_nodes
from fastgfn.packing import pack, split_tree
from fastgfn.passes import add_gradients, score_and_reward
from fastgfn.rewards import LMReward, SequenceReward, log_reward
from fastgfn.rollout import SamplingOptions, sample
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.train import Trainer
from fastgfn.types import Role


def masked_rows(policy_or_model, prompt, z, grammar, limits):
    """(len(z) + 1, V) log q from all logits of a plain forward, those after max_length tokens aside."""
    model = policy_or_model.model
    logits = model(input_ids=torch.tensor([prompt + z]), use_cache=False).logits[0, len(prompt) - 1 :]
    if limits.logit_bias is not None:
        logits = logits + limits.logit_bias.to(logits)
    allowed = grammar.allowed([z[:k] for k in range(len(z) + 1)])
    allowed[: limits.min_length, list(limits.termination_token_ids)] = False
    last = len(z) if len(z) == limits.max_length else len(z) + 1
    return logits[:last].masked_fill(~allowed[:last], -torch.inf).log_softmax(-1)


def dense_terms(model, prompt, z, grammar, limits):
    """log q of every token, log q(stop) of every prefix, (k,) and (k + 1,)."""
    rows = masked_rows(model, prompt, z, grammar, limits)
    stops = rows[:, list(limits.termination_token_ids)]
    # a logsumexp of -inf alone has no gradient but nan
    never = (stops == -torch.inf).all(1)
    log_pterm = stops.masked_fill(never[:, None], 0.0).logsumexp(-1).masked_fill(never, -torch.inf)
    if len(rows) == len(z):
        log_pterm = torch.cat([log_pterm, log_pterm.new_zeros(1)])
    return rows[torch.arange(len(z)), z], log_pterm


@pytest.mark.parametrize("case", CASES)
def test_q_sums_to_one_over_the_language(tiny_policy, case):
    grammar, limits = make(case)
    space = language(grammar, limits)
    assert len(space) >= 4 and (case != "cut" or [1, 2] in space)
    log_q, _ = sequence_log_probs(
        [1, 2], space, policy=tiny_policy(family="gpt2"), constraints=limits, grammar=grammar
    )
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("together", [False, True], ids=["score", "score_and_reward"])
@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_are_those_of_all_logits(tiny_policy, case, together):
    grammar, limits = make(case)
    policy, naive = (tiny_policy(family="gpt2", implementation=i) for i in ("fastgfn", "sdpa"))
    space = language(grammar, limits)
    sequences, group = space + space[::2] + space[:1], [0] * len(space) + [1] * len(space[::2]) + [2]
    tree = pack(rollouts_of(sequences, group, limits), grammar=grammar)
    reward = LMReward(policy.reference)
    if together:
        log_probs, log_r = score_and_reward(tree, policy=policy, reward=reward)
        base = pack(rollouts_of(sequences, group, limits, has_grammar=False))
        want = log_reward(base, reward=reward).masked_fill(~tree.terminable, 0.0)
        torch.testing.assert_close(log_r, want, rtol=0, atol=1e-10)
    else:
        log_probs = score(tree, policy=policy)
    lengths = tree.length[tree.leaf].long()
    nodes = path_nodes(tree.parent, tree.leaf, lengths + 1, limits.max_length + 1)
    upstream = torch.randn(2, tree.num_nodes, dtype=torch.float64)
    loss = (upstream[0] * log_probs.log_pf + upstream[1] * log_probs.log_pterm).sum()
    dense, seen = torch.zeros((), dtype=torch.float64), set()
    for n, (z, g) in enumerate(zip(sequences, group, strict=True)):
        log_pf, log_pterm = dense_terms(naive, PROMPTS[g], z, grammar, limits)
        path = nodes[n, : len(z) + 1]
        torch.testing.assert_close(log_probs.log_pf[path[1:]], log_pf, rtol=0, atol=1e-10)
        can_stop = tree.terminable[path]
        assert torch.equal(can_stop, log_pterm > -torch.inf)
        torch.testing.assert_close(
            log_probs.log_pterm[path][can_stop], log_pterm[can_stop], rtol=0, atol=1e-10
        )
        for k, node in enumerate(path.tolist()):
            if node in seen:
                continue
            seen.add(node)
            dense = dense + (upstream[0, node] * log_pf[k - 1] if k else 0.0)
            dense = dense + (upstream[1, node] * log_pterm[k] if bool(can_stop[k]) else 0.0)
    assert bool((log_probs.log_pterm[~tree.terminable] == 0).all())
    loss.backward()
    dense.backward()
    for (name, p), (_, q) in zip(policy.parameters(), naive.parameters(), strict=True):
        assert q.grad.abs().max() > 0 and relative_error(p.grad, q.grad) <= 1e-9, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", ["plain", "tool", "prefixes"])
def test_what_was_sampled_is_what_is_scored(tiny_policy, case, settings):
    grammar, limits = make(case)
    policy = tiny_policy(dtype=torch.float32, scale=3.0)
    options = {
        "plain": {},
        "tool": dict(tool=lambda i, z: [3] if grammar.state(z) == 2 and i % 2 else None),
        "prefixes": dict(options=SamplingOptions(prefixes=[[1], [4], []] * 24)),
    }[settings]
    rollouts = sample(
        PROMPTS, policy=policy, constraints=limits, num_samples=24, grammar=grammar, seed=3, **options
    )
    tree = pack(rollouts, grammar=grammar)
    assert (settings == "tool" and case in ("short", "bias")) <= bool((tree.role == Role.OBSERVATION).any())
    assert settings == "prefixes" or len({tuple(z) for z in rollouts.sequences()}) > 3
    log_probs = score(tree, policy=policy)
    log_pf, log_pterm = log_probs.log_pf.detach(), log_probs.log_pterm.detach()
    nodes = path_nodes(tree.parent, tree.leaf, rollouts.lengths + 1, limits.max_length + 1)
    for n, length in enumerate(rollouts.lengths.tolist()):
        path = nodes[n, : length + 1]
        own = rollouts.log_pf[n, :length]
        torch.testing.assert_close(log_pf[path[1:]], own, rtol=0, atol=1e-5)
        drawn = rollouts.log_pterm[n, : length + 1]
        can_stop = tree.terminable[path] & ~drawn.isnan()
        torch.testing.assert_close(log_pterm[path][can_stop], drawn[can_stop], rtol=0, atol=1e-5)
        asked = tree.is_state[path] & ~drawn.isnan() & (tree.length[path] < limits.max_length)
        assert torch.equal(can_stop[asked], drawn[asked] > -torch.inf)
    if settings != "prefixes":
        density = (tree_cumsum(log_pf, tree.parent) + log_pterm)[tree.leaf]
        torch.testing.assert_close(rollouts.log_behavior, density, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["short", "loop", "everything"])
@pytest.mark.parametrize("kind", ["lm", "function"])
def test_parts_give_what_one_pass_gives(tiny_policy, monkeypatch, case, kind):
    grammar, limits = make(case)
    policy = tiny_policy(family="gpt2")
    space = language(grammar, limits)
    sequences = [z for z in space for _ in range(2)] + space[::2] + space[:1]
    group = [0] * (2 * len(space)) + [1] * len(space[::2]) + [2]
    tree = pack(rollouts_of(sequences, group, limits), grammar=grammar)
    assert has_anchor(tree) == (case != "loop")
    function = SequenceReward(lambda zs: [0.3 * len(z) - sum(z) / 7 for z in zs])
    reward = LMReward(policy.reference) if kind == "lm" else function
    raw = log_reward(tree, reward=reward)
    whole = modified_subtb_loss(score(tree, policy=policy), tree=tree, log_reward=raw / 0.8)
    whole.loss.backward()
    want = [p.grad for _, p in policy.parameters()]
    modes, forward = [], policy.tree_hidden
    monkeypatch.setattr(
        policy, "tree_hidden", lambda *x: modes.append(torch.is_grad_enabled()) or forward(*x)
    )
    for max_tokens in (9, 14, None):
        for _, p in policy.parameters():
            p.grad = None
        modes.clear()
        num_parts = len(split_tree(tree, max_tokens=max_tokens))
        got = add_gradients(tree, policy=policy, reward=reward, reward_temperature=0.8, max_tokens=max_tokens)
        assert (num_parts > 1) == (max_tokens is not None)
        known = num_parts if has_anchor(tree) and num_parts > 1 else 0
        assert kind == "lm" or modes == [False] * known + [True] * num_parts
        assert relative_error(got.loss, whole.loss.detach()) <= 1e-10
        assert relative_error(got.log_z, whole.log_z) <= 1e-10
        for (_, p), w in zip(policy.parameters(), want, strict=True):
            assert w.abs().max() > 0 and relative_error(p.grad, w) <= 1e-9


def scored_language(policy, case):
    """Every Z that q can draw, their tree, and its log-probs."""
    grammar, limits = make(case)
    space = language(grammar, limits)
    tree = pack(rollouts_of(space, [0] * len(space), limits, PROMPTS[:1]), grammar=grammar)
    return space, tree, score(tree, policy=policy)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_vanish_at_the_posterior(tiny_policy, case):
    """R := q makes every window residual zero."""
    policy = tiny_policy()
    space, tree, log_probs = scored_language(policy, case)
    log_q = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm).detach()
    log_r = (log_q + 2.5).masked_fill(~tree.terminable, 0.0)
    result = modified_subtb_loss(log_probs, tree=tree, log_reward=log_r)
    result.loss.backward()
    assert float(result.loss) <= 1e-24
    assert max(float(p.grad.abs().max()) for _, p in policy.parameters()) <= 1e-11
    torch.testing.assert_close(result.log_z, torch.full((1,), 2.5, dtype=torch.float64))
    log_probs = score(tree, policy=policy)
    log_probs.log_pf.retain_grad()
    spread = log_r - torch.linspace(0, 3, tree.num_nodes).masked_fill(~tree.terminable, 0.0)
    modified_subtb_loss(log_probs, tree=tree, log_reward=spread).loss.backward()
    assert bool((log_probs.log_pf.grad[tree.role == Role.ACTION].abs() > 1e-9).all())


@pytest.mark.parametrize("case", CASES)
def test_vargrad_is_the_variance_under_all_logits(tiny_policy, case):
    """In one pass and in parts, from a reward of whole sequences."""
    grammar, limits = make(case)
    policy, naive = (tiny_policy(family="gpt2", implementation=i) for i in ("fastgfn", "sdpa"))
    space = language(grammar, limits)
    sequences, group = space + space[::2] + space[:1] * 2, [0] * len(space) + [1] * len(space[::2]) + [2] * 2

    def value(z):
        return 0.7 * len(z) - sum(z) / 5

    delta = []
    for z, g in zip(sequences, group, strict=True):
        log_pf, log_pterm = dense_terms(naive, PROMPTS[g], z, grammar, limits)
        delta.append(log_pf.sum() + log_pterm[-1] - value(z))
    delta, group = torch.stack(delta), torch.tensor(group)
    want = torch.stack([delta[group == g].var(unbiased=False) for g in range(3)]).mean()
    want.backward()
    tree = pack(rollouts_of(sequences, group, limits), grammar=grammar)
    reward = SequenceReward(lambda zs: [value(z) for z in zs], terminal_only=True)
    for max_tokens in (None, 14, 9):
        assert (len(split_tree(tree, max_tokens=max_tokens)) > 1) == (max_tokens is not None)
        got = add_gradients(tree, policy=policy, reward=reward, objective="vargrad", max_tokens=max_tokens)
        assert relative_error(got.loss, want.detach()) <= 1e-9
        for (name, p), (_, q) in zip(policy.parameters(), naive.parameters(), strict=True):
            assert q.grad.abs().max() > 0 and relative_error(p.grad, q.grad) <= 1e-8, name
            p.grad = None


class Flows(torch.nn.Module):
    """log F of every state of a tree, found by its hidden state and length; `change` more at s_0."""

    def __init__(self, policy, tree, values):
        super().__init__()
        hidden = policy.tree_hidden(tree.tokens, tree.position, tree.end).detach()
        self.rows, self.values, self.change = self.row(hidden, tree.length)[tree.is_state], values, 0.0

    def row(self, hidden, length):
        return torch.cat([hidden.detach(), length[:, None].to(hidden)], 1)

    def forward(self, hidden, length):
        nearest = torch.cdist(self.row(hidden, length), self.rows)
        assert float(nearest.min(1).values.max()) < 1e-6
        return self.values[nearest.argmin(1)] + self.change * (length == 0)


@pytest.mark.parametrize("objective", ["subtb", "db"])
@pytest.mark.parametrize("case", ["short", "cut", "everything"])
def test_flows_of_the_language(tiny_policy, case, objective):
    """Loss and gradients of a policy with the true flows vanish, in one pass and in parts, whatever the head
    says where stopping is certain."""
    policy = tiny_policy()
    space, tree, log_probs = scored_language(policy, case)
    log_q = (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm).detach()
    value = dict(zip(map(tuple, space), (log_q[tree.leaf] + 2.5).tolist(), strict=True))
    flow = tree_cumsum(log_probs.log_pf, tree.parent).detach() + 2.5
    assert bool(tree.must_stop.any()) and not bool((tree.must_stop & tree.is_root_state).any())
    flow = flow.masked_fill(tree.must_stop, 99.0)
    policy.flow_head = Flows(policy, tree, flow[tree.is_state])
    reward = SequenceReward(lambda zs: [value[tuple(z)] for z in zs], terminal_only=True)
    for max_tokens in (None, 9):
        assert (len(split_tree(tree, max_tokens=max_tokens)) > 1) == (max_tokens is not None)
        found = dict(policy=policy, reward=reward, objective=objective, max_tokens=max_tokens)
        for change, most in ((0.0, 1e-15), (1.0, None)):
            policy.flow_head.change = change
            got = float(add_gradients(tree, **found).loss)
            largest = max(float(p.grad.abs().max()) for _, p in policy.parameters())
            assert got <= most and largest <= 1e-9 if most else got > 1e-3 and largest > 1e-6
            for _, p in policy.parameters():
                p.grad = None


def trainer_of(policy, grammar, limits, **options):
    config = dict(num_samples=32, replay_samples=8, replay_duplicates="exact", learning_rate=2e-2, steps=150)
    return Trainer(
        policy, prompts=[[1, 2]], reward=LMReward(policy.reference), constraints=limits, grammar=grammar,
        config=TrainConfig(**(config | options)),
    )  # fmt: skip


@pytest.mark.parametrize("case", ["short", "loop"])
def test_learns_the_posterior_on_the_language(tiny_policy, case):
    """The base model's p restricted to what q can draw and renormalised, p^(1/1.3); with replay."""
    grammar, limits = make(case)
    policy = tiny_policy(dtype=torch.float32, rank=8)
    space = language(grammar, limits)
    plain = pack(rollouts_of(space, [0] * len(space), limits, [[1, 2]], has_grammar=False))
    log_r = log_reward(plain, reward=LMReward(policy.reference))[plain.leaf].double() / 1.3

    def distance():
        log_q, _ = sequence_log_probs([1, 2], space, policy=policy, constraints=limits, grammar=grammar)
        return divergence(log_q, log_r - log_r.logsumexp(0), 0.0)

    before = distance().tv
    trainer = trainer_of(policy, grammar, limits, reward_temperature=(1.3, 1.3))
    for _ in range(120):
        metrics = trainer.step()
    assert before > 0.1 and distance().tv <= 0.02 and distance().invalid_mass <= 1e-6
    assert metrics["log_z"] == pytest.approx(float(log_r.logsumexp(0)), abs=0.05)
    assert metrics["drift"] < 1e-5 and metrics["buffer"] > 2


def test_a_resumed_run_asks_for_a_grammar_of_the_same_kind(tiny_policy, tmp_path):
    grammar, limits = make("short")

    def new(grammar):
        return trainer_of(tiny_policy(dtype=torch.float32), grammar, limits, steps=4)

    straight, stopped = new(grammar), new(grammar)
    straight.fit(tmp_path / "a")
    stopped.fit(tmp_path / "b", should_stop=lambda: stopped.steps_done == 2)
    with pytest.raises(InputError, match="grammar must be 'Stops', got None; resume with the settings"):
        new(None).resume(tmp_path / "b")
    resumed = new(grammar)
    resumed.resume(tmp_path / "b")
    resumed.fit(tmp_path / "b")
    for (_, p), (_, q) in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(p, q)
