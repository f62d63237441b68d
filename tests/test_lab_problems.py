"""The frozen list of enumerable problems."""

import copy
import hashlib
import itertools
import json
import math

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.lab.problems import FILE, NAMES, SPECS, IndependentSets, build_problem, check_spec, load_problem
from fastgfn.models.shapes import peaked_policy

FROZEN = "fb1aafd72e8ddbd241204f3e399cc86df8fd9dccf1f7cde3881c246ccfcdffd1"
TINY = [name for name in NAMES if SPECS[name]["model"] == "tiny"]
# What the list gave when it was frozen: log Z of each prompt, and the start's distance from the target.
START = {
    "tiny-other": ([-3.0897], 0.8417),
    "tiny-cold": ([-7.2957], 0.7143),
    "tiny-prompts": ([-3.2217, -2.1134], 0.6754),
    "tiny-long": ([-11.5635], 0.8725),
    "tiny-sum": ([3.0911], 0.9246),
    "independent-sets": ([7.8528], 0.9131),
    "smollm2-continuation": ([-10.8290], 0.7330),
    "smollm2-infilling": ([-23.4101], 0.5751),
}


def test_the_list_is_frozen():
    text = json.dumps(json.loads(FILE.read_text())["problems"], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == FROZEN
    assert tuple(START) == NAMES


def test_the_list_has_what_the_laboratory_needs():
    kinds = {spec["kind"] for spec in SPECS.values()}
    rewards = {spec["reward"]["type"] for spec in SPECS.values()}
    assert kinds == {"dense", "sparse"} and rewards == {"lm", "digit_sum", "independent_sets"}
    assert min(spec["reward_temperature"] for spec in SPECS.values()) <= 0.5
    assert any("suffix" in spec["reward"] for spec in SPECS.values())
    assert any(len(spec["prompts"]) > 1 for spec in SPECS.values())
    most = {"tiny": 100_000, "smollm2-135m": 6_000}
    assert all(spec["num_strings"] <= most[spec["model"]] for spec in SPECS.values())


def _check_start(problem):
    """The list's own numbers, so that a change of the random weights or of the model is seen."""
    log_z, tv = START[problem.name]
    assert [p.log_z for p in problem.posteriors] == pytest.approx(log_z, abs=1e-3)
    results = problem.evaluate_prompts()
    assert max(r["tv"] for r in results) == pytest.approx(tv, abs=1e-3)
    for result, posterior in zip(results, problem.posteriors, strict=True):
        assert result["tv"] >= 0.5 and result["invalid_mass"] < 1e-5
        assert float(posterior.log_target.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        assert posterior.tree.num_nodes <= (100_000 if problem.model == "tiny" else 6_000)


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_problem_starts_far_from_its_target(name):
    _check_start(load_problem(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TINY])
def test_smollm2_starts_far_from_its_target(name):
    _check_start(load_problem(name, lora_rank=1))


def test_only_the_adapter_depends_on_the_seed():
    first, other = (load_problem("tiny-prompts", seed=s) for s in (0, 1))
    assert first.posteriors[1].log_z == other.posteriors[1].log_z
    weights = [dict(p.policy.model.named_parameters()) for p in (first, other)]
    differ = {n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])}
    assert differ and all("lora_A" in n for n in differ)
    # neither does what else was drawn before
    torch.manual_seed(9)
    again = load_problem("tiny-prompts")
    assert all(torch.equal(a, weights[0][n]) for n, a in again.policy.model.named_parameters())


def test_the_worst_prompt_counts():
    problem = load_problem("tiny-prompts")
    one, two = problem.evaluate_prompts()
    result = problem.evaluate()
    assert one["tv"] != two["tv"] and one["log_z"] != two["log_z"]
    for name in ("tv", "kl_target_to_model", "kl_model_to_target", "log_z_error"):
        assert result[name] == max(one[name], two[name])
    assert result["mode_coverage"] == min(one["mode_coverage"], two["mode_coverage"])
    assert result["termination_drift"] == max(one["termination_drift"], two["termination_drift"], key=abs)
    assert result["mean_length"] == (one["mean_length"] + two["mean_length"]) / 2


def test_another_temperature_is_the_same_problem_otherwise():
    cold, warm = load_problem("tiny-cold"), load_problem("tiny-cold", reward_temperature=1.0)
    assert cold.posteriors[0].tempered(1.0).log_z == warm.posteriors[0].log_z
    assert warm.reward_temperature == 1.0


def test_sparse_reward_is_hit_or_miss():
    problem = load_problem("tiny-sum")
    (posterior,) = problem.posteriors
    for z, log_r in zip(posterior.sequences, posterior.raw_log_reward.tolist(), strict=True):
        assert log_r == (0.0 if sum(z) == 7 else -12.0)
    hits = int((posterior.raw_log_reward == 0).sum())
    # compositions of 7 into one, two and three digits
    assert hits == 1 + 6 + 15
    assert posterior.log_z == pytest.approx(math.log(hits + (399 - hits) * math.exp(-12)), abs=1e-12)


def test_independent_sets_by_recurrence_and_by_enumeration():
    spec = SPECS["independent-sets"]
    edges, fugacity = spec["reward"]["edges"], spec["reward"]["fugacity"]
    (posterior,) = load_problem("independent-sets").posteriors
    sets = [
        list(s)
        for n in range(13)
        for s in itertools.combinations(range(1, 13), n)
        if not any(a in s and b in s for a, b in edges)
    ]
    assert sorted(posterior.sequences) == sorted(sets)
    assert posterior.log_z == pytest.approx(math.log(sum(fugacity ** len(s) for s in sets)), abs=1e-12)
    # row by row, Z(row) = fugacity^|row| * the sum over disjoint rows before it
    rows = [r for r in range(16) if not r & (r >> 1)]
    z = dict.fromkeys(rows, 0.0) | {0: 1.0}
    for _ in range(3):
        z = {r: fugacity ** r.bit_count() * sum(z[s] for s in rows if not r & s) for r in rows}
    assert posterior.log_z == pytest.approx(math.log(sum(z.values())), abs=1e-12)
    assert int(max(map(len, sets))) == spec["max_length"]


def test_the_grammar_of_independent_sets():
    grammar = IndependentSets(4, [(1, 2), (3, 4), (1, 4)], stop=0, vocab_size=6)
    allowed = grammar.allowed([[], [1], [2], [1, 3], [4]])
    want = [[0, 1, 2, 3, 4], [0, 3], [0, 3, 4], [0], [0]]
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == want


def test_peaked_policies_depend_on_their_context():
    policy = peaked_policy(8, base_seed=1, peak=2.0)
    other = peaked_policy(8, base_seed=2, peak=2.0)
    assert not torch.equal(policy.head.weight, other.head.weight)
    row = policy.head.weight.norm(dim=1).mean()
    assert float(row) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_lenght": 3}, "keys of 'tiny-sum' must be known, got 'max_lenght'; did you mean 'max_length'"),
        ({"reward": {"type": "digit_sum", "goal": 7, "log_miss": -1.0}}, "got 'reward.goal'"),
        ({"reward": {"type": "digit_sum", "log_miss": -1.0}}, r"complete, got none of \['reward.target'\]"),
        ({"reward": {"type": "digits"}}, "reward.type of 'tiny-sum' must be one of lm, digit_sum"),
        ({"reward": 3}, "reward.type of 'tiny-sum' must be one of"),
        ({"reward": {"type": "lm", "suffix": "x"}}, "reward of 'tiny-sum' must be one that tiny has"),
        ({"model": "huge"}, "model of 'tiny-sum' must be one of tiny, smollm2-135m"),
        ({"kind": "odd"}, "kind of 'tiny-sum' must be one of dense, sparse"),
        ({"max_length": "3"}, "max_length of 'tiny-sum' must be int, got '3'"),
        ({"reward_temperature": 0}, "reward_temperature of 'tiny-sum' must be > 0"),
        ({"prompts": []}, "prompts of 'tiny-sum' must be non-empty"),
        ({"words": [" a"]}, "got 'words'"),
    ],
)
def test_refuses_bad_entries(change, message):
    with pytest.raises(InputError, match=message):
        check_spec(copy.deepcopy(SPECS["tiny-sum"]) | change)


def test_refuses_what_is_not_on_the_list():
    with pytest.raises(InputError, match="got 'tiny-summ'; did you mean 'tiny-sum'"):
        load_problem("tiny-summ")
    with pytest.raises(InputError, match="strings of 'tiny-sum' must be 400, as the list states, got 399"):
        build_problem(SPECS["tiny-sum"] | {"num_strings": 400})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [(1, 1)]}, "edges must be pairs of vertices"),
        ({"edges": [(0, 2)]}, "edges must be pairs of vertices"),
        ({"stop": 3}, "vocab_size must be > 4"),
        ({"vocab_size": 4}, "vocab_size must be > 4"),
    ],
)
def test_refuses_bad_graphs(change, message):
    options = {"edges": [(1, 2)], "stop": 0, "vocab_size": 6} | change
    with pytest.raises(InputError, match=message):
        IndependentSets(4, **options)
