import json
import math

import pytest
import torch
from automaton import digits
from evaluate_cases import Problem, value

from fastgfn.checks import InputError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import Target, bounds, draw_exact, effective_sample_size, log_z_ais, log_z_importance
from fastgfn.evaluate.annealing import Chains, log_acceptance, num_cuts
from fastgfn.rewards import SequenceReward
from fastgfn.rollout import SamplingOptions, sample
from fastgfn.train import Trainer
from fastgfn.types import Constraints

TRAINED = {}


@pytest.fixture
def trained(tiny_policy):
    """A problem at the target temperature 0.5 after a short training."""
    if not TRAINED:
        problem = Problem(tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8), 4, temperature=0.5)
        settings = dict(steps=70, num_samples=48, learning_rate=2e-2, replay_samples=4, warmup_steps=2)
        target = problem.target
        config = TrainConfig(reward_temperature=(0.5, 0.5), **settings)
        kinds = {k: target[k] for k in ("prompts", "reward", "constraints")}
        trainer = Trainer(problem.policy, config=config, **kinds)
        for _ in range(70):
            trainer.step()
        TRAINED["problem"] = problem
    return TRAINED["problem"]


def _exact(problem, num_samples, seed, **options):
    spaces, targets = ([x] * len(problem.prompts) for x in (problem.space, problem.log_target))
    options = dict(constraints=problem.constraints, num_samples=num_samples, seed=seed) | options
    return draw_exact(problem.prompts, spaces, targets, **options)


def _transition_matrix(space, log_q, log_ratio, max_length, b, accept=log_acceptance):
    """P(x, y) of `regrow`, from the same number of cuts and acceptance, by summing over every cut."""
    lengths = torch.tensor([len(z) for z in space])
    cuts, num = num_cuts(lengths, max_length), len(space)
    q, proposal = log_q.exp(), torch.zeros(num, num, dtype=torch.float64)
    for c in range(max_length):
        prefix = [tuple(z[:c]) if len(z) >= c else None for z in space]
        for x in range(num):
            if c < int(cuts[x]):
                same = torch.tensor([p == prefix[x] for p in prefix])
                proposal[x] += torch.where(same, q, 0.0) / q[same].sum() / cuts[x]
    assert torch.allclose(proposal.sum(1), torch.ones(num, dtype=torch.float64), atol=1e-12)
    pair = (log_ratio[:, None], log_ratio[None, :], cuts[:, None], cuts[None, :])
    matrix = proposal * accept(*pair, b).exp()
    return matrix + torch.diag(1 - matrix.sum(1))


@pytest.mark.parametrize("min_length", [0, 1])
@pytest.mark.parametrize("b", [0.0, 0.3, 1.0])
def test_the_move_is_in_detailed_balance(tiny_policy, min_length, b):
    problem = Problem(tiny_policy(vocab=4), 4, min_length=min_length, temperature=0.5)
    log_q = problem.log_q()
    log_q = log_q - log_q.logsumexp(0)
    log_ratio = problem.log_r / 0.5 - log_q
    pi = (log_q + b * log_ratio).softmax(0)
    matrix = _transition_matrix(problem.space, log_q, log_ratio, 3, b)
    flow = pi[:, None] * matrix
    assert float((flow - flow.T).abs().max()) <= 1e-10 and float((pi @ matrix - pi).abs().max()) <= 1e-10
    assert float(matrix.min()) >= -1e-12 and float((matrix.diagonal() < 1).double().min()) == 1
    # it needs the probability of the cut under both lengths
    wrong = _transition_matrix(problem.space, log_q, log_ratio, 3, b, _without_cuts)
    assert float((pi @ wrong - pi).abs().max()) > 1e-4


def _without_cuts(x, y, cuts, proposed_cuts, b):
    one = torch.ones(1)
    return log_acceptance(x, y, one, one, b)


def test_chains_move_as_the_matrix_says(tiny_policy):
    """From two sequences, over every sequence that the move reaches; the family-wise error is 1e-3."""
    problem = Problem(tiny_policy(vocab=4, dtype=torch.float32), 4, temperature=0.5)
    log_q, num, b = problem.log_q(), 4000, 0.6
    log_ratio = problem.log_r / 0.5 - log_q
    matrix = _transition_matrix(problem.space, log_q, log_ratio, 3, b)
    place = {tuple(z): i for i, z in enumerate(problem.space)}
    for start in ([2], [3, 1, 2]):
        chains = Chains(Target(problem.policy, **problem.target), 5, num)
        states = chains.states([start] * num)
        want = log_ratio[place[tuple(start)]].expand(num)
        torch.testing.assert_close(states.log_ratio, want, rtol=0, atol=1e-5)
        new, accepted = chains.regrow(states, b)
        index = torch.tensor([place[tuple(z)] for z in new.sequences])
        torch.testing.assert_close(new.log_ratio, log_ratio[index], rtol=0, atol=1e-5)
        assert 0.0 < float(accepted.double().mean()) < 1.0
        want, have = matrix[place[tuple(start)]] * num, torch.bincount(index, minlength=len(place)).double()
        assert float(have[want < 1e-9].sum()) == 0
        rare = (want < 5) & (want > 0)
        cells = [(float(w), float(h)) for w, h in zip(want[want >= 5], have[want >= 5], strict=True)]
        if bool(rare.any()):
            cells.append((float(want[rare].sum()), float(have[rare].sum())))
        statistic, freedom = sum((h - w) ** 2 / w for w, h in cells), len(cells) - 1
        # Wilson and Hilferty's normal approximation, 3.3 standard deviations
        limit = freedom * (1 - 2 / (9 * freedom) + 3.3 * math.sqrt(2 / (9 * freedom))) ** 3
        assert statistic <= limit, (start, statistic, limit)


SETTINGS = [dict(temperature=t, min_length=m) for t in (1.0, 0.5) for m in (0, 1)]


def test_bounds_hold_in_20_of_20_cases_of_untrained_samplers(tiny_policy):
    policy, errors = tiny_policy(vocab=4, dtype=torch.float32), []
    for seed in range(20):
        problem = Problem(policy, 4, prompts=[[1, 2], [3]], **SETTINGS[seed % 4])
        draws = _exact(problem, 32, seed)
        options = dict(num_samples=32, schedule=(1, 3)[seed // 4 % 2], seed=seed)
        found = bounds(policy, draws=draws, **options, **problem.target)
        assert bool((found.lower <= problem.log_z).all() & (found.upper >= problem.log_z).all())
        assert bool(((found.ess >= 1) & (found.ess <= 32)).all())
        gap = found.reverse_log_z - found.log_z + 2 * math.log(1000)
        torch.testing.assert_close(found.upper - found.lower, gap)
        errors += [found.log_z - problem.log_z, found.reverse_log_z - problem.log_z]
    assert float(torch.stack(errors).abs().mean()) < 0.35


def test_bounds_and_estimate_hold_in_20_of_20_cases_of_a_trained_sampler(trained):
    errors = []
    for seed in range(20):
        options = dict(num_samples=512, schedule=1 + seed % 2, seed=seed, batches=8)
        found = bounds(trained.policy, draws=_exact(trained, 512, seed), **options, **trained.target)
        assert float(found.lower) <= trained.log_z <= float(found.upper)
        # eight batches that agree leave an eighth of log(1000) on either side
        assert float(found.upper - found.lower) <= 2.0
        assert float(found.ess) >= 256
        errors += [abs(float(x) - trained.log_z) for x in (found.log_z, found.reverse_log_z)]
    assert max(errors) <= 0.02


def test_annealing_does_better_than_importance_sampling_far_from_the_target(tiny_policy):
    """With as many weights, in the mean over ten runs; the price is a draw per step of the path."""
    policy = tiny_policy(vocab=5, dtype=torch.float32, scale=2.0)
    problem = Problem(policy, 5, max_length=4, temperature=0.5, prompts=[[3, 1]] * 10)
    plain, annealed = (log_z_ais(policy, num_samples=64, schedule=k, **problem.target) for k in (1, 24))
    for found in (plain, annealed):
        assert bool((found.lower <= problem.log_z).all())
    errors = [float((found.log_z - problem.log_z).abs().mean()) for found in (plain, annealed)]
    assert float(plain.ess.mean()) < 0.1 * 64 and float(annealed.ess.mean()) > 3 * float(plain.ess.mean())
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("behavior", ["policy", "tempered", "epsilon", "bfloat16"])
def test_importance_sampling_uses_the_density_of_what_drew(tiny_policy, behavior):
    problem = Problem(tiny_policy(vocab=4, dtype=torch.float32, scale=3.0), 4, prompts=[[1, 2], [3]])
    options = {
        "policy": {},
        "tempered": dict(temperature=1.7),
        "epsilon": dict(options=SamplingOptions(epsilon=0.4)),
        "bfloat16": dict(precision=torch.bfloat16),
    }[behavior]
    found = log_z_importance(problem.policy, num_samples=4096, seed=3, **options, **problem.target)
    assert bool(((found.log_z - problem.log_z).abs() <= 4 * found.standard_error).all())
    assert float(found.standard_error.max()) < 0.05 and bool((found.elbo < found.log_z).all())
    torch.testing.assert_close(found.lower, found.log_z - math.log(1000), rtol=0, atol=1e-12)


def test_precision_of_the_sampler_is_that_of_the_annealing(tiny_policy):
    """Eight bits move the sampler; the estimates stay those of the target."""
    problem = Problem(tiny_policy(vocab=4, dtype=torch.float32, scale=3.0), 4)
    target = problem.target | dict(precision=torch.int8)
    found = bounds(problem.policy, draws=_exact(problem, 512, 0), num_samples=512, schedule=4, **target)
    assert abs(float(found.log_z) - problem.log_z) <= 4 * float(found.standard_error) < 0.2
    assert abs(float(found.reverse_log_z) - problem.log_z) < 0.3


def test_worked_examples():
    torch.testing.assert_close(effective_sample_size(torch.zeros(3, 5)), torch.full((3,), 5.0))
    assert float(effective_sample_size(torch.tensor([0.0, -100.0, -100.0]))) == pytest.approx(1.0)
    assert float(effective_sample_size(torch.tensor([3.0, 1.0]).log())) == pytest.approx(1.6)
    assert num_cuts(torch.tensor([0, 2, 3]), 3).tolist() == [1, 3, 3]


def test_results_are_reproducible_and_json_ready(trained):
    def run(seed, **options):
        return log_z_ais(trained.policy, num_samples=32, schedule=3, seed=seed, **trained.target, **options)

    first = run(1)
    assert first.to_dict() == run(1).to_dict() != run(2).to_dict()
    assert json.loads(json.dumps(first.to_dict()))["steps"] == 3 and first.upper is None
    for options in (dict(batch_size=5), dict(max_tokens=9)):
        torch.testing.assert_close(run(1, **options).log_z, first.log_z, rtol=0, atol=1e-6)
    given = log_z_ais(trained.policy, num_samples=32, schedule=[0, 1 / 3, 2 / 3, 1], seed=1, **trained.target)
    torch.testing.assert_close(given.log_z, first.log_z, rtol=0, atol=1e-6)
    one = log_z_ais(trained.policy, num_samples=32, schedule=1, **trained.target)
    plain = log_z_importance(trained.policy, num_samples=32, **trained.target)
    assert one.acceptance is None
    torch.testing.assert_close(one.log_z, plain.log_z, rtol=0, atol=1e-5)


def test_bounds_under_a_grammar(tiny_policy):
    """Two or three digits of 1 and 2: what the grammar rules out is in neither bound."""
    policy = tiny_policy(vocab=4, dtype=torch.float32)
    grammar = digits(2, 3, ["", "1", "2", "x"], 0)
    constraints = Constraints(0, max_length=4)
    space = [[a, b] for a in (1, 2) for b in (1, 2)]
    space += [[*z, c] for z in space for c in (1, 2)]
    log_r = torch.tensor([value(z) for z in space], dtype=torch.float64)
    log_z = float(log_r.logsumexp(0))
    common = dict(constraints=constraints, num_samples=256)
    draws = draw_exact([[1, 2]], [space], [log_r - log_z], has_grammar=True, **common)
    reward = SequenceReward(lambda zs: [value(z) for z in zs])
    target = dict(prompts=[[1, 2]], reward=reward, grammar=grammar, **common)
    found = bounds(policy, draws=draws, schedule=4, **target)
    assert float(found.lower) <= log_z <= float(found.upper)
    assert abs(float(found.log_z) - log_z) <= 4 * float(found.standard_error) + 1e-6


def test_exact_draws_follow_the_posterior(tiny_policy):
    problem = Problem(None, 4, prompts=[[1], [2]])
    drawn = draw_exact(
        problem.prompts,
        [problem.space, problem.space[:1]],
        [problem.log_target, torch.zeros(1)],
        constraints=problem.constraints,
        num_samples=6000,
    )
    place = {tuple(z): i for i, z in enumerate(problem.space)}
    index = torch.tensor([place[tuple(z)] for z in drawn.sequences()[:6000]])
    torch.testing.assert_close(drawn.log_behavior[:6000].double(), problem.log_target[index])
    p = problem.log_target.exp()
    share = torch.bincount(index, minlength=len(p)) / 6000
    assert bool(((share - p).abs() <= 4.5 * (p * (1 - p) / 6000).sqrt()).all())
    assert drawn.sequences()[6000:] == [[]] * 6000


def _inf(zs):
    return [-math.inf for _ in zs]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_samples=0), "num_samples must be an int >= 1, got 0"),
        (dict(num_samples=2.0), "num_samples must be an int >= 1, got 2.0"),
        (dict(delta=0.0), r"delta must be in \(0, 1\), got 0.0"),
        (dict(delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
        (dict(batches=3), "batches must be a divisor of 16 samples, got 3"),
        (dict(prompts=[]), "prompts must be at least one prompt, got 0"),
        (dict(reward_temperature=0.0), "reward_temperature must be > 0 and finite, got"),
        (dict(reward=SequenceReward(_inf)), "log R must be finite, got -inf for Z = "),
        (dict(reward=SequenceReward(lambda zs: [math.nan for _ in zs])), "log R must be finite, got nan"),
        (
            dict(reward=SequenceReward(lambda zs: [1e300 for _ in zs]), reward_temperature=1e-300),
            r"log weights must be finite, got nan or inf for prompts \[0\]; log Z diverges",
        ),
    ],
)
@pytest.mark.parametrize("function", [log_z_importance, log_z_ais, bounds])
def test_refuses_bad_input(trained, function, changes, message):
    with pytest.raises(InputError, match=message):
        function(trained.policy, **(trained.target | dict(num_samples=16) | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=2), "options must be a behaviour that can draw every sequence, got {'top_k': 2}"),
        (dict(top_p=0.9), "got {'top_p': 0.9}; leave filters out"),
        (dict(min_p=0.1), "got {'min_p': 0.1}"),
        (dict(prefixes=[[1]] * 8), "prefixes must be None"),
    ],
)
def test_refuses_a_behaviour_without_support(trained, options, message):
    with pytest.raises(InputError, match=message):
        log_z_importance(trained.policy, num_samples=8, options=SamplingOptions(**options), **trained.target)


def test_refuses_draws_and_paths_that_do_not_fit(trained):
    def run(draws=None, **changes):
        bounds(trained.policy, draws=draws, **(trained.target | dict(num_samples=4) | changes))

    draws = _exact(trained, 4, 0)
    for prompts, message in (
        ([[1, 3]], r"prompts\[0\] of the rollouts must be"),
        ([[1], [2]], "of 2 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            run(draws, prompts=prompts)
    with pytest.raises(InputError, match="max_length of the rollouts must be 4, got 3"):
        run(draws, constraints=Constraints(0, max_length=4))
    with pytest.raises(InputError, match="logit_bias of the rollouts must be the target's"):
        run(draws, constraints=Constraints(0, max_length=3, logit_bias=torch.zeros(4)))
    two = dict(prompts=[[1], [2]])
    uneven = draw_exact(
        [[1], [2]], [[[]]] * 2, [torch.zeros(1)] * 2, num_samples=2, constraints=draws.constraints
    )
    uneven.group[1] = 1
    with pytest.raises(InputError, match=r"draws must be of equal number for every prompt, got \[1, 3\]"):
        run(uneven, **two)
    with pytest.raises(InputError, match="batches must be a divisor of 3 samples, got 2"):
        run(_exact(trained, 3, 0), batches=2)
    for schedule, message in (
        (0, ">= 1 steps, got 0"),
        ([0, 0.5, 0.5, 1], "a rise from 0 to 1"),
        ([1], "a rise"),
    ):
        with pytest.raises(InputError, match=message):
            run(schedule=schedule)
    with pytest.raises(InputError, match="termination must be 'forced', got 'own'"):
        run(constraints=Constraints(0, max_length=3, termination="own"))
    with pytest.raises(InputError, match="normalised, got a sum of"):
        draw_exact([[1]], [[[1], [2]]], [torch.zeros(2)], constraints=trained.constraints, num_samples=2)
    with pytest.raises(InputError, match="sequences must be 1 of them, got 2"):
        draw_exact([[1]], [[[1]]] * 2, [torch.zeros(1)], constraints=trained.constraints, num_samples=2)


def test_the_noise_is_neither_the_training_s_nor_that_of_the_exact_draws(trained):
    """A policy depends on the draws that it was trained on, and w of a reverse chain on where it begins."""
    target = {k: v for k, v in trained.target.items() if k in ("prompts", "constraints")}
    own = sample(policy=trained.policy, num_samples=64, seed=3, **target)
    drawn = Target(trained.policy, **trained.target).draw(64, seed=3)
    assert own.sequences() != drawn.sequences()
    streams = {tuple(torch.rand(4, generator=torch.Generator().manual_seed(s)).tolist()) for s in range(100)}
    for seed in range(4):
        for is_reverse in (False, True):
            chains = Chains(Target(trained.policy, **trained.target), seed, 4, is_reverse=is_reverse)
            found = tuple(torch.rand(4, generator=chains.generator).tolist())
            assert found not in streams
            streams.add(found)
