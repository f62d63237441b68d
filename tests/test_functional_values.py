"""What the public functions do with values out of range where values are not read, and in debug mode."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from fastgfn import checks
from fastgfn.functional import linear_log_probs, policy_reward_log_probs, values
from fastgfn.ops import head

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"


@pytest.mark.parametrize("provider", ["row_pass", "fused", "tiles"])
def test_what_is_not_checked_on_cuda_is_marked(monkeypatch, provider):
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    monkeypatch.setattr(head, "choose_provider", lambda *args, **kwargs: provider)
    hidden, weight = torch.randn(3, 5, device=DEVICE), torch.randn(37, 5, device=DEVICE)
    hidden.requires_grad_(provider != "fused")
    good = torch.tensor([1, 2, 3, 4, -100, 6], device=DEVICE)
    rows = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    bad, bad_rows = good.clone(), rows.clone()
    bad[0], bad[2], bad_rows[3] = 37 + 5, -1, 3
    options = dict(termination_token_id=7, return_lse=True)
    out, want = (
        linear_log_probs(hidden, weight, t, rows=r, **options) for t, r in ((bad, bad_rows), (good, rows))
    )
    assert out.log_pf.isnan().tolist() == [True, False, True, True, False, False]
    for name in ("log_pterm", "lse"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name))
    torch.testing.assert_close(out.log_pf[[1, 4, 5]], want.log_pf[[1, 4, 5]])
    policy, reward = policy_reward_log_probs(
        hidden, hidden, weight, (bad, good), rows=(rows, bad_rows), **options
    )
    assert policy.log_pf.isnan().tolist() == [True, False, True, False, False, False]
    assert reward.log_pf.isnan().tolist() == [False, False, False, True, False, False]
    torch.testing.assert_close(policy.lse, want.lse)
    if provider != "fused":
        grads = [torch.autograd.grad(o.log_pf[[1, 5]].sum(), hidden)[0] for o in (out, want)]
        torch.testing.assert_close(*grads)


def test_debug_reads_values_everywhere(monkeypatch):
    cuda = SimpleNamespace(device=torch.device("cuda"))
    assert values.are_read(torch.zeros(1)) and not values.are_read(cuda)
    monkeypatch.setenv("FASTGFN_DEBUG", "1")
    assert values.are_read(cuda)
    weight, targets = torch.zeros(5, 3), torch.tensor([5])
    with pytest.raises(checks.InputError, match=r"targets must be in \[0, 5\), got \[5\]"):
        linear_log_probs(torch.zeros(1, 3), weight, targets)
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    with pytest.raises(checks.InputError, match=r"rows must be in \[0, 0\), got \[0\]"):
        linear_log_probs(torch.zeros(0, 3), weight, targets, rows=torch.tensor([0]))
