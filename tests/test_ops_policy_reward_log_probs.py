import math
import shutil

import pytest
import torch

from fastgfn import checks
from fastgfn.functional import linear_log_probs, policy_reward_log_probs
from fastgfn.ops import head, head_tiles
from fastgfn.ops import linear_log_probs as op
from fastgfn.reference import linear_log_probs as plain
from fastgfn.testing import assert_close_to_truth

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
PROVIDERS = ("tiles", "row_pass", "row_pass_narrow")
EVERYTHING = {"logit_scale": 0.7, "final_logit_softcap": 4.0, "temperature": 1.3}


def make_inputs(num_policy, num_reward, vocab, width, num_targets, masks=(-3.0, -50.0), bias=True):
    sizes = (num_policy, num_reward)
    inputs = {
        "policy_hidden": torch.randn(num_policy, width, dtype=torch.float64),
        "reward_hidden": torch.randn(num_reward, width, dtype=torch.float64),
        "weight": torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(width),
        "targets": tuple(torch.randint(vocab, (m,)) for m in num_targets),
        "rows": tuple(torch.randint(max(r, 1), (m,)) for r, m in zip(sizes, num_targets, strict=True)),
        "termination_token_id": vocab // 2,
    }
    for name, mask in zip(("policy_logit_bias", "reward_logit_bias"), masks, strict=True):
        if mask is not None:
            inputs[name] = torch.where(torch.rand(vocab) < 0.3, mask, 0.0).double()
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
    return inputs


def cast(inputs, dtype, device="cpu"):
    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        if torch.is_tensor(value):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        return value

    return {name: move(value) for name, value in inputs.items()}


def run(function, inputs, leaves=("policy_hidden",)):
    """Outputs of both streams, and gradients of all outputs that have one."""
    call = dict(inputs)
    for name in leaves:
        call[name] = call[name].clone().requires_grad_()
    outs = {}
    for stream, out in zip(("policy", "reward"), function(**call), strict=True):
        out = (out.log_pf, out.log_pterm, out.lse) if hasattr(out, "lse") else out
        outs |= {f"{stream} {n}": o for n, o in zip(("log_pf", "log_pterm", "lse"), out, strict=True)}
    generator = torch.Generator().manual_seed(1)
    weighted = [(torch.randn(o.shape, generator=generator).to(o) * o).sum() for o in outs.values()]
    loss = sum(w for w in weighted if w.requires_grad)
    grads = torch.autograd.grad(loss, [call[name] for name in leaves])
    assert all(o.requires_grad == n.startswith("policy") for n, o in outs.items())
    return {n: o.detach().cpu() for n, o in outs.items()}, [g.cpu() for g in grads]


def stacked(**call):
    return policy_reward_log_probs(**call, return_lse=True)


def two_calls(policy_hidden, reward_hidden, weight, targets, *, rows, policy_logit_bias=None,
              reward_logit_bias=None, **options):  # fmt: skip
    policy = linear_log_probs(policy_hidden, weight, targets[0], rows=rows[0], return_lse=True,
                              logit_bias=policy_logit_bias, **options)  # fmt: skip
    with torch.no_grad():
        reward = linear_log_probs(reward_hidden, weight, targets[1], rows=rows[1], return_lse=True,
                                  logit_bias=reward_logit_bias, **options)  # fmt: skip
    return policy, reward


def with_provider(provider):
    """The public function's call with a provider that is not the table's."""

    def function(**call):
        defaults = dict(policy_logit_bias=None, reward_logit_bias=None, bias=None, logit_scale=1.0)
        defaults |= dict(final_logit_softcap=None, temperature=1.0, ignore_index=-100)
        return op.policy_reward_log_probs(**(defaults | call), provider=provider)

    return function


# One or both streams empty, one target for two rows, one mask or none, several vocabulary tiles on the CPU.
CASES = {
    "plain": (dict(num_policy=5, num_reward=4, vocab=37, width=7, num_targets=(9, 6)), {}),
    "everything": (dict(num_policy=4, num_reward=7, vocab=83, width=5, num_targets=(8, 8)), EVERYTHING),
    "no_masks": (
        dict(num_policy=3, num_reward=3, vocab=37, width=5, num_targets=(4, 5), masks=(None,) * 2),
        {},
    ),
    "policy_mask": (
        dict(num_policy=3, num_reward=3, vocab=37, width=5, num_targets=(4, 5), masks=(-9.0, None)),
        {},
    ),
    "reward_mask": (
        dict(num_policy=3, num_reward=3, vocab=37, width=5, num_targets=(4, 5), masks=(None, -9.0)),
        {},
    ),
    "no_reward": (dict(num_policy=3, num_reward=0, vocab=37, width=5, num_targets=(4, 0), bias=False), {}),
    "no_reward_even": (dict(num_policy=3, num_reward=0, vocab=37, width=6, num_targets=(4, 0)), {}),
    "no_policy": (dict(num_policy=0, num_reward=3, vocab=37, width=5, num_targets=(0, 4)), {}),
    "one_row": (dict(num_policy=1, num_reward=1, vocab=2, width=1, num_targets=(20, 1)), {}),
    "no_policy_even": (dict(num_policy=0, num_reward=3, vocab=37, width=8, num_targets=(0, 4)), {}),
    "even": (dict(num_policy=70, num_reward=9, vocab=530, width=8, num_targets=(80, 8)), EVERYTHING),
    "vocab_1333": (dict(num_policy=6, num_reward=5, vocab=1333, width=8, num_targets=(9, 9)), {}),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, provider):
    if dtype == torch.float64 and provider != "tiles":
        pytest.skip("float64 is refused by Triton")
    shape, options = CASES[case]
    inputs = make_inputs(**shape) | options
    device = "cpu" if provider == "tiles" else DEVICE
    outs, grads = run(with_provider(provider), cast(inputs, dtype, device))
    naive, naive_grads = run(plain.policy_reward_log_probs, cast(inputs, dtype))
    truth, true_grads = run(plain.policy_reward_log_probs, cast(cast(inputs, dtype), torch.float64))
    for name, out in outs.items():
        assert_close_to_truth(name, out, naive[name], truth[name])
    assert_close_to_truth("d policy_hidden", grads[0], naive_grads[0], true_grads[0], grad=True)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("case", CASES)
def test_equals_two_calls(case, trainable):
    shape, options = CASES[case]
    inputs = cast(make_inputs(**shape) | options, torch.float64)
    leaves = ("policy_hidden", *[n for n in ("weight", "bias") if trainable and n in inputs])
    outs, grads = run(stacked, inputs, leaves)
    want, want_grads = run(two_calls, inputs, leaves)
    torch.testing.assert_close(outs, want, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("provider", PROVIDERS[1:])
def test_chunks_across_the_streams(monkeypatch, provider):
    monkeypatch.setattr(head, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(head, "VOCAB_MULTIPLE", 8)
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 40 * 4)
    inputs = cast(make_inputs(4, 6, 37, 5, (6, 7)), torch.float32, DEVICE)
    outs, grads = run(with_provider(provider), inputs)
    want, want_grads = run(two_calls, inputs)
    torch.testing.assert_close(outs, want)
    torch.testing.assert_close(grads, want_grads)


def test_the_fused_provider_without_gradient():
    inputs = cast(make_inputs(4, 6, 37, 5, (6, 7)) | EVERYTHING, torch.float32, DEVICE)
    for streams in zip(with_provider("fused")(**inputs), two_calls(**inputs), strict=True):
        want = (streams[1].log_pf, streams[1].log_pterm, streams[1].lse)
        torch.testing.assert_close(streams[0], want)


def test_one_tensor_of_targets_serves_both_streams():
    inputs = cast(make_inputs(5, 5, 37, 7, (9, 9)), torch.float32)
    targets, rows = inputs["targets"][0], inputs["rows"][0]
    pairs = run(stacked, inputs | {"targets": (targets, targets), "rows": (rows, rows)})
    shared = run(stacked, inputs | {"targets": targets, "rows": rows})
    torch.testing.assert_close(pairs, shared, rtol=0, atol=0)
    square = run(stacked, inputs | {"targets": targets[:5], "rows": None})
    pairs = run(stacked, inputs | {"targets": targets[:5], "rows": torch.arange(5)})
    torch.testing.assert_close(square, pairs, rtol=0, atol=0)


def test_a_tile_of_the_weight_is_read_once_and_only_policy_rows_form_a_gradient(monkeypatch):
    shapes = []

    def product(x, weight, *rest):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return x @ weight.T

    monkeypatch.setattr(head_tiles, "product", product)
    run(stacked, cast(make_inputs(4, 6, 1000, 5, (6, 7)), torch.float32))
    both, policy = [((10, 5), (512, 5)), ((10, 5), (488, 5))], [((4, 512), (5, 512)), ((4, 488), (5, 488))]
    assert shapes == [both[0], policy[0], both[1], policy[1]]


@pytest.mark.skipif(
    not head_tiles.uses_csrc(*[torch.zeros(2, 2).bfloat16()] * 2), reason="no bfloat16 block product"
)
def test_bfloat16_takes_the_csrc_pass(monkeypatch):
    monkeypatch.setattr(head_tiles, "rest_by_tiles", None)
    inputs = cast(make_inputs(4, 6, 600, 8, (6, 7)), torch.bfloat16)
    outs, grads = run(stacked, inputs)
    want, want_grads = run(two_calls, inputs)
    torch.testing.assert_close(outs, want, rtol=0, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=0, atol=0)


def test_only_the_policy_gets_a_gradient():
    inputs = cast(make_inputs(4, 6, 37, 5, (6, 7)), torch.float32)
    inputs["reward_hidden"].requires_grad_()
    policy, reward = stacked(**inputs)
    assert not policy.log_pf.requires_grad and not reward.log_pf.requires_grad
    inputs["policy_hidden"].requires_grad_()
    policy, _ = policy_reward_log_probs(**inputs)
    assert policy.lse is None
    (policy.log_pf.sum() + policy.log_pterm.sum()).backward()
    assert inputs["reward_hidden"].grad is None and bool(inputs["policy_hidden"].grad.isfinite().all())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_repeatability(provider):
    inputs = cast(make_inputs(9, 6, 133, 5, (30, 20)), torch.float32, DEVICE)
    first, second = (run(with_provider(provider), inputs) for _ in range(2))
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_opcheck(trainable):
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(20, 4, requires_grad=trainable)
    rows, columns = torch.tensor([0, 1, 2]), torch.tensor([4, 4, 9])
    args = (hidden, weight, None, torch.randn(2, 20), rows, columns, 1.0, 5.0, 1.3, not trainable, "tiles", 5)
    torch.library.opcheck(torch.ops.fastgfn.linear_log_probs.default, args)


REFUSALS = {
    "hidden_dtype": (
        dict(reward_hidden=torch.zeros(3, 3).double()),
        TypeError,
        "weight must be torch.float64 like reward_hidden",
    ),
    "width": (dict(reward_hidden=torch.zeros(3, 4)), ValueError, "weight must be (V, 4), got (5, 3)"),
    "dims": (dict(policy_hidden=torch.zeros(3)), ValueError, "policy_hidden must be (rows, columns)"),
    "triple": (dict(rows=(torch.tensor([1]),) * 3), ValueError, "rows must be a tensor or a pair of tensors"),
    "list": (dict(targets=[1, 2, 3]), ValueError, "targets must be a tensor or a pair of tensors, got list"),
    "rows_range": (dict(rows=torch.tensor([0, 2])), ValueError, "rows must be in [0, 2), got [2]"),
    "targets_range": (dict(targets=torch.tensor([0, 5])), ValueError, "targets must be in [0, 5), got [5]"),
    "mask": (dict(reward_logit_bias=torch.zeros(4)), ValueError, "reward_logit_bias must be (5,), got (4,)"),
    "mask_grad": (
        dict(policy_logit_bias=torch.zeros(5).requires_grad_()),
        ValueError,
        "policy_logit_bias must be a constant",
    ),
    "unpaired": (dict(rows=None), ValueError, "pass one target per row of reward_hidden"),
    "stop": (dict(termination_token_id=5), ValueError, "termination_token_id must be in [0, 5), got 5"),
    "quantised": (dict(weight=torch.zeros(5, 3).char()), NotImplementedError, "log_probs_from_logits"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_bad_input(case):
    change, kind, message = REFUSALS[case]
    good = {"policy_hidden": torch.zeros(2, 3), "reward_hidden": torch.zeros(3, 3)}
    good |= {"weight": torch.zeros(5, 3), "targets": torch.tensor([1, 2]), "rows": torch.tensor([0, 1])}
    with pytest.raises(kind) as error:
        policy_reward_log_probs(**(good | change))
    assert message in str(error.value) and str(error.value).startswith("policy_reward_log_probs: ")


def test_refuses_fused_under_a_gradient():
    inputs = cast(make_inputs(4, 6, 37, 5, (6, 7)), torch.float32, DEVICE)
    inputs["policy_hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="policy_reward_log_probs: provider must be one that forms the gr"):
        with_provider("fused")(**inputs)
    with pytest.raises(checks.InputError, match="provider must be None or one of"):
        with_provider("cutlass")(**inputs)
