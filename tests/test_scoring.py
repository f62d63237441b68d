from itertools import product

import pytest
import torch

from fastgfn.evaluate import divergence, sequence_log_probs
from fastgfn.packing import pack
from fastgfn.scoring import score
from fastgfn.types import Constraints, Rollouts


@pytest.mark.parametrize("min_length", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["all-tokens", "masked"])
def test_forced_log_probs_sum_to_one_over_the_sequence_set(tiny_policy, min_length, masked):
    """The scored policy is a distribution on exactly the sequences that the constraints allow."""
    policy = tiny_policy(vocab=5)
    bias = torch.tensor([0.0, 0.0, -99.0, 0.0, 0.0]) if masked else None
    constraints = Constraints(0, min_length=min_length, max_length=3, logit_bias=bias)
    space = [list(z) for k in range(min_length, 4) for z in product(range(1, 5), repeat=k)]
    log_q, log_stop = sequence_log_probs([1, 2], space, policy=policy, constraints=constraints)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    assert (float(log_stop) == 0.0) == (min_length > 0)


def test_own_log_probs_leave_out_what_the_limits_cut(tiny_policy):
    policy = tiny_policy(vocab=5)
    space = [list(z) for k in range(4) for z in product(range(1, 5), repeat=k)]
    totals = []
    for termination in ("own", "forced"):
        constraints = Constraints(0, max_length=3, termination=termination)
        totals.append(
            float(sequence_log_probs([1, 2], space, policy=policy, constraints=constraints)[0].exp().sum())
        )
    assert totals[0] < 0.99 and totals[1] == pytest.approx(1.0, abs=1e-9)


def test_the_reference_view_is_the_model_without_its_adapter(tiny_policy):
    policy = tiny_policy()
    rollouts = Rollouts(
        (torch.tensor([1, 2]),),
        torch.tensor([0, 0]),
        torch.tensor([[3, 4], [5, 0]]),
        torch.tensor([2, 1]),
        torch.zeros(2),
        Constraints(0, max_length=2),
    )
    tree = pack(rollouts)
    with_adapter = score(tree, policy=policy).log_pf
    base = score(tree, policy=policy.reference).log_pf
    assert not base.requires_grad and with_adapter.requires_grad
    assert float((with_adapter - base).abs().max()) > 1e-3
    with torch.no_grad():
        for name, p in policy.parameters():
            if "lora_B" in name:
                p.zero_()
    torch.testing.assert_close(score(tree, policy=policy).log_pf.detach(), base)


def test_divergence_of_a_worked_example():
    log_q = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    log_p = torch.tensor([0.4, 0.4], dtype=torch.float64).log()
    got = divergence(log_q, log_p, 0.2)
    log = lambda x: float(torch.tensor(x, dtype=torch.float64).log())  # noqa: E731
    assert got.invalid_mass == pytest.approx(0.25)
    assert got.tv == pytest.approx(0.5 * (0.1 + 0.15 + 0.05))
    assert got.kl_target_to_model == pytest.approx(0.4 * log(0.8) + 0.4 * log(1.6) + 0.2 * log(0.8))
    assert got.kl_model_to_target == pytest.approx(0.5 * log(1.25) + 0.25 * log(0.625) + 0.25 * log(1.25))
