import math
import shutil

import pytest
import torch

from fastgfn import checks
from fastgfn.functional import values
from fastgfn.functional.log_probs import log_probs_from_logits
from fastgfn.ops import log_probs_from_logits as op
from fastgfn.reference import log_probs_from_logits as plain
from fastgfn.testing import assert_close_to_truth, relative_error

EVERYTHING = {"logit_scale": 0.7, "final_logit_softcap": 4.0, "temperature": 1.3}
TRITON_DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def make_inputs(num_rows, vocab, *, scale=3.0, stop=True, mask=None, offset=0.0):
    inputs = {
        "logits": torch.randn(num_rows, vocab, dtype=torch.float64) * scale + offset,
        "targets": torch.randint(vocab, (num_rows,)),
        "termination_token_id": vocab // 2 if stop else None,
    }
    if mask is not None:
        inputs["logit_bias"] = torch.where(torch.rand(vocab) < 0.3, mask, 0.0).double()
    return inputs


def run(function, inputs, dtype, device="cpu"):
    """Outputs and the gradient under a fixed random upstream gradient of every entry."""
    call = {n: t.to(device) if torch.is_tensor(t) else t for n, t in inputs.items()}
    logits = call.pop("logits").to(dtype).requires_grad_()
    if "logit_bias" in call:
        call["logit_bias"] = call["logit_bias"].to(dtype)
    out = function(logits, call.pop("targets"), **call)
    out = (out.log_pf, out.log_pterm, out.lse) if hasattr(out, "lse") else out
    named = {n: o for n, o in zip(("log_pf", "log_pterm", "lse"), out, strict=True) if o is not None}
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(o.shape, generator=generator).to(o) * o).sum() for o in named.values())
    named = {n: o.detach().cpu() for n, o in named.items()}
    return named | {"d_logits": torch.autograd.grad(loss, logits)[0].cpu()}


def fused(backend):
    def function(*args, **kwargs):
        return log_probs_from_logits(*args, return_lse=True, backend=backend, **kwargs)

    return function


def compare(inputs, dtype, backend):
    outs = run(fused(backend), inputs, dtype, TRITON_DEVICE if backend == "triton" else "cpu")
    naive = run(plain.log_probs_from_logits, inputs, dtype)
    rounded = {n: t.to(dtype).double() if torch.is_tensor(t) and t.is_floating_point() else t
               for n, t in inputs.items()}  # fmt: skip
    truth = run(plain.log_probs_from_logits, rounded, torch.float64)
    assert outs.keys() == truth.keys()
    for name, out in outs.items():
        low = dtype if name == "d_logits" or dtype == torch.float64 else torch.float32
        assert out.dtype == low
        assert_close_to_truth(name, out, naive[name], truth[name], grad=name == "d_logits")


# Vocabularies that are not multiples of the block, one and several blocks.
CASES = {
    "plain": (dict(num_rows=5, vocab=33), {}),
    "two_tokens": (dict(num_rows=6, vocab=2), {}),
    "vocab_257": (dict(num_rows=4, vocab=257), {}),
    "vocab_50257": (dict(num_rows=2, vocab=50257), {}),
    "no_stop": (dict(num_rows=4, vocab=40, stop=False), {}),
    "peaked": (dict(num_rows=4, vocab=600, scale=20.0), {}),
    "offset_1e3": (dict(num_rows=4, vocab=600, offset=1e3), {}),
    "offset_-1e4": (dict(num_rows=4, vocab=600, offset=-1e4), {}),
    "mask_50": (dict(num_rows=4, vocab=40, mask=-50.0), {}),
    "mask_99": (dict(num_rows=4, vocab=5000, mask=-99.0), {}),
    "scale": (dict(num_rows=4, vocab=40), dict(logit_scale=0.3)),
    "softcap": (dict(num_rows=4, vocab=40), dict(final_logit_softcap=30.0)),
    "temperature": (dict(num_rows=4, vocab=40), dict(temperature=0.7)),
    "everything": (dict(num_rows=5, vocab=4100, mask=-3.0), EVERYTHING),
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is refused, see test_refuses_what_triton_cannot_run")
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, dtype, backend)


@pytest.mark.parametrize("targets", [[3] * 4, [-100, 3, 1, -100], [-100] * 4], ids=str)
def test_stop_and_ignored_targets(targets, backend):
    for stop in (True, False):
        inputs = make_inputs(4, 7, stop=stop) | {"targets": torch.tensor(targets)}
        compare(inputs, torch.float32, backend)
        compare(inputs | {"termination_token_id": 0}, torch.float32, backend)


def test_strided_targets(backend):
    targets = torch.tensor([[3, -7], [-100, -7], [1, -7], [6, -7]])[:, 0]
    assert not targets.is_contiguous()
    compare(make_inputs(4, 7) | {"targets": targets}, torch.float32, backend)


def test_chunk_boundaries(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 3 * 40)
    compare(make_inputs(10, 40, mask=-3.0) | EVERYTHING, torch.float64, "torch")


def test_softcap_is_accurate_near_zero(backend):
    inputs = make_inputs(3, 64, scale=1e-3) | {"final_logit_softcap": 1.0, "temperature": 1e-3}
    compare(inputs, torch.float32, backend)


@pytest.mark.parametrize("read", [0, 1], ids=["token", "stop"])
@pytest.mark.parametrize("p", [0.9, 0.998, 0.99996, 1 - 1e-6])
def test_confident_gradient(p, read, backend):
    logits = torch.randn(1, 600).double()
    column = (9, 599)[read]
    others = logits.clone().index_fill_(1, torch.tensor([column]), -math.inf).logsumexp(1)
    logits[0, column] = float(others) + math.log(p / (1 - p))
    grads = []
    for function, dtype in ((plain.log_probs_from_logits, torch.float64), (fused(backend), torch.float32)):
        leaf = logits.float().to(dtype)
        leaf = leaf.to(TRITON_DEVICE if dtype == torch.float32 and backend == "triton" else "cpu")
        leaf.requires_grad_()
        out = function(leaf, torch.tensor([9], device=leaf.device), termination_token_id=599)
        out = (out.log_pf, out.log_pterm) if hasattr(out, "lse") else out[:2]
        grads.append(torch.autograd.grad(out[read].sum(), leaf)[0].cpu())
    assert relative_error(grads[1], grads[0]) < 3 * 2.0**-24 / (1 - p) + 1e-5


def test_gradcheck():
    inputs = make_inputs(3, 11, mask=-2.0) | EVERYTHING | {"targets": torch.tensor([5, -100, 2])}
    logits = inputs.pop("logits").requires_grad_()

    def function(x):
        out = log_probs_from_logits(x, return_lse=True, **inputs)
        return out.log_pf, out.log_pterm, out.lse

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 4097), (3, 16)], ids=str)
def test_odd_shapes(shape, backend):
    compare(make_inputs(*shape), torch.float32, backend)
    compare(make_inputs(*shape, stop=False), torch.bfloat16, backend)


@pytest.mark.parametrize("layout", ["row_slice", "transposed", "column_slice"])
def test_strided_logits_and_int32_targets(layout, backend):
    full = torch.randn(5, 2, 70)
    logits = {"row_slice": full[:, 1], "transposed": full[:, 0].T.clone().T, "column_slice": full[:, 1, ::2]}
    logits = logits[layout].to(TRITON_DEVICE if backend == "triton" else "cpu")
    targets = torch.tensor([0, 1, -100, 34, 7], dtype=torch.int32, device=logits.device)
    out = log_probs_from_logits(logits, targets, termination_token_id=33, backend=backend)
    want = plain.log_probs_from_logits(logits, targets, termination_token_id=33)
    torch.testing.assert_close((out.log_pf, out.log_pterm), want[:2])


def test_minus_infinity(backend):
    logits = torch.randn(2, 5000, device=TRITON_DEVICE if backend == "triton" else "cpu")
    logits[:, 3:] = -math.inf
    logits[1] = -math.inf
    logits[1, 4999] = 7.0
    targets = torch.tensor([0, 4999], device=logits.device)
    out = log_probs_from_logits(logits, targets, termination_token_id=100, backend=backend)
    torch.testing.assert_close(
        out.log_pf.cpu(), torch.stack([logits[0].log_softmax(0)[0].cpu(), torch.tensor(0.0)])
    )
    assert bool((out.log_pterm == -math.inf).all())


def test_triton_marks_a_target_out_of_range():
    """On a GPU the public check would need a synchronisation, so the kernel must not read out of bounds."""
    logits = torch.randn(3, 9, device=TRITON_DEVICE)
    targets = torch.tensor([9, -1, 4], device=TRITON_DEVICE)
    options = dict(logit_bias=None, logit_scale=1.0, final_logit_softcap=None, temperature=1.0)
    log_pf, _, _ = op.log_probs_from_logits(
        logits, targets, termination_token_id=None, ignore_index=-100, backend="triton", **options
    )
    assert log_pf.isnan().tolist() == [True, True, False]


def test_what_is_not_checked_on_cuda_is_marked(monkeypatch, backend):
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    logits = torch.randn(4, 9, device=TRITON_DEVICE if backend == "triton" else "cpu").requires_grad_()
    targets = torch.tensor([9, -1, 4, -100], device=logits.device)
    out = log_probs_from_logits(logits, targets, termination_token_id=2, backend=backend)
    assert out.log_pf.isnan().tolist() == [True, True, False, False]
    torch.testing.assert_close(out.log_pterm, logits.log_softmax(1)[:, 2])
    (grad,) = torch.autograd.grad(out.log_pf.sum(), logits)
    assert bool((grad[[0, 1, 3]] == 0).all()) and bool((grad[2] != 0).all())


def test_repeatability(backend):
    inputs = make_inputs(9, 1333)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    first, second = (run(fused(backend), inputs, torch.float32, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck(backend):
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    logits = torch.randn(3, 20, requires_grad=True, device=device)
    targets, mask = torch.tensor([0, 5, -100], device=device), torch.randn(20, device=device)
    for stop in (7, None):
        args = (logits, targets, stop, mask, 0.7, 5.0, 1.3, -100, backend == "triton")
        torch.library.opcheck(torch.ops.fastgfn.log_probs_from_logits.default, args)


def test_second_derivative_is_refused(backend):
    logits = torch.randn(2, 5, requires_grad=True, device=TRITON_DEVICE if backend == "triton" else "cpu")
    targets = torch.tensor([1, 2], device=logits.device)
    loss = log_probs_from_logits(logits, targets, backend=backend).log_pf.sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), logits)


REFUSALS = {
    "dims": (dict(logits=torch.zeros(2, 3, 4)), checks.InputError, "logits must be (rows, columns)"),
    "dtype": (
        dict(logits=torch.zeros(2, 5).long()),
        checks.InputTypeError,
        "logits must be float16, bfloat16",
    ),
    "empty": (dict(logits=torch.zeros(2, 0)), checks.InputError, "the vocabulary must be non-empty, got 0"),
    "shape": (dict(targets=torch.tensor([1])), checks.InputError, "targets must be (2,), got (1,)"),
    "range": (dict(targets=torch.tensor([1, 5])), checks.InputError, "targets must be in [0, 5), got [5]"),
    "type": (dict(targets=torch.zeros(2)), checks.InputTypeError, "targets must be int32 or int64"),
    "stop": (
        dict(termination_token_id=-1),
        checks.InputError,
        "termination_token_id must be in [0, 5), got -1",
    ),
    "mask": (dict(logit_bias=torch.zeros(4)), checks.InputError, "logit_bias must be (5,), got (4,)"),
    "temperature": (dict(temperature=-1.0), checks.InputError, "temperature must be > 0, got -1.0"),
    "backend": (dict(backend="cuda"), checks.InputError, "backend must be one of 'auto', 'torch', 'triton'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_bad_input(case):
    change, kind, message = REFUSALS[case]
    with pytest.raises(kind) as error:
        log_probs_from_logits(**({"logits": torch.zeros(2, 5), "targets": torch.tensor([1, 2])} | change))
    assert message in str(error.value) and str(error.value).startswith("log_probs_from_logits: ")


def test_refuses_what_triton_cannot_run(monkeypatch):
    logits, targets = torch.zeros(2, 5), torch.tensor([1, 2])
    with pytest.raises(
        RuntimeError, match="backend must be 'torch' or 'auto' here, got 'triton' with torch.float64"
    ):
        log_probs_from_logits(logits.double(), targets, backend="triton")
    monkeypatch.setattr(op, "triton_runs_on", lambda device: device == "cuda")
    with pytest.raises(
        RuntimeError, match="got 'triton' with torch.float32 on cpu; Triton needs CUDA tensors"
    ):
        log_probs_from_logits(logits, targets, backend="triton")
    assert log_probs_from_logits(logits, targets).log_pf.shape == (2,)
