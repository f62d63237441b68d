"""Bad input to `sample` beyond shapes: the documented error, before anything is drawn."""

import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.rollout import PromptLookup, SamplingOptions, sample, sampling
from fastgfn.types import Constraints

MINUS = torch.full((13,), -torch.inf)
LIMITS = Constraints(0, min_length=1, max_length=6)


class Mask:
    def __init__(self, make):
        self.make = make

    def allowed(self, sequences):
        return self.make(len(sequences))


def only(*tokens):
    return Mask(lambda n: torch.zeros(n, 13, dtype=torch.bool).index_fill_(1, torch.tensor(tokens), True))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(precision=torch.int16), InputError, "precision must be None or a floating-point dtype"),
        (dict(precision=torch.int8, merge=False), InputError, "precision must be None without merge"),
        (
            dict(precision=torch.float8_e4m3fn),
            InputError,
            "precision must be torch.int8 or 16 bits or more on cpu, got torch.float8_e4m3fn; use torch.int8",
        ),
        (dict(precision=torch.complex64), InputError, "precision must be None or a floating-point"),
        (dict(precision="bfloat16"), InputError, "precision must be .* got 'bfloat16'; use torch.bfloat16"),
        (dict(precision=torch.bfloat16, merge=False), InputError, "precision must be None without merge"),
        (dict(drafts=PromptLookup()), InputError, "drafts must be a Drafts object, got PromptLookup"),
        (dict(num_samples=2.5), TypeError, "num_samples must be an int, got 2.5"),
        (dict(first_trajectory=2**64), InputError, r"first_trajectory must be in \[0, 2\^62\)"),
        (dict(first_trajectory=-1), InputError, "first_trajectory must be in"),
        (
            dict(grammar=Mask(lambda n: [[True] * 13] * n)),
            InputError,
            "grammar mask must be a bool tensor, got list",
        ),
        (
            dict(grammar=Mask(lambda n: torch.ones(n, 13))),
            InputError,
            "grammar mask must be a bool tensor, got torch.f",
        ),
        (
            dict(grammar=only(0)),
            InputError,
            "allowed tokens must be one at least in every state, got none; widen",
        ),
        (
            dict(
                constraints=Constraints(0, logit_bias=torch.full((13,), -99.0)),
                options=SamplingOptions(epsilon=0.5),
            ),
            InputError,
            "epsilon's tokens must be a token with a bias above -30.0 in every state, got none; set epsilon",
        ),
        (
            dict(
                constraints=Constraints(
                    0, logit_bias=MINUS.index_fill(0, torch.tensor([2]), 0.0), max_length=6
                ),
                options=SamplingOptions(prefixes=[[3]]),
            ),
            InputError,
            "prefixes must be of probability above 0, got 0; give prefixes that the vocabulary mask",
        ),
    ],
)
def test_refused(tiny_policy, options, kind, message):
    settings = dict(policy=tiny_policy(), constraints=LIMITS, num_samples=1) | options
    with pytest.raises(kind, match=f"sample: {message}"):
        sample([[1, 2]], **settings)


def test_prompts_with_fractions_are_refused(tiny_policy):
    with pytest.raises(TypeError, match=r"sample: prompts\[1\] must be token ids, got torch.float32"):
        sample([[1], [1.7, 2.2]], policy=tiny_policy(), constraints=LIMITS, num_samples=1)


@pytest.mark.parametrize("ids", [4, ("a",), (4.0,), [4]])
def test_termination_tokens_are_a_tuple_of_ids(ids):
    with pytest.raises(InputError, match="extra_termination_token_ids must be a tuple of ids"):
        Constraints(0, extra_termination_token_ids=ids)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.int8], ids=str)
def test_a_precision_that_no_layer_can_take_is_refused(tiny_policy, precision):
    policy = tiny_policy(dtype=torch.float32)
    for p in policy.model.parameters():
        p.requires_grad_(True)
    with pytest.raises(
        InputError, match=f"precision must be None where no layer can be merged, got {precision}"
    ):
        sample([[1]], policy=policy, constraints=LIMITS, num_samples=1, precision=precision)


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        (torch.int8, (9, 0), "floating point on cuda, got torch.int8; use torch.float8_e4m3fn, or torch.bf"),
        (torch.float8_e4m3fn, (8, 6), "16 bits or more on a GPU of compute capability 8.6, .*; use torch.bf"),
        (torch.float8_e4m3fn, (8, 9), None),
        (torch.float8_e4m3fn, (12, 0), None),
        (torch.bfloat16, (8, 0), None),
    ],
)
def test_precisions_that_a_gpu_lacks_are_refused(monkeypatch, precision, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        sampling.check_precision(precision, torch.device("cuda"))
        return
    with pytest.raises(InputError, match=f"sample: precision must be {message}"):
        sampling.check_precision(precision, torch.device("cuda"))
