import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from torch.utils import cpp_extension

from fastgfn import checks
from fastgfn.functional.log_probs import linear_log_probs
from fastgfn.ops import head_tiles
from fastgfn.reference import linear_log_probs as plain
from fastgfn.testing import assert_close_to_truth, relative_error


@pytest.fixture(autouse=True, params=["csrc", "torch"])
def provider(request, monkeypatch):
    """Every test holds for the C++ pass, where it applies (even D, AVX512_BF16), and for the torch tiles."""
    if request.param == "torch":
        monkeypatch.setattr(head_tiles, "uses_csrc", lambda hidden, weight: False)
    return request.param


EVERYTHING = {"logit_scale": 0.7, "final_logit_softcap": 4.0, "temperature": 1.3}


def make_inputs(num_rows, vocab, width, num_targets, *, scale=1.0, stop=True, bias=False, mask=None):
    inputs = {
        "hidden": torch.randn(num_rows, width, dtype=torch.float64) * scale,
        "weight": torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(width),
        "targets": torch.randint(vocab, (num_targets,)),
        "rows": torch.randint(max(num_rows, 1), (num_targets,)),
        "termination_token_id": vocab // 2 if stop else None,
    }
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
    if mask is not None:
        inputs["logit_bias"] = torch.where(torch.rand(vocab) < 0.3, mask, 0.0).double()
    return inputs


def run(function, inputs, dtype, trainable):
    """Outputs and gradients under a fixed random upstream gradient of every entry."""
    names = ["hidden"] + [n for n in ("weight", "bias") if trainable and n in inputs]
    call = dict(inputs)
    for name in ("hidden", "weight", "bias", "logit_bias"):
        if name in call:
            call[name] = call[name].to(dtype).requires_grad_(name in names)
    args = [call.pop(name) for name in ("hidden", "weight", "targets")]
    leaves = [args[0], args[1], call.get("bias")][: 1 + 2 * trainable]
    leaves = [leaf for leaf in leaves if leaf is not None]
    out = function(*args, **call)
    out = (out.log_pf, out.log_pterm, out.lse) if hasattr(out, "lse") else out
    named = {n: o for n, o in zip(("log_pf", "log_pterm", "lse"), out, strict=True) if o is not None}
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(o.shape, generator=generator).to(o) * o).sum() for o in named.values())
    grads = torch.autograd.grad(loss, leaves)
    named = {n: o.detach() for n, o in named.items()}
    return named, dict(zip(["d_" + n for n in names], grads, strict=True))


def fused(*args, **kwargs):
    return linear_log_probs(*args, return_lse=True, **kwargs)


def compare(inputs, dtype=torch.float32, trainable=False):
    outs, grads = run(fused, inputs, dtype, trainable)
    naive_outs, naive_grads = run(plain.linear_log_probs, inputs, dtype, trainable)
    rounded = {n: t.to(dtype).double() if torch.is_tensor(t) and t.is_floating_point() else t
               for n, t in inputs.items()}  # fmt: skip
    true_outs, true_grads = run(plain.linear_log_probs, rounded, torch.float64, trainable)
    assert outs.keys() == true_outs.keys() and grads.keys() == true_grads.keys()
    for name, out in outs.items():
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close_to_truth(name, out, naive_outs[name], true_outs[name])
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_to_truth(name, grad, naive_grads[name], true_grads[name], grad=True)


# Vocabularies of one and several tiles, not multiples of the tile; R unequal to M, rows without a target.
CASES = {
    "plain": (dict(num_rows=5, vocab=33, width=7, num_targets=9), {}),
    "two_tokens": (dict(num_rows=3, vocab=2, width=4, num_targets=6), {}),
    "vocab_257": (dict(num_rows=33, vocab=257, width=8, num_targets=40), {}),
    "vocab_1333": (dict(num_rows=6, vocab=1333, width=8, num_targets=40), {}),
    "vocab_50257": (dict(num_rows=3, vocab=50257, width=3, num_targets=5), {}),
    "width_1": (dict(num_rows=4, vocab=70, width=1, num_targets=4), {}),
    "no_stop": (dict(num_rows=4, vocab=40, width=5, num_targets=7, stop=False), {}),
    "peaked": (dict(num_rows=5, vocab=600, width=5, num_targets=9, scale=8.0), {}),
    "bias": (dict(num_rows=4, vocab=40, width=5, num_targets=7, bias=True), {}),
    "mask_50": (dict(num_rows=4, vocab=40, width=5, num_targets=7, mask=-50.0), {}),
    "mask_99": (dict(num_rows=4, vocab=540, width=5, num_targets=7, mask=-99.0), {}),
    "everything": (dict(num_rows=9, vocab=1333, width=5, num_targets=20, bias=True, mask=-3.0), EVERYTHING),
    "everything_even": (
        dict(num_rows=70, vocab=1333, width=6, num_targets=90, bias=True, mask=-3.0),
        EVERYTHING,
    ),
    "one_row_20_targets": (dict(num_rows=1, vocab=30, width=5, num_targets=20), {}),
}


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, trainable):
    shape, options = CASES[case]
    compare(make_inputs(**shape) | options, dtype, trainable)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("tile", [1, 3, 512])
def test_tile_boundaries(monkeypatch, tile, trainable):
    monkeypatch.setattr(head_tiles, "VOCAB_TILE", tile)
    compare(make_inputs(5, 34, 6, 12, bias=True, mask=-3.0) | EVERYTHING, torch.float64, trainable)
    compare(make_inputs(5, 34, 6, 12, bias=True, mask=-99.0), torch.float32, trainable)


# Every target is the stop token; one target many times; both with ignored targets between.
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("targets", [[3] * 6, [4] * 6, [3, -100, 4, 4, 3, -100], [-100] * 6], ids=str)
def test_repeated_ignored_and_stop_targets(targets, trainable):
    inputs = make_inputs(2, 7, 4, 6) | {"targets": torch.tensor(targets)}
    inputs["rows"] = torch.tensor([0, 0, 0, 0, 1, 1])
    compare(inputs, torch.float64, trainable)
    compare(inputs, torch.float32, trainable)
    out = linear_log_probs(inputs["hidden"], inputs["weight"], inputs["targets"], rows=inputs["rows"])
    assert bool((out.log_pf[inputs["targets"] == -100] == 0).all()) and out.log_pterm is None


@pytest.mark.parametrize("offset", [1e3, -1e4])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_common_logit_offset(offset, trainable):
    inputs = make_inputs(4, 600, 5, 8, bias=True)
    inputs["bias"] = inputs["bias"] + offset
    compare(inputs, torch.float32, trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("read", ["token", "stop"])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.9999, 1 - 1e-6])
def test_confident_gradient_is_relatively_accurate(p, read, dtype):
    """d hidden is ~ (1 - p); softmax @ W - W_v would lose it, and so would 1 + (1 - p) in float32."""
    hidden = torch.randn(1, 64).to(dtype).double().requires_grad_()
    weight = (torch.randn(600, 64) * 0.3).to(dtype).double()
    columns = torch.tensor([9, 599])
    column = columns[int(read == "stop")]
    logits = (hidden @ weight.T)[0].detach()
    others = logits.clone().index_fill_(0, column, -math.inf).logsumexp(0)
    mask = torch.zeros(600).double()
    mask[column] = (others - logits[column] + math.log(p / (1 - p))).float()
    out = plain.linear_log_probs(hidden, weight, column[None], logit_bias=mask)
    truth = torch.autograd.grad(out[0].sum(), hidden)[0]

    x, w = hidden.detach().to(dtype), weight.to(dtype)
    rows = torch.zeros(2, dtype=torch.int64)
    log_p, lse, slope, _, row_grad = torch.ops.fastgfn.linear_log_probs(
        x, w, None, mask.float(), rows, columns, 1.0, None, 1.0, True
    )
    upstream = (columns == column).float()
    # before its last rounding, which is to the weight's dtype
    grad = torch.ops.fastgfn.linear_log_probs_frozen_backward(
        upstream, torch.zeros_like(lse), w.float(), rows, columns, log_p, slope, row_grad, 1.0, "tiles"
    )
    assert relative_error(grad, truth) <= (1e-3 if dtype != torch.float32 else 2e-5)
    leaf = x.clone().requires_grad_()
    call = linear_log_probs(leaf, w, column[None], logit_bias=mask.float())
    final = torch.autograd.grad(call.log_pf.sum(), leaf)[0]
    assert relative_error(final, truth) <= 1e-3 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradcheck(trainable):
    inputs = make_inputs(3, 11, 4, 7, bias=True, mask=-2.0) | EVERYTHING
    inputs["targets"][0], inputs["targets"][1], inputs["rows"][:2] = 5, -100, 0
    hidden, weight, bias = (inputs.pop(n) for n in ("hidden", "weight", "bias"))
    leaves = [t.requires_grad_(trainable) for t in (weight, bias)]
    targets = inputs.pop("targets")

    def function(h, w, b):
        out = linear_log_probs(h, w, targets, bias=b, return_lse=True, **inputs)
        return out.log_pf, out.log_pterm, out.lse

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), *leaves))


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_one_gradient_alone(leaf):
    inputs = make_inputs(4, 40, 5, 6, bias=True)
    tensors = {n: inputs.pop(n) for n in ("hidden", "weight", "bias")}
    tensors[leaf].requires_grad_()
    targets = inputs.pop("targets")
    grads = []
    for function in (linear_log_probs, plain.linear_log_probs):
        out = function(tensors["hidden"], tensors["weight"], targets, bias=tensors["bias"], **inputs)
        log_pf = out.log_pf if hasattr(out, "lse") else out[0]
        grads.append(torch.autograd.grad(log_pf.sum(), tensors[leaf])[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 3, 0), (3, 5, 3, 0), (1, 1, 1, 1), (1, 513, 1, 1), (2, 5, 0, 3)], ids=str
)
def test_odd_shapes(shape, trainable):
    compare(make_inputs(*shape), torch.float64, trainable)
    compare(make_inputs(*shape, stop=False), torch.float32, trainable)


def test_no_rows_of_any_strides():
    """An empty tensor counts as contiguous; bfloat16 of even width would go to the C++ pass."""
    hidden, weight = torch.zeros(4, 3, dtype=torch.bfloat16).T[:0], torch.ones(5, 4).bfloat16()
    out = linear_log_probs(hidden, weight, torch.zeros(0, dtype=torch.int64), termination_token_id=1)
    assert out.log_pf.shape == out.log_pterm.shape == (0,)


def test_strided_hidden_int32_targets_and_minus_infinity():
    padded = torch.randn(4, 3, 8)
    weight, targets = torch.randn(600, 8), torch.tensor([1, 0, 599, 5], dtype=torch.int32)
    mask = torch.zeros(600)
    mask[6:599] = -math.inf
    out = linear_log_probs(padded[:, 1], weight, targets, logit_bias=mask, termination_token_id=300)
    want = plain.linear_log_probs(padded[:, 1].clone(), weight, targets.long(), logit_bias=mask)
    torch.testing.assert_close(out.log_pf, want[0])
    assert bool((out.log_pterm == -math.inf).all())


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_repeatability(trainable):
    inputs = make_inputs(9, 1333, 5, 30, bias=True)
    first, second = (run(fused, inputs, torch.float32, trainable) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_repeatability_of_many_entries_on_two_threads(trainable):
    """Sums over lists that torch may cut among threads: 64 rows with 200 targets among 20000 with one."""
    num_rows = 20000
    rows = torch.cat([torch.arange(num_rows), torch.arange(64).repeat_interleave(200)])
    inputs = make_inputs(num_rows, 300, 8, len(rows)) | {"rows": rows}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (run(fused, inputs, torch.float32, trainable)[1] for _ in range(12))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_opcheck(trainable):
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(20, 4, requires_grad=trainable)
    bias = torch.randn(20, requires_grad=trainable)
    rows, columns = torch.tensor([0, 2, 1]), torch.tensor([4, 4, 9])
    args = (hidden, weight, bias, None, rows, columns, 1.0, 5.0, 1.3, not trainable)
    torch.library.opcheck(torch.ops.fastgfn.linear_log_probs.default, args)


def test_no_matrix_of_rows_by_vocabulary():
    inputs = make_inputs(64, 4096, 4, 64)
    for trainable in (False, True):
        largest = {}
        for function in (fused, plain.linear_log_probs):
            with profile(profile_memory=True) as trace:
                run(function, inputs, torch.float32, trainable)
            largest[function] = max(event.self_cpu_memory_usage for event in trace.events())
        assert largest[fused] <= 64 * 512 * 4 + 1024
        assert largest[plain.linear_log_probs] >= 64 * 4096 * 4


def test_second_derivative_is_refused():
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    loss = linear_log_probs(hidden, weight, torch.tensor([1, 2])).log_pf.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


class Wrapped(torch.nn.Parameter):
    pass


REFUSALS = {
    "dims": (dict(hidden=torch.zeros(2, 3, 4)), checks.InputError, "hidden must be (rows, columns)"),
    "width": (dict(weight=torch.zeros(5, 4)), checks.InputError, "weight must be (V, 3), got (5, 4)"),
    "empty": (dict(weight=torch.zeros(0, 3)), checks.InputError, "the vocabulary must be non-empty"),
    "targets_shape": (dict(targets=torch.tensor([1])), checks.InputError, "targets must be (2,), got (1,)"),
    "targets_range": (
        dict(targets=torch.tensor([1, 5])),
        checks.InputError,
        "targets must be in [0, 5), got [5]",
    ),
    "targets_negative": (dict(targets=torch.tensor([1, -1])), checks.InputError, "targets must be in [0, 5)"),
    "targets_type": (dict(targets=torch.zeros(2)), TypeError, "targets must be int32 or int64"),
    "rows_range": (dict(rows=torch.tensor([0, 2])), checks.InputError, "rows must be in [0, 2), got [2]"),
    "rows_shape": (dict(rows=torch.tensor([0])), checks.InputError, "rows must be (2,), got (1,)"),
    "stop": (
        dict(termination_token_id=5),
        checks.InputError,
        "termination_token_id must be in [0, 5), got 5",
    ),
    "bias": (dict(bias=torch.zeros(4)), checks.InputError, "bias must be (5,), got (4,)"),
    "mask": (dict(logit_bias=torch.zeros(4)), checks.InputError, "logit_bias must be (5,), got (4,)"),
    "mask_grad": (
        dict(logit_bias=torch.zeros(5).requires_grad_()),
        ValueError,
        "logit_bias must be a constant",
    ),
    "temperature": (dict(temperature=0.0), checks.InputError, "temperature must be > 0, got 0.0"),
    "softcap": (dict(final_logit_softcap=-1.0), checks.InputError, "final_logit_softcap must be > 0 or None"),
    "scale": (dict(logit_scale=math.nan), checks.InputError, "logit_scale must be finite, got nan"),
    "dtype": (dict(weight=torch.zeros(5, 3).double()), TypeError, "weight must be torch.float32 like hidden"),
    "hidden_dtype": (dict(hidden=torch.zeros(2, 3).long()), TypeError, "hidden must be float16, bfloat16"),
    "quantised": (dict(weight=torch.zeros(5, 3).char()), NotImplementedError, "log_probs_from_logits"),
    "wrapped": (dict(weight=Wrapped(torch.zeros(5, 3))), NotImplementedError, "got Wrapped"),
    "module": (dict(weight=torch.nn.Linear(3, 5)), NotImplementedError, "got Linear"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_bad_input(case):
    change, kind, message = REFUSALS[case]
    good = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([1, 2])}
    with pytest.raises(kind) as error:
        linear_log_probs(**(good | change))
    assert message in str(error.value) and str(error.value).startswith("linear_log_probs: ")


def test_the_csrc_pass_refuses_other_dtypes_and_ids_out_of_range():
    half, ids = torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([1])
    for hidden, weight, columns, message in (
        (half.float(), half, ids, "hidden must be BFloat16, got Float"),
        (half, half.float(), ids, "weight must be BFloat16, got Float"),
        (half, half, ids + 1, r"columns must be in \[0, V\), got 2"),
    ):
        with pytest.raises(ValueError, match=f"head_forward: {message}"):
            torch.ops.fastgfn.head_forward(hidden, weight, None, None, ids, columns, 1.0, 0.0, True)


BFLOAT16_CALL = """
import torch, fastgfn
from fastgfn.functional import linear_log_probs
from fastgfn.reference import linear_log_probs as plain

hidden, weight, targets = torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16(), torch.tensor([1, 2, 3])
want = plain.linear_log_probs(hidden.float(), weight.float(), targets)[0]
def check():
    assert float((linear_log_probs(hidden, weight, targets).log_pf - want).abs().max()) < 1e-5
    return "csrc" in fastgfn.backend_info()["ops"]["linear_log_probs"]["cpu"]

with torch.backends.mkldnn.flags(enabled=False):
    assert not check()
assert check() in EXPECTED
"""


# What oneDNN is held to -> whether it has the block product (it may, where the CPU itself has).
@pytest.mark.parametrize("isa, expected", [("AVX2", "[0]"), ("AVX512_CORE_VNNI", "[0]"), ("ALL", "[0, 1]")])
def test_bfloat16_without_the_block_product(isa, expected):
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    script = BFLOAT16_CALL.replace("EXPECTED", expected)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not shutil.which("g++-11"), reason="no g++-11")
def test_the_oldest_compiler_builds_the_fast_clones(tmp_path):
    source, built = Path(__file__).parents[1] / "csrc" / "vector_math.cpp", tmp_path / "vector_math.o"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run(["g++-11", "-std=c++20", "-O3", "-fPIC", *include, "-c", source, "-o", built], check=True)
    code = subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True).stdout
    bodies = {part.split(">:")[0]: part for part in code.split("\n\n")}
    (fast,) = (body for name, body in bodies.items() if "exp_and_sum" in name and "avx512f" in name)
    assert "zmm" in fast
