"""Score and reward that share a head pass, and a tree in parts, against the plain road on the whole tree."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fastgfn import passes
from fastgfn.checks import InputError
from fastgfn.objectives import has_anchor, modified_subtb_loss, window_coefficients
from fastgfn.packing import pack, split_tree
from fastgfn.passes import add_gradients, score_and_reward
from fastgfn.rewards import LMReward, SequenceReward, log_reward
from fastgfn.scoring import score
from fastgfn.testing import relative_error
from fastgfn.types import Constraints, Rollouts

STOP = 0
PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3]]
# duplicates, shared prefixes, the longest and the shortest length, two equal prompts, an order that is no
# involution of that of the leaves
SEQUENCES = [[6, 7, 8], [6, 7, 8], [6], [6, 7, 9, 1, 2], [5], [5, 5, 5, 5, 5], [2, 1], [2], [2, 1, 4], [2, 1]]
GROUP = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
BIAS = torch.where(torch.arange(13) == 12, -50.0, 0.0)
OTHER_BIAS = torch.where(torch.arange(13) == 11, -3.0, 0.0).double()
MAX_LENGTH, LONGEST = 5, 8


def _tree(sequences=SEQUENCES, group=GROUP, **options):
    constraints = Constraints(STOP, max_length=MAX_LENGTH, **options)
    tokens = torch.zeros(len(sequences), MAX_LENGTH, dtype=torch.int64)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    prompts = tuple(torch.tensor(p) for p in PROMPTS)
    lengths, group = (torch.tensor(x, dtype=torch.int64) for x in ([len(s) for s in sequences], group))
    return pack(Rollouts(prompts, group, tokens, lengths, torch.zeros(len(sequences)), constraints))


def _value(z):
    return 0.3 * len(z) - sum((i + 1) * t % 5 for i, t in enumerate(z)) / 4


def _reward(kind, policy):
    if kind == "lm":
        return LMReward(policy.reference, logit_bias=OTHER_BIAS)
    return SequenceReward(lambda zs: [_value(z) for z in zs])


def _grads(policy):
    grads = [p.grad for _, p in policy.parameters()]
    for _, p in policy.parameters():
        p.grad = None
    return grads


def _plain(tree, policy, reward, **options):
    """The road without `passes`."""
    raw = log_reward(tree, reward=reward)
    result = modified_subtb_loss(
        score(tree, policy=policy), tree=tree, log_reward=raw / 0.8, subtb_lambda=0.9, **options
    )
    result.loss.backward()
    return result.loss.detach(), result.log_z, raw[tree.leaf], _grads(policy)


@pytest.mark.parametrize("normalization", ["group", "batch", "trajectory"])
@pytest.mark.parametrize("kind", ["lm", "function"])
@pytest.mark.parametrize(
    "limits", [{}, {"min_length": 1}, {"min_length": 1, "termination": "own"}], ids=["free", "anchor", "own"]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_parts_give_what_one_pass_gives(tiny_policy, normalization, kind, limits, dtype, bound):
    # all of gpt2 is float64; llama takes norms and angles in float32
    family, scale = ("gpt2", 6.0) if dtype == torch.float64 else ("llama", 2.0)
    policy = tiny_policy(dtype=dtype, family=family, scale=scale)
    tree, reward = _tree(logit_bias=BIAS, **limits), _reward(kind, policy)
    assert has_anchor(tree) == (limits == {"min_length": 1})
    want = _plain(tree, policy, reward, normalization=normalization)
    for max_tokens in (LONGEST, 12, None):
        assert (len(split_tree(tree, max_tokens=max_tokens)) > 1) == (max_tokens is not None)
        result = add_gradients(
            tree,
            policy=policy,
            reward=reward,
            reward_temperature=0.8,
            subtb_lambda=0.9,
            normalization=normalization,
            max_tokens=max_tokens,
        )
        got = (result.loss, result.log_z, result.log_reward)
        for a, b in zip(got, want[:3], strict=True):
            assert a.shape == b.shape and relative_error(a, b) <= bound
        grads = _grads(policy)
        assert all(g.abs().max() > 0 for g in want[3])
        assert relative_error(*(torch.cat([g.flatten() for g in x]) for x in (grads, want[3]))) <= bound
        if dtype == torch.float64:
            assert max(map(relative_error, grads, want[3])) <= bound


def test_gradients_are_added_and_scaled(tiny_policy):
    policy = tiny_policy()
    tree, reward = _tree(), _reward("lm", policy)
    add_gradients(tree, policy=policy, reward=reward)
    want = _grads(policy)
    for _ in range(2):
        add_gradients(tree, policy=policy, reward=reward, max_tokens=12, scale=0.5)
    for a, b in zip(_grads(policy), want, strict=True):
        assert relative_error(a, b) <= 1e-6


def test_prompts_without_trajectories_count_as_in_one_pass(tiny_policy):
    policy = tiny_policy(family="gpt2")
    tree, reward = _tree(SEQUENCES[4:7], [1, 1, 1], min_length=1), _reward("function", policy)
    want = _plain(tree, policy, reward)
    got = add_gradients(
        tree, policy=policy, reward=reward, reward_temperature=0.8, subtb_lambda=0.9, max_tokens=7
    )
    assert got.log_z.shape == (3,) and relative_error(got.log_z, want[1]) <= 1e-10
    assert relative_error(got.loss, want[0]) <= 1e-10
    with pytest.raises(InputError, match="tree must be of at least one trajectory, got 0"):
        add_gradients(_tree([], []), policy=policy, reward=reward)


def test_coefficients_of_parts_are_those_of_the_whole():
    tree = _tree()
    weights = torch.linspace(0.5, 2.0, len(SEQUENCES))
    for normalization in ("group", "batch", "trajectory"):
        whole = window_coefficients(tree, normalization=normalization)
        weighted = window_coefficients(tree, normalization=normalization, weights=weights)
        torch.testing.assert_close(weighted, whole * weights.double())
        alone = [
            window_coefficients(p.tree, normalization=normalization) for p in split_tree(tree, max_tokens=12)
        ]
        assert float((torch.cat(alone) - whole).abs().max()) > 1e-3, "a part alone has other denominators"


def test_a_forward_without_gradient_is_spent_only_where_log_z_is_unknown(tiny_policy, monkeypatch):
    policy = tiny_policy()
    passes_made = []
    forward = policy.tree_hidden

    def counted(*args):
        passes_made.append(torch.is_grad_enabled())
        return forward(*args)

    monkeypatch.setattr(policy, "tree_hidden", counted)
    reward = _reward("function", policy)
    # in the last tree every prompt has one trajectory
    for tree, max_tokens, extra in (
        (_tree(), 12, 0),
        (_tree(min_length=1), 12, len(split_tree(_tree(min_length=1), max_tokens=12))),
        (_tree([[6, 7, 8], [5], [2]], [0, 1, 2], min_length=1), LONGEST, 0),
    ):
        passes_made.clear()
        num_parts = len(split_tree(tree, max_tokens=max_tokens))
        add_gradients(tree, policy=policy, reward=reward, max_tokens=max_tokens)
        assert num_parts >= 2 and passes_made == [False] * extra + [True] * num_parts


def test_no_graph_outlives_its_part(tiny_policy, monkeypatch):
    policy = tiny_policy()
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    saved, alive = [], []

    def pack_saved(t):
        if t.untyped_storage().data_ptr() not in weights:
            saved.append(StorageWeakRef(t.untyped_storage()))
        return t

    original = passes.score_and_reward

    def observed(*args, **options):
        gc.collect()
        alive.append(sum(not ref.expired() for ref in saved))
        return original(*args, **options)

    monkeypatch.setattr(passes, "score_and_reward", observed)
    with torch.autograd.graph.saved_tensors_hooks(pack_saved, lambda t: t):
        add_gradients(_tree(), policy=policy, reward=_reward("lm", policy), max_tokens=12)
    assert len(alive) >= 3 and len(saved) > 100
    # of each part before, the parents of its tree and log q of its nodes
    assert all(n <= 2 * k for k, n in enumerate(alive)), alive


@pytest.mark.parametrize("limits", [{}, {"min_length": 2}, {"min_length": 2, "termination": "own"}])
@pytest.mark.parametrize("biases", [(None, None), (BIAS, None), (None, OTHER_BIAS), (BIAS, OTHER_BIAS)])
def test_one_head_pass_gives_what_two_give(tiny_policy, limits, biases):
    policy = tiny_policy()
    chosen = [(s, g) for s, g in zip(SEQUENCES, GROUP, strict=True) if len(s) >= 2]
    tree = _tree(*zip(*chosen, strict=True), logit_bias=biases[0], **limits)
    reward = LMReward(policy.reference, logit_bias=biases[1])
    results = []
    for together in (True, False):
        if together:
            log_probs, log_r = score_and_reward(tree, policy=policy, reward=reward)
        else:
            log_probs, log_r = score(tree, policy=policy), log_reward(tree, reward=reward)
        assert not log_r.requires_grad
        mix = torch.linspace(0.5, 2.0, tree.num_nodes, dtype=torch.float64)
        (mix @ log_probs.log_pf + mix.flip(0) @ log_probs.log_pterm).backward()
        results.append([log_probs.log_pf, log_probs.log_pterm, log_r, *_grads(policy)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float64 and relative_error(a, b) <= 1e-10


def _head_passes(monkeypatch):
    from fastgfn.models import log_probs

    calls = []
    for name in ("linear_log_probs", "policy_reward_log_probs"):
        original = getattr(log_probs, name)

        def counted(*args, _name=name, _original=original, **options):
            calls.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(log_probs, name, counted)
    return calls


def test_which_rewards_share_the_pass(tiny_policy, monkeypatch):
    policy, other = tiny_policy(), tiny_policy(vocab=15)
    calls = _head_passes(monkeypatch)

    class Shifted(LMReward):
        def __call__(self, tree):
            return super().__call__(tree) - 1.0

    class Halved(LMReward):
        def from_log_probs(self, raw, tree):
            return 0.5 * super().from_log_probs(raw, tree)

    shared, apart = ["policy_reward_log_probs"], ["linear_log_probs"] * 2
    tree = _tree()
    base = log_reward(tree, reward=LMReward(policy.reference))
    terminable = tree.terminable
    for reward, want, value in (
        (LMReward(policy.reference), shared, base),
        (Halved(policy.reference), shared, 0.5 * base),
        (Shifted(policy.reference), apart, (base - 1.0).masked_fill(~terminable, 0.0)),
        (LMReward(other.reference), apart, None),
        (_reward("function", policy), apart[:1], None),
    ):
        calls.clear()
        _, got = score_and_reward(tree, policy=policy, reward=reward)
        assert calls == want
        if value is not None:
            torch.testing.assert_close(got, value)
    calls.clear()
    chosen = [(s, g) for s, g in zip(SEQUENCES, GROUP, strict=True) if len(s) >= 2]
    tree = _tree(*zip(*chosen, strict=True), min_length=2)
    score_and_reward(tree, policy=policy, reward=LMReward(policy.reference))
    assert calls == ["policy_reward_log_probs", "linear_log_probs"], "early states have a mask of their own"


@pytest.mark.parametrize("wide_adapter", [False, True], ids=["bf16-adapter", "fp32-adapter"])
@pytest.mark.parametrize("kind", ["lm", "function"])
def test_a_bfloat16_base_has_float32_log_probs(tiny_policy, wide_adapter, kind):
    policy = tiny_policy(dtype=torch.bfloat16, scale=2.0)
    truth = tiny_policy(dtype=torch.float64, scale=2.0)
    with torch.no_grad():
        for p, q in zip(policy.model.parameters(), truth.model.parameters(), strict=True):
            q.copy_(p)
        for _, p in policy.parameters():
            p.data = p.data.float() if wide_adapter else p.data
    tree = _tree(min_length=1, logit_bias=BIAS)
    rows = []
    for model in (policy, truth):
        log_probs, log_r = score_and_reward(tree, policy=model, reward=_reward(kind, model))
        result = modified_subtb_loss(log_probs, tree=tree, log_reward=log_r)
        result.loss.backward()
        rows.append((log_probs.log_pf, log_probs.log_pterm, log_r, result.loss, _grads(model)))
    *got, grads = rows[0]
    *want, truth_grads = rows[1]
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.float64, torch.float32]
    # more digits than bfloat16 has
    assert not torch.equal(got[0], got[0].bfloat16().float())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.05, atol=0.05)
    for g, h in zip(grads, truth_grads, strict=True):
        assert g.dtype == (torch.float32 if wide_adapter else torch.bfloat16)
        assert float((g.double() - h).norm()) <= 0.15 * float(h.norm())
