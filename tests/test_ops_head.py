"""The Triton providers of linear_log_probs, at tiny shapes in the interpreter, or compiled on a GPU."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from fastgfn import checks
from fastgfn.functional.log_probs import linear_log_probs as public
from fastgfn.kernels import head as kernels
from fastgfn.kernels import head_fused
from fastgfn.ops import head
from fastgfn.ops import linear_log_probs as op
from fastgfn.reference import linear_log_probs as plain
from fastgfn.testing import assert_close_to_truth, relative_error

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
ROW_PASSES = ("row_pass", "row_pass_narrow")
TRITON = (*ROW_PASSES, "fused")
DEFAULTS = dict(rows=None, termination_token_id=None, bias=None, logit_bias=None, logit_scale=1.0,
                final_logit_softcap=None, temperature=1.0, ignore_index=-100)  # fmt: skip
EVERYTHING = {"logit_scale": 0.7, "final_logit_softcap": 4.0, "temperature": 1.3}


pytestmark = pytest.mark.usefixtures("small_tiles")


def make_inputs(num_rows, vocab, width, num_targets, *, scale=1.0, stop=True, bias=False, mask=None):
    inputs = {
        "hidden": torch.randn(num_rows, width, dtype=torch.float64) * scale,
        "weight": torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(max(width, 1)),
        "targets": torch.randint(vocab, (num_targets,)),
        "rows": torch.randint(max(num_rows, 1), (num_targets,)),
        "termination_token_id": vocab // 2 if stop else None,
    }
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
    if mask is not None:
        inputs["logit_bias"] = torch.where(torch.rand(vocab) < 0.3, mask, 0.0).double()
    return inputs


def with_provider(provider):
    def function(hidden, weight, targets, **options):
        options = DEFAULTS | options
        rows = options.pop("rows")
        rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
        return op.linear_log_probs(hidden, weight, targets, rows, provider=provider, **options)

    return function


def run(function, inputs, dtype, leaves=("hidden",), device="cpu"):
    """Outputs and gradients under a fixed random upstream gradient of every entry; no leaves: no gradient."""
    call = {n: t.to(device) if torch.is_tensor(t) else t for n, t in inputs.items()}
    for name in ("hidden", "weight", "bias", "logit_bias"):
        if name in call:
            call[name] = call[name].to(dtype).requires_grad_(name in leaves)
    tensors = [call[name] for name in leaves if name in call]
    out = function(*[call.pop(name) for name in ("hidden", "weight", "targets")], **call)
    named = {n: o for n, o in zip(("log_pf", "log_pterm", "lse"), out, strict=True) if o is not None}
    grads = {}
    if tensors:
        generator = torch.Generator().manual_seed(1)
        loss = sum((torch.randn(o.shape, generator=generator).to(o) * o).sum() for o in named.values())
        values = torch.autograd.grad(loss, tensors)
        grads = {f"d_{i}": g.cpu() for i, g in enumerate(values)}
    return {n: o.detach().cpu() for n, o in named.items()}, grads


def rounded(inputs, dtype):
    return {n: t.to(dtype).double() if torch.is_tensor(t) and t.is_floating_point() else t
            for n, t in inputs.items()}  # fmt: skip


def compare(inputs, dtype, provider, trainable=False):
    leaves = ("hidden", "weight", "bias") if trainable else () if provider == "fused" else ("hidden",)
    outs, grads = run(with_provider(provider), inputs, dtype, leaves, DEVICE)
    naive_outs, naive_grads = run(plain.linear_log_probs, inputs, dtype, leaves)
    true_outs, true_grads = run(plain.linear_log_probs, rounded(inputs, dtype), torch.float64, leaves)
    assert outs.keys() == true_outs.keys() and grads.keys() == true_grads.keys()
    for name, out in outs.items():
        assert out.dtype == torch.float32
        assert_close_to_truth(name, out, naive_outs[name], true_outs[name])
    assert all(bool((outs[n] <= 0).all()) for n in ("log_pf", "log_pterm") if n in outs)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_to_truth(name, grad, naive_grads[name], true_grads[name], grad=True)


# Widths and vocabularies that no tile divides; rows without an entry, and no entry at all.
CASES = {
    "plain": (dict(num_rows=5, vocab=37, width=7, num_targets=9), {}),
    "two_tokens": (dict(num_rows=3, vocab=2, width=4, num_targets=6), {}),
    "even": (dict(num_rows=16, vocab=32, width=32, num_targets=9), {}),
    "vocab_257": (dict(num_rows=19, vocab=257, width=33, num_targets=6), {}),
    "one_row_20_targets": (dict(num_rows=1, vocab=37, width=5, num_targets=20), {}),
    "rows_without_entries": (dict(num_rows=6, vocab=37, width=5, num_targets=3, stop=False), {}),
    "no_entries": (dict(num_rows=3, vocab=37, width=5, num_targets=0, stop=False), {}),
    "peaked": (dict(num_rows=5, vocab=60, width=5, num_targets=9, scale=8.0), {}),
    "bias": (dict(num_rows=4, vocab=40, width=5, num_targets=7, bias=True), {}),
    "mask_50": (dict(num_rows=4, vocab=40, width=5, num_targets=7, mask=-50.0), {}),
    "mask_99": (dict(num_rows=4, vocab=70, width=5, num_targets=7, mask=-99.0), {}),
    "scale": (dict(num_rows=4, vocab=40, width=5, num_targets=7), dict(logit_scale=-0.3)),
    "softcap": (dict(num_rows=4, vocab=40, width=5, num_targets=7), dict(final_logit_softcap=2.0)),
    "temperature": (dict(num_rows=4, vocab=40, width=5, num_targets=7), dict(temperature=0.7)),
    "everything": (dict(num_rows=9, vocab=83, width=21, num_targets=20, bias=True, mask=-3.0), EVERYTHING),
}


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, provider):
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, dtype, provider)


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_float16(case, provider):
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, torch.float16, provider)


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_trainable_head(case, provider):
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, torch.float32, provider, trainable=True)


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("vocab", [32, 50257])
def test_real_tiles(monkeypatch, vocab, provider):
    monkeypatch.undo()
    if vocab > 32 and DEVICE == "cpu":
        # The interpreter takes a hundredth of a second per tile.
        monkeypatch.setattr(head_fused, "SINGLE", (16, 2048, 16, 4, 3))
    compare(make_inputs(3, vocab, 3, 5), torch.float32, provider)


def test_vocabulary_of_151936(monkeypatch):
    monkeypatch.undo()
    compare(make_inputs(2, 151936, 2, 3), torch.float32, "row_pass")


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("targets", [[3] * 6, [4] * 6, [3, -100, 4, 4, 3, -100], [-100] * 6], ids=str)
def test_repeated_ignored_and_stop_targets(targets, provider):
    inputs = make_inputs(2, 7, 4, 6) | {"targets": torch.tensor(targets)}
    inputs["rows"] = torch.tensor([0, 0, 0, 0, 1, 1])
    compare(inputs, torch.float32, provider)


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_common_logit_offset(offset, provider):
    inputs = make_inputs(4, 60, 5, 8, bias=True)
    inputs["bias"] = inputs["bias"] + offset
    compare(inputs, torch.float32, provider)


@pytest.mark.parametrize("provider", ROW_PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_rows(monkeypatch, provider, dtype):
    monkeypatch.setattr(head, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(head, "VOCAB_MULTIPLE", 8)
    monkeypatch.setattr(head, "CHUNK_BYTES", 2 * 40 * 4)
    compare(make_inputs(5, 37, 6, 9, mask=-3.0) | EVERYTHING, dtype, provider)


def test_chunk_sizes():
    assert head.chunk_rows(4096, 128256 * 4) == 1024
    assert head.chunk_rows(1100, 128256 * 4) == 640
    assert head.chunk_rows(3, 128256 * 4) == 3 and head.chunk_rows(0, 4) == 1
    for num_rows in (1, 127, 640, 4096, 9999):
        for row_bytes in (1000, 50304 * 4, 151936 * 4, 2**29, 2**30):
            step = head.chunk_rows(num_rows, row_bytes)
            assert 1 <= step <= num_rows and (step == 1 or step * row_bytes <= head.CHUNK_BYTES)


def test_vocabulary_splits():
    assert head_fused.num_splits(32, 501, 132) == 4
    assert head_fused.num_splits(1, 3, 132) == 3 and head_fused.num_splits(500, 9, 132) >= 1
    assert head_fused.num_splits(1, 10**6, 10**6) == head_fused.MAX_SPLITS


@pytest.mark.parametrize("provider", TRITON)
def test_strided_inputs_and_minus_infinity(provider):
    dead = torch.zeros(37)
    dead[6:36] = -math.inf
    hidden = torch.randn(4, 3, 8, dtype=torch.float64)[:, 1]
    weight = torch.randn(8, 37, dtype=torch.float64).T
    inputs = {"hidden": hidden, "weight": weight, "targets": torch.tensor([1, 0, 36, 5], dtype=torch.int32)}
    compare(inputs | {"logit_bias": dead.double()}, torch.float32, provider)
    compare(inputs | {"logit_bias": dead.double(), "final_logit_softcap": 3.0}, torch.bfloat16, provider)
    call = {n: t.to(DEVICE) for n, t in inputs.items()}
    h, w = call["hidden"].float().requires_grad_(provider != "fused"), call["weight"].float()
    options = dict(termination_token_id=20, logit_bias=dead.to(DEVICE))
    log_pf, log_pterm, _ = with_provider(provider)(h, w, call["targets"], **options)
    assert bool((log_pterm == -math.inf).all()) and bool(log_pf.isfinite().all())
    if provider != "fused":
        assert bool(torch.autograd.grad(log_pf.sum(), h)[0].isfinite().all())


def confident(p, read, dtype):
    """One row whose token or stop has probability p, by a float32 mask so that rounding cannot move it."""
    hidden = torch.randn(1, 64).to(dtype).double()
    weight = (torch.randn(600, 64) * 0.3).to(dtype).double()
    column = 9 if read == "token" else 599
    logits = (hidden @ weight.T)[0]
    others = logits.clone().index_fill_(0, torch.tensor([column]), -math.inf).logsumexp(0)
    mask = torch.zeros(600, dtype=torch.float64)
    mask[column] = (others - logits[column] + math.log(p / (1 - p))).float()
    return {"hidden": hidden, "weight": weight, "targets": torch.tensor([9]),
            "termination_token_id": 599, "logit_bias": mask}  # fmt: skip


def confident_gradient(inputs, read, dtype, provider):
    """d hidden of one log-probability before its last rounding, which is to the weight's dtype."""
    call = {n: t.to(DEVICE) if torch.is_tensor(t) else t for n, t in inputs.items()}
    hidden, weight = call["hidden"].to(dtype), call["weight"].to(dtype)
    rows, columns = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([9, 599], device=DEVICE)
    mask = call["logit_bias"].float()
    log_p, lse, slope, _, row_grad = torch.ops.fastgfn.linear_log_probs(
        hidden, weight, None, mask, rows, columns, 1.0, None, 1.0, True, provider
    )
    upstream = torch.zeros_like(log_p)
    upstream[int(read == "stop")] = 1.0
    return torch.ops.fastgfn.linear_log_probs_frozen_backward(
        upstream, torch.zeros_like(lse), weight.float(), rows, columns, log_p, slope, row_grad, 1.0, provider
    ).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("read", ["token", "stop"])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.9999, 1 - 1e-6])
def test_confident_gradient_is_relatively_accurate(monkeypatch, p, read, dtype):
    """d hidden is ~ (1 - p); softmax @ W - W_v would lose it. At 1 - 1e-6 float32 still resolves 1 - p."""
    if dtype == torch.float16 and p > 0.9999:
        pytest.skip("float16 cannot hold P' below 1e-9")
    monkeypatch.setattr(kernels, "ROW_TILE", (256, 4))
    inputs = confident(p, read, dtype)
    leaf = inputs["hidden"].clone().requires_grad_()
    options = {n: v for n, v in inputs.items() if n not in ("hidden", "weight", "targets")}
    out = plain.linear_log_probs(leaf, inputs["weight"], inputs["targets"], **options)
    truth = torch.autograd.grad(out[read == "stop"].sum(), leaf)[0]
    gradient = confident_gradient(inputs, read, dtype, "row_pass")
    assert relative_error(gradient, truth) <= (1e-3 if dtype != torch.float32 else 2e-5)
    if dtype != torch.float32:
        call = {n: t.to(DEVICE) if torch.is_tensor(t) else t for n, t in inputs.items()}
        leaf = call.pop("hidden").to(dtype).requires_grad_()
        out = with_provider("row_pass")(leaf, call.pop("weight").to(dtype), call.pop("targets"), **call)
        final = torch.autograd.grad(out[read == "stop"].sum(), leaf)[0].cpu()
        assert relative_error(final, truth) <= 1e-3 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("provider", ["row_pass", "fused"])
def test_log_probs_are_those_of_float32_products(provider):
    """Logits rounded to bfloat16 would move log p by 2^-9 of the logit, 0.06 here."""
    inputs = make_inputs(6, 83, 40, 12, scale=12.0)
    outs, _ = run(with_provider(provider), inputs, torch.bfloat16, (), DEVICE)
    truth, _ = run(plain.linear_log_probs, rounded(inputs, torch.bfloat16), torch.float64, ())
    assert truth["lse"].max() > 20
    for name, out in outs.items():
        assert float((out - truth[name]).abs().max()) <= 1e-4, name


@pytest.mark.parametrize("provider", TRITON)
@pytest.mark.parametrize("shape", [(0, 5, 3, 0), (3, 5, 3, 0), (1, 1, 1, 1), (1, 513, 1, 1), (2, 5, 0, 3)])
def test_odd_shapes(shape, provider):
    compare(make_inputs(*shape), torch.float32, provider)
    compare(make_inputs(*shape, stop=False), torch.bfloat16, provider)


@pytest.mark.parametrize("provider", TRITON)
def test_repeatability(provider):
    inputs = make_inputs(9, 133, 5, 30, bias=True)
    leaves = () if provider == "fused" else ("hidden",)
    first, second = (run(with_provider(provider), inputs, torch.float32, leaves, DEVICE) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("masks", [(20,), (2, 20), None], ids=str)
@pytest.mark.parametrize("provider", ("tiles", *TRITON))
def test_opcheck(provider, masks):
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(20, 4, device=DEVICE), torch.randn(20, device=DEVICE)
    mask = None if masks is None else torch.randn(masks, device=DEVICE)
    rows, columns = torch.tensor([0, 1, 2], device=DEVICE), torch.tensor([4, 4, 9], device=DEVICE)
    args = (hidden, weight, bias, mask, rows, columns, 1.0, 5.0, 1.3, provider != "fused", provider)
    args = (*args, None if masks != (2, 20) else 2)
    if provider == "fused":
        args = (hidden.detach(), *args[1:])
    torch.library.opcheck(torch.ops.fastgfn.linear_log_probs.default, args)


@pytest.mark.parametrize("provider", TRITON)
def test_an_entry_out_of_range_is_nan_and_touches_no_other(provider):
    """Column 37 + 5 of row 0 lies in row 1 of the logits, and nothing reads a row -1 or 3 of 3."""
    inputs = make_inputs(3, 37, 5, 6)
    call = {n: inputs[n].float().to(DEVICE) for n in ("hidden", "weight")}
    rows, columns = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([4, 18, 9, 18, 18, 30])
    wrong_rows = torch.tensor([-1, 0, 0, 0, 0, 1, 1, 2, 2, 3])
    wrong_columns = torch.tensor([1, -2, 37 + 5, 4, 18, 9, 18, 18, 30, 1])
    good = slice(3, 9)

    def forward(rows, columns):
        args = (None, None, rows.to(DEVICE), columns.to(DEVICE), 1.0, None, 1.0, provider != "fused")
        return torch.ops.fastgfn.linear_log_probs(*call.values(), *args, provider)

    log_p, lse, slope, parts, row_grad = forward(wrong_rows, wrong_columns)
    assert log_p.isnan().tolist() == [True] * 3 + [False] * 6 + [True]
    want = forward(rows, columns)
    for have, true in zip((log_p[good], lse, slope[good], parts, row_grad), want, strict=True):
        assert torch.equal(have, true)
    if provider == "fused":
        return
    upstream = torch.randn(10, device=DEVICE).masked_fill(log_p.isnan(), 0.0)
    rest = (call["weight"], *(x.to(DEVICE) for x in (wrong_rows, wrong_columns)), log_p, slope, row_grad)
    backward = torch.ops.fastgfn.linear_log_probs_frozen_backward
    have = backward(upstream, torch.ones_like(lse), *rest, 1.0, provider)
    rest = (call["weight"], *(x.to(DEVICE) for x in (rows, columns)), log_p[good], slope[good], row_grad)
    assert torch.equal(have, backward(upstream[good], torch.ones_like(lse), *rest, 1.0, provider))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trainable_head_by_spans(monkeypatch, dtype):
    """Spans of 3 columns, entries that repeat and a bias and mask for each stream."""
    monkeypatch.setattr(head, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 5 * 4)
    compare(make_inputs(5, 37, 6, 40, bias=True, mask=-3.0) | EVERYTHING, dtype, "row_pass", trainable=True)


def test_the_table():
    def chosen(device, dtype, wants_grad, masked=False):
        hidden = SimpleNamespace(
            device=torch.device(device), dtype=dtype, element_size=lambda: dtype.itemsize
        )
        options = {"wants_grad": wants_grad, "saves_grad": wants_grad, "masked": masked}
        return head.choose_provider("f", None, hidden, **options)

    for wants_grad in (False, True):
        assert chosen("cpu", torch.bfloat16, wants_grad) == "tiles"
        assert chosen("cuda", torch.float64, wants_grad) == "tiles"
        assert chosen("cuda", torch.float32, wants_grad) == "row_pass"
        assert chosen("cuda", torch.float16, wants_grad) == ("row_pass" if wants_grad else "fused")
        assert chosen("cuda", torch.float16, wants_grad, masked=True) == "row_pass"


def test_refuses_what_a_provider_cannot_do(monkeypatch):
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([1, 2])
    with pytest.raises(checks.InputError, match="provider must be None or one of 'tiles', 'row_pass'"):
        with_provider("cuda")(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="got 'fused' with torch.float64 on cpu; Triton needs"):
        with_provider("fused")(hidden.double(), weight.double(), targets)
    with pytest.raises(RuntimeError, match="provider must be one that forms the gradient of hidden, got 'f"):
        with_provider("fused")(hidden.requires_grad_(), weight, targets)
    low = [hidden.detach().bfloat16().to(DEVICE), weight.bfloat16().to(DEVICE), targets.to(DEVICE)]
    with_provider("row_pass_narrow")(low[0].requires_grad_(), *low[1:])
    with pytest.raises(
        RuntimeError, match="keeps float32 logits for a trainable head, got 'row_pass_narrow'"
    ):
        with_provider("row_pass_narrow")(low[0], low[1].requires_grad_(), low[2])
    with torch.no_grad():
        assert with_provider("fused")(hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE))[1] is None
    monkeypatch.setattr(head, "triton_runs_on", lambda device: device == "cuda")
    with pytest.raises(RuntimeError, match="got 'row_pass' with torch.float32 on cpu; Triton needs CUDA"):
        with_provider("row_pass")(hidden, weight, targets)
    assert with_provider(None)(hidden, weight, targets)[0].shape == (2,)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(9000, 262144, 64), (640, 50257, 1600), (33, 128256, 2048)], ids=str)
def test_real_shapes_on_a_gpu(monkeypatch, shape):
    """R V > 2^31, an odd vocabulary, few rows; the compiled kernels against float32 logits in row chunks."""
    monkeypatch.undo()
    (num_rows, vocab, width), dtype = shape, torch.bfloat16
    hidden = torch.randn(num_rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, device="cuda", dtype=dtype) * 0.1
    targets = torch.randint(vocab, (num_rows,), device="cuda")
    out = public(hidden, weight, targets, termination_token_id=7, return_lse=True)
    (grad,) = torch.autograd.grad((out.log_pf - 0.5 * out.log_pterm).sum(), hidden)
    with torch.no_grad():
        fused = public(hidden, weight, targets, termination_token_id=7, return_lse=True)
    for span in torch.arange(num_rows, device="cuda").split(512):
        leaf = hidden.detach()[span].float().requires_grad_()
        want = plain.linear_log_probs(leaf, weight.float(), targets[span], termination_token_id=7)
        (truth,) = torch.autograd.grad((want[0] - 0.5 * want[1]).sum(), leaf)
        for got in (out, fused):
            for name, true in zip(("log_pf", "log_pterm", "lse"), want, strict=True):
                assert float((getattr(got, name)[span] - true).abs().max()) <= 1e-3
        assert float((grad[span].float() - truth).norm() / truth.norm()) <= 2e-3
