"""What a step trains on: every behaviour leaves the fixed point, is seeded, and does what it says."""

import math
from itertools import product

import pytest
import torch

from fastgfn.behavior import Origin
from fastgfn.checks import InputError, InputTypeError
from fastgfn.config import TrainConfig
from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.functional.importance import importance_weights
from fastgfn.objectives import modified_subtb_loss
from fastgfn.packing import pack
from fastgfn.passes import add_gradients, score_and_reward, trajectory_log_q
from fastgfn.rewards import SequenceReward
from fastgfn.rollout import sample
from fastgfn.train import Trainer
from fastgfn.types import Constraints

PROMPT = [1, 2]
SPACE = [list(z) for k in range(3) for z in product(range(1, 4), repeat=k)]
EVERYTHING = dict(
    num_samples=8,
    epsilon=(0.4, 0.1),
    epsilon_horizon=6,
    epsilon_share=0.25,
    replay_samples=6,
    local_search_samples=(2, 3),
    local_search_horizon=5,
    local_search_accept="metropolis",
    local_search_rounds=2,
    demonstration_samples=(3, 1),
    demonstration_horizon=4,
    seed_prompt_samples=3,
    importance_clip=(0.1, 3.0),
)


def _value(z):
    return 0.7 * sum(z) - 1.5 * len(z)


def _trainer(policy, prompts=(PROMPT,), constraints=None, reward=None, grammar=None, **options):
    given = {
        k: options.pop(k) for k in ("demonstrations", "seed_prompts", "seed_constraints") if k in options
    }
    config = dict(replay_capacity=18, replay_duplicates="exact", replay_priority="uniform", warmup_steps=2)
    return Trainer(
        policy,
        prompts=prompts,
        reward=reward or SequenceReward(lambda zs: [_value(z) for z in zs]),
        constraints=constraints or Constraints(0, max_length=2),
        config=TrainConfig(**(config | options)),
        grammar=grammar,
        **given,
    )


def _drawn(trainer, step=1, micro=0):
    return trainer.explorer.draw(step, micro, reward=trainer.reward, first_trajectory=trainer.trajectories)


@pytest.mark.parametrize(
    "options",
    [
        dict(tempered_share=(1.0, 0.5), temperature_range=(1.0, 2.0), importance_clip=(0.1, 2.0)),
        dict(epsilon=(0.5, 0.1), epsilon_horizon=40, epsilon_share=0.5),
        dict(num_samples=6, replay_share=(0.75, 0.75)),
        dict(local_search_samples=(4, 4), replay_samples=6),
        dict(local_search_samples=(6, 0), local_search_from="buffer", local_search_accept="always",
             local_search_horizon=60, replay_samples=4, demonstrations=[(0, z) for z in SPACE[5:]]),
        EVERYTHING | dict(num_samples=24, local_search_rounds=1, importance_clip=(0.5, 2.0),
             demonstration_samples=(4, 4), demonstrations=[(0, z) for z in SPACE], seed_prompts=[[3]],
             max_grad_norm=5.0),
    ],
    ids=["tempered, weighted", "epsilon", "75 % replay", "better", "always, from the buffer", "everything"],
)  # fmt: skip
def test_every_behaviour_learns_the_same_posterior(tiny_policy, options):
    policy = tiny_policy(vocab=4, dtype=torch.float32, scale=2.0, rank=8)
    constraints = Constraints(0, max_length=2)
    log_r = torch.tensor([_value(z) for z in SPACE], dtype=torch.float64)

    def distance():
        log_q, _ = sequence_log_probs(PROMPT, SPACE, policy=policy, constraints=constraints)
        return divergence(log_q, log_r - log_r.logsumexp(0), 0.0).tv

    assert distance() > 0.3
    trainer = _trainer(policy, **(dict(steps=60, num_samples=24, learning_rate=2e-2) | options))
    for _ in range(60):
        metrics = trainer.step()
    assert distance() <= 0.02
    assert metrics["log_z"] == pytest.approx(float(log_r.logsumexp(0)), abs=0.02)


def _everything(policy, **options):
    return _trainer(
        policy,
        prompts=[PROMPT, [3]],
        demonstrations=[(0, [1, 2]), (0, [3]), (1, []), (1, [2, 2])],
        seed_prompts=[[4, 4], None],
        **(EVERYTHING | dict(steps=5, accumulation=2, learning_rate=1e-2) | options),
    )


def test_all_behaviours_resume_bit_identical_and_follow_the_seed(tiny_policy, tmp_path):
    def weights(trainer):
        return torch.cat([p.detach().flatten() for _, p in trainer.policy.parameters()])

    def fresh(**options):
        return _everything(tiny_policy(dtype=torch.float32), **options)

    straight, stopped, other = fresh(), fresh(), fresh(seed=1)
    straight.fit(tmp_path / "a")
    assert not stopped.fit(tmp_path / "b", should_stop=lambda: stopped.steps_done == 3)
    resumed = fresh()
    assert resumed.resume(tmp_path / "b") == 3 and resumed.fit(tmp_path / "b")
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.buffer.state() == straight.buffer.state()
    assert (resumed.trajectories, resumed.tokens) == (straight.trajectories, straight.tokens)
    other.fit(tmp_path / "c")
    assert not torch.equal(weights(other), weights(straight))
    with pytest.raises(InputError, match="demonstrations and seed prompts must be .*; resume with"):
        _trainer(
            tiny_policy(dtype=torch.float32), prompts=[PROMPT, [3]], demonstrations=[(0, [1])],
            **(EVERYTHING | dict(steps=5, accumulation=2, learning_rate=1e-2)),
        ).resume(tmp_path / "b")  # fmt: skip


def test_every_row_comes_from_where_it_says(tiny_policy):
    trainer = _everything(tiny_policy(dtype=torch.float32), prompts_per_step=2)
    for _ in range(4):
        trainer.step()
    drawn = _drawn(trainer, step=4)
    counts = torch.bincount(drawn.origin, minlength=4).tolist()
    assert counts[Origin.DRAWN] == 16 and counts[Origin.REPLAYED] == 12
    assert counts[Origin.DEMONSTRATION] == 2, "one of each prompt from step 4 on"
    assert drawn.num_trajectories == 16 + 2 * 2 * 3, "three searches of each prompt, two rounds"
    assert 0 < counts[Origin.LOCAL_SEARCH] <= 12
    rollouts, unknown = drawn.rollouts, drawn.rollouts.log_behavior.isnan()
    of_search = drawn.origin == Origin.LOCAL_SEARCH
    assert bool(unknown[of_search].all()) and not bool(unknown[drawn.origin == Origin.DRAWN].any())
    rows = [n for n, kind in enumerate(drawn.origin.tolist()) if kind == Origin.DEMONSTRATION]
    given = {(1, 2): [[1, 2], [3]], (3,): [[], [2, 2]]}
    for n in rows:
        assert rollouts.sequences()[n] in given[tuple(rollouts.prompts[rollouts.group[n]].tolist())]
    before = len(trainer.buffer)
    trainer.explorer.remember(drawn, torch.arange(rollouts.num_trajectories).double()[:, None], 0)
    kept = {(p, e.tokens) for p in ((1, 2), (3,)) for e in trainer.buffer.entries(p)}
    assert len(trainer.buffer) >= before
    for n in (drawn.origin <= Origin.LOCAL_SEARCH).nonzero()[-3:, 0].tolist():
        prompt = tuple(rollouts.prompts[rollouts.group[n]].tolist())
        assert (prompt, tuple(rollouts.sequences()[n])) in kept


def test_epsilon_draws_are_uniform_in_their_share(tiny_policy):
    """One token in 13 each, the stop among them, in the last rows of every prompt; the policy elsewhere."""
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), prompts=[PROMPT, [3]], prompts_per_step=2, num_samples=400,
        tempered_share=(0.0, 0.0), epsilon=(1.0, 0.0), epsilon_horizon=4, epsilon_share=0.5,
        constraints=Constraints(0, max_length=3),
    )  # fmt: skip
    drawn = _drawn(trainer, step=0).fresh
    assert drawn.num_trajectories == 800 and torch.bincount(drawn.group).tolist() == [400, 400]
    num_draws = (drawn.lengths + drawn.terminated).float()
    uniform = -num_draws * math.log(13)
    own = drawn.log_pf.sum(1) + drawn.log_pterm.gather(1, drawn.lengths[:, None])[:, 0]
    torch.testing.assert_close(drawn.log_behavior[400:], uniform[400:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.log_behavior[:400], own[:400], rtol=1e-5, atol=1e-5)
    first = torch.where(drawn.lengths > 0, drawn.tokens[:, 0], 0)[400:]
    statistic = float(((torch.bincount(first, minlength=13) - 400 / 13) ** 2 / (400 / 13)).sum())
    assert statistic < 32.9, "chi-squared, 12 degrees of freedom, p = 1e-3"
    assert len(_drawn(trainer, step=4).fresh.log_behavior) == 800 and trainer.config.epsilon_at(4) == 0.0


@pytest.mark.parametrize("source", ["best", "random", "buffer"])
def test_accepted_sequences_are_no_worse_and_are_stored(tiny_policy, source):
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), num_samples=6, replay_samples=2, local_search_samples=(3, 3),
        local_search_from=source, constraints=Constraints(0, max_length=3),
    )  # fmt: skip
    trainer.step()
    drawn = _drawn(trainer)
    accepted = [z for z, kind in zip(drawn.rollouts.sequences(), drawn.origin, strict=True) if kind == 1]
    pool = (
        drawn.fresh.sequences() if source != "buffer" else [e.tokens for e in trainer.buffer.entries(PROMPT)]
    )
    assert len(accepted) <= 3 and drawn.num_trajectories == 9
    worst = sorted(map(_value, pool))[-3] if source == "best" and len(set(map(tuple, pool))) == 6 else -99
    assert all(_value(z) >= worst for z in accepted)
    values = torch.tensor([_value(z) for z in drawn.rollouts.sequences()]).double()
    trainer.explorer.remember(drawn, values[:, None], 0)
    assert {tuple(z) for z in accepted} <= {e.tokens for e in trainer.buffer.entries(PROMPT)}


def test_a_replay_share_fills_up_the_batch(tiny_policy):
    trainer = _trainer(
        tiny_policy(dtype=torch.float32), num_samples=3, replay_share=(0.0, 0.75), replay_horizon=6,
        constraints=Constraints(0, max_length=4),
    )  # fmt: skip
    assert [trainer.config.replay_samples_at(step) for step in (0, 2, 4, 6, 9)] == [0, 1, 3, 9, 9]
    for _ in range(9):
        trainer.step()
    counts = torch.bincount(_drawn(trainer, step=9).origin).tolist()
    assert counts == [3, 0, 9], "75 % of twelve"


def test_demonstrations_and_seeds_are_in_the_buffer_with_their_reward(tiny_policy):
    policy = tiny_policy(dtype=torch.float32)
    cut = Constraints(0, max_length=2, extra_termination_token_ids=(5, 6))
    trainer = _trainer(
        policy, prompts=[PROMPT, [3]], constraints=Constraints(0, max_length=3), num_samples=2,
        demonstrations=[(0, [1, 2, 3]), (0, torch.tensor([5])), (1, [])], replay_samples=2,
        seed_prompts=[None, [4, 4]], seed_constraints=cut, seed_prompt_samples=5, seed_prompt_temperature=1.5,
        prompts_per_step=2,
    )  # fmt: skip
    want = sample(
        [[4, 4]], policy=policy, constraints=cut, num_samples=5, temperature=1.5, seed=0
    ).sequences()
    assert not any({5, 6} & set(z) for z in want)
    metrics = trainer.step()
    assert metrics["trajectories"] == 5 + 4
    first, second = ({e.tokens: e.log_reward for e in trainer.buffer.entries(p)} for p in (PROMPT, [3]))
    assert first[1, 2, 3] == pytest.approx(_value([1, 2, 3])) and first[(5,)] == pytest.approx(_value([5]))
    assert second[()] == 0.0 and {tuple(z) for z in want} <= second.keys()
    assert all(value == pytest.approx(_value(z)) for z, value in (first | second).items())


def test_without_draws_there_must_be_something_stored(tiny_policy):
    policy = tiny_policy(dtype=torch.float32)
    only_replay = dict(num_samples=0, replay_samples=4)
    empty = _trainer(
        policy, prompts=[PROMPT, [3]], prompts_per_step=2, demonstrations=[(1, [2])], **only_replay
    )
    want = r"the replay buffer must be a stored sequence .* got none for prompt \[1, 2\]; draw some, or pass"
    with pytest.raises(InputError, match=want):
        empty.step()
    assert empty.steps_done == 0 and len(empty.buffer) == 0
    given = [(0, z) for z in SPACE]
    for options in (only_replay, dict(num_samples=0, demonstration_samples=(4, 4))):
        trainer = _trainer(policy, demonstrations=given, **options)
        metrics = [trainer.step() for _ in range(2)][-1]
        assert metrics["trajectories"] == metrics["tokens"] == 0 and metrics["drift"] == 0.0
        assert metrics["loss"] > 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("max_tokens", [None, 9])
def test_importance_weights_multiply_the_loss_of_their_trajectories(tiny_policy, max_tokens):
    """The gradient is that of the weighted objective; an unknown behaviour density weighs 1."""
    policy, clip = tiny_policy(), (0.3, 1.5)
    constraints, reward = Constraints(0, max_length=3), SequenceReward(lambda zs: [_value(z) for z in zs])
    drawn = sample([PROMPT, [3]], policy=policy, constraints=constraints, num_samples=8, temperature=1.7)
    behavior = drawn.log_behavior.index_fill(0, torch.tensor([0, 9]), torch.nan)
    tree = pack(drawn)
    result = add_gradients(
        tree, policy=policy, reward=reward, log_behavior=behavior, importance_clip=clip, max_tokens=max_tokens
    )
    got = [p.grad.clone() for _, p in policy.parameters()]
    policy.model.zero_grad()
    log_probs, log_r = score_and_reward(tree, policy=policy, reward=reward)
    log_q = trajectory_log_q(log_probs, tree)
    torch.testing.assert_close(result.log_q, log_q, rtol=1e-6, atol=1e-6)
    weights = importance_weights(log_q, behavior, clip=clip, unknown_as_one=True)
    assert weights[[0, 9]].tolist() == [1.0, 1.0] and len(weights.unique()) > 4
    loss = modified_subtb_loss(log_probs, tree=tree, log_reward=log_r, weights=weights).loss
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    for value, (_, p) in zip(got, policy.parameters(), strict=True):
        torch.testing.assert_close(value, p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(demonstrations=[(0, [1])]), "demonstrations must be none where nothing uses them, got 1; set"),
        (dict(demonstration_samples=(2, 0)), r"demonstration_samples must be \(0, 0\) without demonstr"),
        (dict(demonstrations=[(2, [1])]), r"the prompt of demonstrations\[0\] must be an index in \[0, 1\)"),
        (dict(demonstrations=[(0, [1]), (0, [13])]), r"demonstrations\[1\] must be of ids in \[0, 13\), got"),
        (dict(demonstrations=[(0, [1.5])]), r"demonstrations\[0\] must be token ids, got \[1.5\]; encode"),
        (dict(demonstrations=[(0, [1, 0])]), r"must be without the termination tokens \[0\], got \[1, 0"),
        (dict(demonstrations=[(0, [1, 2, 3])]), r"must be of 0 to 2 tokens, got \[1, 2, 3\]; shorten"),
        (dict(demonstrations=[(0, [7])]), r"must be without the masked tokens \[7\], got \[7\]"),
        (dict(seed_prompts=[[4], [4]]), "seed_prompts must be 1, got 2; give one per prompt"),
        (dict(seed_prompts=[[4]], seed_prompt_samples=0), "seed_prompt_samples must be >= 1 with seed_pro"),
        (dict(seed_prompts=[[40]]), r"must be ids in \[0, 13\)"),
        (dict(seed_prompts=[[4]], seed_constraints=Constraints(0, max_length=3)), "of 0 to 2 tokens, got 0"),
        (dict(seed_prompts=[[4]], seed_constraints=Constraints(5, max_length=2)), "with the termination tok"),
        (dict(seed_prompts=[[4]], seed_constraints=Constraints(0, max_length=2)), "with a mask no wider"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_the_run(tiny_policy, given, message):
    bias = torch.zeros(13).index_fill(0, torch.tensor(7), -99.0)
    constraints = Constraints(0, max_length=2, logit_bias=bias)
    has_use = "none where" not in message and "demonstration_samples" not in given
    options = given | (dict(replay_samples=2) if has_use else {})
    with pytest.raises((InputError, InputTypeError), match=message):
        _trainer(tiny_policy(), constraints=constraints, **options)
    if "seed_prompts" in given:
        with pytest.raises(InputError, match="seed_prompts must be None without replay"):
            _trainer(tiny_policy(), constraints=constraints, seed_prompts=[[4]])


class _Ascending:
    """Tokens 1 to 5 in ascending order; an odd sum may stop."""

    def allowed(self, sequences):
        mask = torch.zeros(len(sequences), 13, dtype=torch.bool)
        for row, z in zip(mask, sequences, strict=True):
            row[(z[-1] + 1 if z else 1) : 6] = True
            row[0] = sum(z) % 2 == 1 or not bool(row.any())
        return mask


def test_all_behaviours_stay_within_a_grammar(tiny_policy):
    constraints = Constraints(0, max_length=6)
    demonstrations = [(0, [1]), (0, [2, 3])]
    options = EVERYTHING | dict(seed_prompts=[[4]], grammar=_Ascending(), constraints=constraints)
    trainer = _trainer(tiny_policy(dtype=torch.float32), demonstrations=demonstrations, **options)
    for _ in range(3):
        trainer.step()
    drawn = _drawn(trainer, step=0)
    assert set(drawn.origin.tolist()) == {0, 1, 2, 3}
    for z in drawn.rollouts.sequences():
        assert z == sorted(set(z)) and (sum(z) % 2 == 1 or z[-1] == 5)
    for z, want in (([2, 1], "one that the grammar allows"), ([2], "one that the grammar lets end there")):
        with pytest.raises(InputError, match=rf"demonstrations\[0\] must be {want}, got"):
            _trainer(tiny_policy(), demonstrations=[(0, z)], **options)


def test_a_mask_narrower_than_the_vocabulary_is_refused(tiny_policy):
    class Narrow:
        def allowed(self, sequences):
            return torch.ones(len(sequences), 9, dtype=torch.bool)

    with pytest.raises(InputError, match="Trainer: grammar mask must .*; return a column per token"):
        _trainer(tiny_policy(), grammar=Narrow(), demonstrations=[(0, [11])], replay_samples=2)


def test_a_failed_first_step_stores_what_was_given_once_more(tiny_policy):
    """With the draws of an undisturbed run."""
    calls, failing = [], []

    def value(zs):
        calls.append(len(zs))
        if failing and len(calls) == failing[0]:
            raise RuntimeError("the scorer is down")
        return [_value(z) for z in zs]

    options = dict(num_samples=4, replay_samples=3, seed_prompts=[[4]], demonstrations=[(0, [9])])
    runs = [_trainer(tiny_policy(dtype=torch.float32), reward=SequenceReward(value), **options) for _ in "ab"]
    want = [runs[0].step() for _ in range(2)]
    failing.append(len(calls) + 2)
    with pytest.raises(RuntimeError):
        runs[1].step()
    assert len(runs[1].buffer) == 0 and runs[1].trajectories == 0
    assert [runs[1].step() for _ in range(2)] == want
