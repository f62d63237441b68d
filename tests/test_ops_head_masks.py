"""Masks of rows in linear_log_probs and policy_reward_log_probs, by every provider that takes them."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch.profiler import profile

from fastgfn import checks
from fastgfn.functional import log_probs as public
from fastgfn.ops import head, head_tiles
from fastgfn.ops import linear_log_probs as op
from fastgfn.reference import linear_log_probs as plain
from fastgfn.testing import assert_close_to_truth

TRITON_DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
PROVIDERS = ("tiles", "row_pass", "row_pass_narrow")
DEFAULTS = dict(bias=None, logit_bias=None, logit_scale=1.0, final_logit_softcap=None, temperature=1.0,
                ignore_index=-100, termination_token_id=None)  # fmt: skip
EVERYTHING = {"logit_scale": -0.7, "final_logit_softcap": 4.0, "temperature": 1.3}
FIELDS = ("log_pf", "log_pterm", "lse")

pytestmark = pytest.mark.usefixtures("small_tiles")


def packed(allowed):
    return torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little"))


def make_inputs(num_rows, vocab, width, num_targets, *, num_masks=3, share=0.4, bias=False):
    """Targets that are allowed; the stop token is forbidden in some rows, and some rows have no mask."""
    allowed = torch.rand(num_masks, vocab) < share
    allowed[torch.arange(num_masks), torch.randint(vocab, (num_masks,))] = True
    allowed_row = torch.arange(num_rows) % (num_masks + 1) - 1
    dense = allowed[allowed_row] | (allowed_row < 0)[:, None]
    rows = torch.randint(max(num_rows, 1), (num_targets,))
    targets = [int(dense[r].nonzero().flatten()[i % int(dense[r].sum())]) for i, r in enumerate(rows)]
    inputs = {
        "hidden": torch.randn(num_rows, width, dtype=torch.float64),
        "weight": torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(max(width, 1)),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "rows": rows,
        "termination_token_id": vocab // 2,
        "allowed": packed(allowed),
        "allowed_row": allowed_row,
    }
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
        inputs["logit_bias"] = torch.where(torch.rand(vocab) < 0.3, -3.0, 0.0).double()
    return inputs


def by_provider(provider):
    def function(hidden, weight, targets, rows, **options):
        return op.linear_log_probs(hidden, weight, targets, rows, provider=provider, **(DEFAULTS | options))

    return function


def run(function, inputs, dtype, leaves, device="cpu"):
    """Outputs, and gradients of what is finite under a fixed random upstream gradient."""
    call = {n: t.to(device) if torch.is_tensor(t) else t for n, t in inputs.items()}
    for name in ("hidden", "weight", "bias", "logit_bias"):
        if name in call:
            call[name] = call[name].to(dtype).requires_grad_(name in leaves)
    tensors = [call[name] for name in leaves if name in call]
    out = function(*[call.pop(name) for name in ("hidden", "weight", "targets")], **call)
    generator, loss = torch.Generator().manual_seed(1), 0.0
    for o in out:
        upstream = torch.randn(o.shape, generator=generator).to(o)
        loss = loss + (upstream * o.masked_fill(o == -math.inf, 0.0)).sum()
    grads = torch.autograd.grad(loss, tensors)
    return [o.detach().cpu() for o in out], [g.cpu() for g in grads]


def compare(inputs, dtype, provider, trainable):
    leaves = ("hidden", "weight", "bias") if trainable else ("hidden",)
    device = "cpu" if provider == "tiles" else TRITON_DEVICE
    outs, grads = run(by_provider(provider), inputs, dtype, leaves, device)
    naive_outs, naive_grads = run(plain.linear_log_probs, inputs, dtype, leaves)
    rounded = {n: t.to(dtype).double() if torch.is_tensor(t) and t.is_floating_point() else t
               for n, t in inputs.items()}  # fmt: skip
    true_outs, true_grads = run(plain.linear_log_probs, rounded, torch.float64, leaves)
    for name, out, naive, true in zip(FIELDS, outs, naive_outs, true_outs, strict=True):
        finite = true > -math.inf
        assert torch.equal(out == -math.inf, ~finite), name
        assert_close_to_truth(name, out[finite], naive[finite], true[finite])
    for name, grad, naive, true in zip(leaves, grads, naive_grads, true_grads, strict=False):
        assert_close_to_truth(f"d_{name}", grad, naive, true, grad=True)


# Vocabularies of one tile and more that 8 does not divide, and masks that leave almost nothing or almost all.
CASES = {
    "plain": (dict(num_rows=6, vocab=37, width=7, num_targets=11), {}),
    "whole_bytes": (dict(num_rows=16, vocab=32, width=32, num_targets=9), {}),
    "vocab_533": (dict(num_rows=9, vocab=533, width=8, num_targets=40), {}),
    "few_allowed": (dict(num_rows=9, vocab=201, width=8, num_targets=12, share=0.005), {}),
    "most_allowed": (dict(num_rows=9, vocab=201, width=8, num_targets=12, share=0.99), {}),
    "one_mask": (dict(num_rows=9, vocab=77, width=8, num_targets=12, num_masks=1), {}),
    "softcap": (dict(num_rows=6, vocab=40, width=5, num_targets=9), dict(final_logit_softcap=2.0)),
    "everything": (dict(num_rows=9, vocab=85, width=21, num_targets=20, bias=True), EVERYTHING),
}


# Triton has no float64 provider, and "row_pass_narrow" is for a frozen head.
@pytest.mark.parametrize(
    ("provider", "dtype", "trainable"),
    [("tiles", d, t) for d in (torch.float64, torch.float32, torch.bfloat16) for t in (False, True)]
    + [("row_pass", d, t) for d in (torch.float32, torch.bfloat16) for t in (False, True)]
    + [("row_pass_narrow", d, False) for d in (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, provider, dtype, trainable):
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, dtype, provider, trainable)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("tile", [1, 3, 8, 13])
def test_tiles_that_begin_within_a_byte(monkeypatch, tile, trainable):
    monkeypatch.setattr(head_tiles, "VOCAB_TILE", tile)
    compare(make_inputs(7, 34, 6, 12, bias=True) | EVERYTHING, torch.float64, "tiles", trainable)


@pytest.mark.parametrize("provider", PROVIDERS[:2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_rows_and_of_the_vocabulary(monkeypatch, provider, chunk):
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk * 4 * 128)
    compare(make_inputs(7, 300, 6, 12, bias=True), torch.float32, provider, True)
    compare(make_inputs(7, 300, 6, 12, bias=True), torch.float32, provider, False)


def test_gradcheck():
    inputs = make_inputs(5, 11, 4, 7, bias=True) | EVERYTHING
    inputs["allowed"][:, 0] |= 1 << 5  # the stop token, which is read from every row
    tensors = [inputs.pop(n).requires_grad_() for n in ("hidden", "weight", "bias")]
    targets = inputs.pop("targets")

    def function(h, w, b):
        out = public.linear_log_probs(h, w, targets, bias=b, return_lse=True, **inputs)
        return out.log_pf, out.log_pterm, out.lse

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("provider", PROVIDERS[:2])
def test_a_forbidden_entry_has_no_gradient_of_its_own(provider):
    """Whatever comes from above: log p = -inf of a column that no weight can change."""
    device = "cpu" if provider == "tiles" else TRITON_DEVICE
    hidden, weight = torch.randn(1, 4), torch.randn(9, 4)
    allowed = torch.ones(1, 9, dtype=torch.bool)
    allowed[0, 3] = False
    row = torch.zeros(1, dtype=torch.int64)
    args = [hidden, weight, row + 3, row, packed(allowed), row]
    hidden, weight, targets, rows, bits, row = (x.to(device) for x in args)
    masks = {"allowed": bits, "allowed_row": row}
    grads = []
    for function in (by_provider(provider), plain.linear_log_probs):
        for leaves in ([hidden], [hidden, weight]):
            leaves = [x.clone().requires_grad_() for x in leaves]
            w = leaves[1] if len(leaves) > 1 else weight
            log_pf = function(leaves[0], w, targets, rows=rows, **masks)[0]
            assert log_pf.tolist() == [-math.inf]
            grads.append(torch.autograd.grad(log_pf.sum(), leaves))
    for got, want in zip(grads[0] + grads[1], grads[2] + grads[3], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_two_streams_mask_the_policy_alone(trainable):
    inputs = make_inputs(7, 85, 6, 12, bias=True)
    inputs.pop("logit_bias")
    policy, weight, targets, rows = (inputs.pop(n) for n in ("hidden", "weight", "targets", "rows"))
    reward = torch.randn(5, 6, dtype=torch.float64)
    call = dict(targets=(targets, torch.randint(85, (4,))), rows=(rows, torch.randint(5, (4,)))) | inputs
    results = []
    for function in (public.policy_reward_log_probs, plain.policy_reward_log_probs):
        leaves = [policy.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        streams = function(leaves[0], reward, leaves[1], return_lse=True, **call) if function is (
            public.policy_reward_log_probs) else function(leaves[0], reward, leaves[1], **call)  # fmt: skip
        streams = [(s.log_pf, s.log_pterm, s.lse) if hasattr(s, "lse") else s for s in streams]
        assert not any(o.requires_grad for o in streams[1])
        loss = streams[0][0].sum() + streams[0][2].cos().sum()
        grads = torch.autograd.grad(loss, leaves[: 1 + trainable])
        results.append([*streams[0], *streams[1], *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", [(0, 5, 3, 0), (3, 5, 3, 0), (1, 1, 1, 1), (1, 513, 1, 1)], ids=str)
def test_odd_shapes(shape, provider):
    compare(make_inputs(*shape, share=0.9), torch.float32, provider, False)


@pytest.mark.parametrize("provider", PROVIDERS[:2])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_repeatability(provider, trainable):
    inputs, leaves = make_inputs(9, 333, 5, 30, bias=True), ("hidden", "weight", "bias")[: 1 + 2 * trainable]
    device = "cpu" if provider == "tiles" else TRITON_DEVICE
    first, second = (run(by_provider(provider), inputs, torch.float32, leaves, device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("provider", PROVIDERS[:2])
def test_opcheck(provider, trainable):
    device = "cpu" if provider == "tiles" else TRITON_DEVICE
    inputs = make_inputs(3, 20, 4, 3)
    hidden, weight, bits, row = (inputs[n].to(device) for n in ("hidden", "weight", "allowed", "allowed_row"))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_(trainable)
    rows, columns = torch.tensor([0, 1, 2], device=device), torch.tensor([4, 4, 9], device=device)
    options = (1.0, 5.0, 1.3, not trainable, provider, None, bits, row)
    args = (hidden, weight, None, None, rows, columns, *options)
    torch.library.opcheck(torch.ops.fastgfn.linear_log_probs.default, args)


def test_no_matrix_of_rows_by_vocabulary():
    inputs = make_inputs(64, 4096, 4, 64)
    for leaves in (("hidden",), ("hidden", "weight")):
        largest = []
        for function in (by_provider("tiles"), plain.linear_log_probs):
            with profile(profile_memory=True) as trace:
                run(function, inputs, torch.float32, leaves)
            largest.append(max(event.self_cpu_memory_usage for event in trace.events()))
        assert largest[0] <= 64 * 512 * 4 + 1024 < 64 * 4096 * 4 <= largest[1]


ROWS, BITS = torch.tensor([0, -1]), torch.full((1, 1), 255, dtype=torch.uint8)
REFUSALS = {
    "alone": (
        dict(allowed_row=None),
        checks.InputError,
        "allowed must be beside allowed_row, got one of the",
    ),
    "width": (dict(allowed=BITS.repeat(1, 2)), checks.InputError, "allowed must be (U, 1), got (1, 2); pack"),
    "dtype": (dict(allowed=BITS.int()), checks.InputTypeError, "allowed must be uint8, got torch.int32"),
    "none": (
        dict(allowed=BITS[:0], allowed_row=-torch.ones_like(ROWS)),
        checks.InputError,
        "allowed must be one mask at least, got none; pass None without masks",
    ),
    "rows": (dict(allowed_row=ROWS[:1]), checks.InputError, "allowed_row must be (2,), got (1,)"),
    "kind": (dict(allowed_row=ROWS.float()), checks.InputTypeError, "allowed_row must be int32 or int64"),
    "range": (dict(allowed_row=ROWS + 1), checks.InputError, "allowed_row must be in [-1, 1), got [1]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_bad_input(case):
    change, kind, message = REFUSALS[case]
    masks = dict(allowed=BITS, allowed_row=ROWS) | change
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, 2])
    with pytest.raises(kind) as error:
        public.linear_log_probs(hidden, weight, targets, **masks)
    assert str(error.value).startswith(f"linear_log_probs: {message}")
    with pytest.raises(kind) as error:
        public.policy_reward_log_probs(hidden, hidden, weight, targets, **masks)
    assert str(error.value).startswith(f"policy_reward_log_probs: {message}")


def test_the_fused_provider_refuses_masks():
    inputs = make_inputs(3, 20, 4, 3)
    with pytest.raises(RuntimeError, match="provider must be one that masks rows, got 'fused'; pass None"):
        run(by_provider("fused"), inputs, torch.float32, (), TRITON_DEVICE)
