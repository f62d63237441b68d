"""Importance weights: values, clips, unknown behaviour, refusals."""

import math

import pytest
import torch
from loss_cases import close, f64

import fastgfn.functional as F


def test_importance_weights():
    log_q, behavior = f64([-1.0, -2.0, -3.0, 900.0]), f64([-1.0, -4.0, -2.0, 0.0])
    close(F.importance_weights(log_q[:3], behavior[:3]), [1.0, math.exp(2), math.exp(-1)])
    close(F.importance_weights(log_q, behavior, clip=4.0), [1.0, 4.0, math.exp(-1), 4.0])
    close(F.importance_weights(log_q, behavior, clip=(0.8, 1.2)), [1.0, 1.2, 0.8, 1.2])
    close(F.importance_weights(log_q, behavior, clip=[0.0, 2]), [1.0, 2.0, math.exp(-1), 2.0])
    leaf = log_q.float().requires_grad_()
    weights = F.importance_weights(leaf, behavior.bfloat16())
    assert weights.dtype == torch.float32 and not weights.requires_grad
    unknown = behavior.clone()
    unknown[1] = torch.nan
    assert F.importance_weights(log_q, unknown, clip=2.0, unknown_as_one=True).tolist()[1] == 1.0
    for args, options, kind, message in (
        (
            (log_q, unknown),
            {},
            ValueError,
            "log_behavior must be known .*, got NaN; pass unknown_as_one=True",
        ),
        ((log_q, behavior[:2]), {}, ValueError, r"log_behavior must be \(4,\), got \(2,\)"),
        ((log_q, behavior.long()), {}, TypeError, "log_behavior must be floating point"),
        (
            (log_q, behavior),
            dict(clip=(2.0, 1.0)),
            ValueError,
            r"clip must be 0 <= low <= high, got \(2.0, 1",
        ),
        ((log_q, behavior), dict(clip=0.0), ValueError, "clip must be 0 <= low <= high, got 0.0"),
    ):
        with pytest.raises(kind, match="importance_weights: " + message):
            F.importance_weights(*args, **options)
