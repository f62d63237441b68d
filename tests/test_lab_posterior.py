"""Exact posteriors against naive sums: a plain forward per string, in float64."""

import itertools
import math

import pytest
import torch
from grammar_cases import SHORT, Stops, language

from fastgfn.checks import InputError
from fastgfn.evaluate import divergence
from fastgfn.lab import posterior as lab
from fastgfn.lab.posterior import enumerate_strings, evaluate_exactly, exact_posterior, log_probs
from fastgfn.rewards import LMReward, SequenceReward
from fastgfn.types import Constraints, LogProbs

STOP, PROMPT, LETTERS = 0, [4, 9], [2, 5, 7]
OUTSIDE = torch.full((13,), -99.0).index_fill(0, torch.tensor([STOP, *LETTERS]), 0.0)


def _strings(least, most):
    return [list(z) for n in range(least, most + 1) for z in itertools.product(LETTERS, repeat=n)]


def _log_p(plain, z, *, bias=None, stop_from=0, stop_at=None):
    """log p of z and of stopping: without the stop token below `stop_from`, stopping certain at `stop_at`."""
    logits = plain.model(input_ids=torch.tensor([[*PROMPT, *z]])).logits[0, len(PROMPT) - 1 :]
    logits = logits if bias is None else logits + bias
    total = 0.0
    for k, token in enumerate([*z, STOP]):
        row = logits[k].clone()
        row[STOP] = -torch.inf if k < stop_from else row[STOP]
        total += 0.0 if k == stop_at else float(row.log_softmax(0)[token])
    return total


@pytest.fixture(scope="module")
def reward():
    return SequenceReward(lambda zs: [math.sin(sum(z)) - 2.0 * len(z) for z in zs])


def _posterior(reward, **change):
    options = dict(vocabulary=LETTERS, reward=reward, reward_temperature=0.5, max_tokens=None)
    limits = {k: change.pop(k) for k in ("min_length", "max_length", "logit_bias") if k in change}
    return exact_posterior(PROMPT, constraints=Constraints(STOP, **limits), **(options | change))


@pytest.mark.parametrize("least", [0, 2])
def test_equals_a_forward_per_string(tiny_policy, least):
    policy, plain = tiny_policy(), tiny_policy(implementation="sdpa")
    found = _posterior(
        LMReward(policy.reference), min_length=least, max_length=3, logit_bias=OUTSIDE, max_tokens=9
    )
    assert len(found.parts) > 1
    assert sorted(found.sequences) == sorted(_strings(least, 3))
    log_q = log_probs(found, policy)
    with torch.no_grad():
        naive_q = [_log_p(plain, z, bias=OUTSIDE, stop_from=least, stop_at=3) for z in found.sequences]
        with plain.model.disable_adapter():
            log_r = [_log_p(plain, z) / 0.5 for z in found.sequences]
    log_z = math.log(sum(map(math.exp, log_r)))
    assert log_q.tolist() == pytest.approx(naive_q, abs=1e-9)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    assert found.log_reward.tolist() == pytest.approx(log_r, abs=1e-9)
    assert found.log_z == pytest.approx(log_z, abs=1e-9)
    result = evaluate_exactly(found, policy)
    p, q = ([math.exp(x - shift) for x in xs] for xs, shift in ((log_r, log_z), (naive_q, 0.0)))
    assert result["tv"] == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2, abs=1e-9)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert result["kl_target_to_model"] == pytest.approx(kl, abs=1e-9)
    assert result["kl_target_to_model"] == pytest.approx(
        divergence(log_q, found.log_target, 0.0).kl_target_to_model, abs=1e-9
    )
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert result["kl_model_to_target"] == pytest.approx(reverse, abs=1e-9)
    if least:
        assert result["log_z_error"] == pytest.approx(reverse, abs=1e-9)
    else:
        at_start = [math.exp(x) for z, x in zip(found.sequences, naive_q, strict=True) if not z]
        empty = log_r[found.sequences.index([])]
        assert result["log_z_error"] == pytest.approx(abs(empty - math.log(at_start[0]) - log_z), abs=1e-9)


@pytest.mark.parametrize("limits", [{"max_length": 3}, {"min_length": 1, "max_length": 4}])
@pytest.mark.parametrize("max_tokens", [None, 6, 20])
def test_parts_change_nothing(reward, limits, max_tokens):
    whole, cut = _posterior(reward, **limits), _posterior(reward, **limits, max_tokens=max_tokens)
    assert whole.sequences == cut.sequences and torch.equal(whole.raw_log_reward, cut.raw_log_reward)
    assert all(max_tokens is None or part.tree.num_nodes <= max_tokens for part in cut.parts)


def test_conditionals_are_subtree_sums(reward):
    found = _posterior(reward, min_length=1, max_length=3)
    weight = {tuple(z): math.exp(r) for z, r in zip(found.sequences, found.log_reward.tolist(), strict=True)}
    paths = {tuple(z): int(n) for z, n in zip(found.sequences, found.tree.leaf, strict=True)}
    for z, node in paths.items():
        below = sum(w for s, w in weight.items() if s[: len(z)] == z)
        assert float(found.log_flow[node]) == pytest.approx(math.log(below), abs=1e-12)
        assert float(found.log_stop[node]) == pytest.approx(math.log(weight[z] / below), abs=1e-12)
    assert found.log_flow[: len(PROMPT)].tolist() == pytest.approx([found.log_z] * 2, abs=1e-12)
    assert found.log_stop[: len(PROMPT)].tolist() == [-math.inf] * 2


def test_small_subtrees_keep_their_digits():
    """e^-800 is no float64, but shares of it are."""
    found = _posterior(
        SequenceReward(lambda zs: [0.0 if not z else -400.0 - len(z) for z in zs]), max_length=2
    )
    node = int(found.tree.leaf[found.sequences.index([5])])
    assert float(found.log_stop[node]) == pytest.approx(-math.log1p(3 * math.exp(-2.0)), abs=1e-12)


def test_tempered_is_another_posterior(reward):
    cold, direct = (_posterior(reward, max_length=3, reward_temperature=t) for t in (1.0, 0.3))
    again = cold.tempered(0.3)
    assert again.log_z == direct.log_z and torch.equal(again.log_target, direct.log_target)


@pytest.mark.parametrize(
    "limits", [{"max_length": 4}, {"max_length": 2}, {"min_length": 3, "max_length": 4}], ids=str
)
def test_enumerates_what_a_grammar_lets_through(limits):
    grammar, constraints = Stops(SHORT), Constraints(STOP, **limits)
    letters = [t for t in range(13) if t not in (STOP,)]
    tokens, lengths = enumerate_strings(constraints, vocabulary=letters, grammar=grammar)
    found = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    assert sorted(found) == sorted(language(grammar, constraints))


def _as_target(found):
    """The target's own conditionals, node-aligned."""
    parent = found.tree.parent.long()
    log_pf = torch.where(parent < 0, 0.0, found.log_flow - found.log_flow[parent.clamp(min=0)])
    return LogProbs(log_pf=log_pf, log_pterm=found.log_stop)


@pytest.mark.parametrize("least", [0, 2])
def test_the_target_is_at_distance_zero_from_itself(monkeypatch, reward, least):
    found = _posterior(reward, min_length=least, max_length=3)
    monkeypatch.setattr(lab, "node_log_probs", lambda posterior, policy: _as_target(posterior))
    result = evaluate_exactly(found, None)
    lengths = ("mean_length", "target_mean_length", "log_f", "log_z")
    for name in result.keys() - {"mode_coverage", *lengths}:
        assert result[name] == pytest.approx(0.0, abs=1e-12), name
    assert result["mode_coverage"] == 1.0
    for one, other in (lengths[:2], lengths[2:]):
        assert result[one] == pytest.approx(result[other], abs=1e-12)


def test_stopping_too_early_is_drift(monkeypatch, reward):
    """With every stop of probability p at p^(1/2), and what follows shrunk to match."""
    found = _posterior(reward, max_length=3)

    def early(posterior, policy):
        exact = _as_target(posterior)
        stop = posterior.log_stop.where(posterior.log_stop < -1e-9, 0.0) / 2
        goes_on = torch.log(-torch.expm1(stop)) - torch.log(-torch.expm1(stop * 2))
        shrink = torch.where(stop < 0, goes_on, 0.0)[posterior.tree.parent.long().clamp(min=0)]
        stops = torch.where(posterior.tree.terminable, stop, 0.0)
        shrunk = torch.where(posterior.tree.length > 0, exact.log_pf + shrink, exact.log_pf)
        return LogProbs(log_pf=shrunk, log_pterm=stops)

    monkeypatch.setattr(lab, "node_log_probs", early)
    result = evaluate_exactly(found, None)
    assert result["invalid_mass"] == pytest.approx(0.0, abs=1e-12)
    # the probability that a string of the target passes each prefix and goes on
    weight = ((found.log_flow - found.log_z).exp() * -torch.expm1(found.log_stop))[found.tree.leaf]
    stop = found.log_stop[found.tree.leaf]
    want = float(-(weight * stop).sum() / weight.sum()) / 2
    assert want > 0.05 and result["early_stop_drift"] == pytest.approx(want, abs=1e-12)
    want = float(-(found.log_target.exp() * stop).sum()) / 2
    assert result["termination_drift"] == pytest.approx(want, abs=1e-12)
    # as many tokens as prefixes that go on
    assert result["mean_length"] < result["target_mean_length"]
    assert result["target_mean_length"] == pytest.approx(float(weight.sum()), abs=1e-12)


def test_mass_outside_the_strings_is_invalid(monkeypatch, reward):
    found = _posterior(reward, max_length=2)

    def leaky(posterior, policy):
        exact = _as_target(posterior)
        return LogProbs(exact.log_pf, exact.log_pterm + math.log(0.75))

    monkeypatch.setattr(lab, "node_log_probs", leaky)
    result = evaluate_exactly(found, None)
    assert result["invalid_mass"] == pytest.approx(0.25, abs=1e-12)
    assert result["tv"] == pytest.approx(0.25, abs=1e-12)
    assert result["kl_model_to_target"] == math.inf


def test_every_one_of_equal_modes_counts(monkeypatch):
    """Nine tenths of 13 equal strings are 12, whichever; a sampler that misses one covers 12 of 13."""
    found = _posterior(SequenceReward(lambda zs: [0.0] * len(zs)), max_length=2)
    monkeypatch.setattr(lab, "node_log_probs", lambda posterior, policy: _as_target(posterior))
    for missed in range(13):
        log_q = found.log_target.index_fill(0, torch.tensor(missed), -9.0)
        monkeypatch.setattr(lab, "_of_strings", lambda nodes, posterior, log_q=log_q: log_q)
        assert evaluate_exactly(found, None)["mode_coverage"] == pytest.approx(12 / 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": [2, 2]}, "vocabulary must be distinct tokens"),
        ({"vocabulary": [2, STOP]}, "vocabulary must be distinct tokens"),
        ({"vocabulary": []}, "vocabulary must be distinct tokens"),
        ({"reward_temperature": 0.0}, "reward_temperature must be > 0"),
        ({"max_length": 40}, "at most 200000 strings"),
        ({"reward": SequenceReward(lambda zs: [-math.inf] * len(zs))}, "log R must be finite"),
    ],
    ids=["repeat", "stop", "empty", "temperature", "many", "inf"],
)
def test_refuses(reward, change, message):
    with pytest.raises(InputError, match=message):
        _posterior(**({"reward": reward, "max_length": 2} | change))


def test_refuses_own_termination(reward):
    with pytest.raises(InputError, match="termination must be 'forced'"):
        exact_posterior(
            PROMPT, constraints=Constraints(STOP, termination="own"), reward=reward, vocabulary=LETTERS
        )
