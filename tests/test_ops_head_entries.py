"""The entries of the head's ops, and that a call on an accelerator never asks for their values."""

import pytest
import torch

from fastgfn.ops import head, head_entries, head_trainable
from fastgfn.ops import linear_log_probs as op


@pytest.mark.parametrize("trainable", [False, True])
def test_no_call_off_the_cpu_needs_a_value_of_a_tensor(monkeypatch, trainable):
    """Meta tensors have none: whatever would wait for a GPU around the ops raises."""
    monkeypatch.setattr(op.head, "triton_runs_on", lambda device: True)
    hidden = torch.empty(6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(40, 8, device="meta", dtype=torch.bfloat16, requires_grad=trainable)
    targets, rows = (torch.empty(9, device="meta", dtype=torch.int64) for _ in range(2))
    options = dict(bias=None, logit_bias=None, logit_scale=1.0, final_logit_softcap=None, temperature=1.0)
    out = op.linear_log_probs(
        hidden, weight, targets, rows, termination_token_id=3, ignore_index=-100, **options
    )
    sum(x.sum() for x in out).backward()
    assert hidden.grad.shape == (6, 8) and (weight.grad is not None) == trainable
    with pytest.raises(NotImplementedError):
        targets.unique()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_no_step_of_a_gradient_needs_a_value_of_a_tensor(softcap):
    """What the ops above run on a GPU, but for the kernels, called itself: on meta tensors."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    rows, columns, _ = head_entries.by_row(*(meta(15, dtype=torch.int64) for _ in range(2)), 6, 40)
    assert head._starts(rows, 6).shape == (7,)
    hidden, weight = meta(6, 8, dtype=torch.bfloat16), meta(40, 8, dtype=torch.bfloat16)
    logits = (
        meta(15),
        meta(6),
        hidden,
        weight,
        None,
        meta(2, 40),
        rows,
        columns,
        meta(15),
        meta(15),
        meta(2, 6),
    )
    grads = head_trainable.backward(*logits, (1.0, softcap, 1.3), 4, [True, True, False])
    assert [tuple(g.shape) for g in grads] == [(6, 8), (40, 8), (0,)]


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_entries(num_rows):
    """by_row and by_column list the same distinct pairs and say where each pair is."""
    for num_pairs in (0, 1, 2, 30) if num_rows else (0,):
        rows, columns = torch.randint(max(num_rows, 1), (num_pairs,)), torch.randint(4, (num_pairs,))
        pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
        by_column = head_entries.by_column(rows, columns, num_rows)
        by_row = head_entries.by_row(rows, columns, num_rows, 4)
        for entry_rows, entry_columns, slot in (by_column, by_row):
            assert list(zip(entry_rows[slot].tolist(), entry_columns[slot].tolist(), strict=True)) == pairs
        distinct = sorted(set(pairs))
        num_spare = num_pairs - len(distinct)
        assert (
            list(zip(*(x.tolist() for x in by_row[:2]), strict=True))
            == distinct + [(num_rows, 0)] * num_spare
        )
        assert sorted(zip(*(x.tolist() for x in by_column[:2]), strict=True)) == distinct
