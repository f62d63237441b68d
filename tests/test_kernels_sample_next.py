"""The CUDA forms of the draws, compiled on a GPU or in the interpreter, against csrc and the reference."""

import math
import shutil

import pytest
import torch
import triton
import triton.language as tl

from fastgfn.kernels import head_sample_next, sample_next
from fastgfn.ops.sample_next import gumbel_draw, gumbel_draw_triton, head_gumbel_draw_triton
from fastgfn.reference import sample_next as ref
from fastgfn.testing import assert_drawn_log_probs, assert_drawn_tokens

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
STOP = 2
# Both sides of a where are computed, and what is masked overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(op, args):
    """The op's results on the CPU, of arguments moved to the device."""
    moved = (x.to(DEVICE) if torch.is_tensor(x) else x for x in args.values())
    return tuple(x.cpu() for x in op(*moved))


def arguments(num_draws=16, num_rows=5, vocab=37, seed=7, stop=STOP, scale=2.0):
    return {
        "logits": torch.randn(num_rows, vocab) * scale,
        "rows": torch.randint(num_rows, (num_draws,)),
        "temperature": torch.tensor([0.5, 1.0, 2.0])[torch.arange(num_draws) % 3],
        "trajectory": torch.randint(0, 2**62, (num_draws,)),
        "position": torch.randint(0, 2**32, (num_draws,)),
        "seed": seed,
        "termination_token_id": stop,
        "forbid_stop": torch.arange(num_draws) % 4 == 0,
    }


def head_arguments(args, width=24, dtype=torch.float32, softcap=None):
    """The arguments of the head's op, and its logits in float64 and by a product in dtype."""
    args = dict(args)
    num_rows, vocab = args.pop("logits").shape
    hidden, weight, bias = (torch.randn(s).to(dtype) for s in ((num_rows, width), (vocab, width), (vocab,)))
    head = {"hidden": hidden, "weight": weight * 0.4, "bias": bias, "logit_bias": torch.randn(vocab)}
    head |= {"logit_scale": 1.3, "softcap": softcap}

    def logits(cast):
        x = (cast(hidden) @ cast(head["weight"]).T + cast(bias)).to(cast(args["temperature"]).dtype) * 1.3
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return x + cast(head["logit_bias"])

    args["seed"] = torch.tensor([args["seed"]])
    naive = logits(lambda x: x) if dtype == torch.float32 else logits(lambda x: x.float())
    return head | args, logits(torch.Tensor.double), naive


@triton.jit
def _words(counter_ptr, seed_ptr, words_ptr, noise_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    c = counter_ptr + 4 * at
    trajectory = tl.load(c + 2) | (tl.load(c + 3) << 32)
    words = sample_next._philox(tl.load(c), tl.load(c + 1), trajectory, tl.load(seed_ptr))
    for i in tl.static_range(4):
        tl.store(words_ptr + 4 * at + i, words[i].to(tl.int64))
        tl.store(noise_ptr + 4 * at + i, sample_next._gumbel(words[i]))


@pytest.mark.parametrize("seed", [0, 123, -5, 2**62 + 1, -(2**63)])
def test_words_and_noise_equal_the_reference(seed):
    counter = torch.randint(0, 2**32, (256, 4))
    counter[:2] = torch.tensor([[0], [2**32 - 1]])
    words = torch.empty_like(counter, device=DEVICE)
    noise = torch.empty(256, 4, device=DEVICE)
    _words[(1,)](counter.to(DEVICE), torch.tensor([seed], device=DEVICE), words, noise, BLOCK=256)
    words = words.cpu()
    assert torch.equal(words, ref.philox4x32(counter, seed))
    assert float((noise.cpu() - ref.gumbel(words)).abs().max()) < 1e-6


@triton.jit
def _gumbels(words_ptr, noise_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(noise_ptr + at, sample_next._gumbel(tl.load(words_ptr + at).to(tl.uint32)))


def test_noise_is_accurate_at_both_ends():
    """Small words win draws, at the largest 1 - u leaves float32, and at u = 1/8 the two forms meet."""
    near = torch.arange(1024)
    words = torch.cat([near, 2**32 - 1 - near, 2**29 - 512 + near, torch.randint(0, 2**32, (1024,))])
    noise = torch.empty(4096, device=DEVICE)
    _gumbels[(1,)](words.to(DEVICE), noise, BLOCK=4096)
    noise = noise.cpu()
    assert float((noise - ref.gumbel(words)).abs().max()) < 2e-6
    exponential = torch.exp(-noise.double()) / -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    assert float((exponential - 1).abs().max()) < 2e-6


# One tile, several tiles and splits (blocks of 32 tokens), a vocabulary that no block divides, no stop token.
@pytest.mark.parametrize(("vocab", "block"), [(1, 32), (37, 4096), (37, 32), (130, 32)])
@pytest.mark.parametrize("stop", [0, -1])
def test_draws_from_logits_equal_the_truth(monkeypatch, vocab, block, stop):
    monkeypatch.setattr(sample_next, "LOGITS_BLOCK", block)
    args = arguments(vocab=vocab, stop=stop, seed=-3)
    if vocab == 1:
        args["forbid_stop"].zero_()
    drawn = run(gumbel_draw_triton, args)
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args)
    assert torch.equal(drawn[0], gumbel_draw(*args.values())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_are_read_as_float32(dtype):
    args = arguments(vocab=37)
    args["logits"] = args["logits"].to(dtype)
    drawn = run(gumbel_draw_triton, args)
    want = run(gumbel_draw_triton, args | {"logits": args["logits"].float()})
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(drawn, want, strict=True))


@pytest.mark.parametrize("kind", ["peaked", "offset", "masked", "one_left", "stop_certain", "flat", "cold"])
def test_hard_rows(kind):
    args = arguments(num_draws=16, vocab=101)
    logits = args["logits"]
    if kind == "peaked":
        logits[:, 50] += 40.0
    elif kind == "offset":
        logits += 1e4
    elif kind == "masked":
        logits[:, 5:90] = -math.inf
    elif kind == "one_left":
        logits[:, :77] = logits[:, 78:] = -math.inf
    elif kind == "stop_certain":
        logits[:, STOP] += 200.0
    elif kind == "flat":
        logits.zero_()
    elif kind == "cold":
        args["temperature"] = torch.full((16,), 1e-3)
    drawn = run(gumbel_draw_triton, args)
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args)
    if kind == "one_left":
        assert (drawn[0] == 77).all() and (drawn[1] == 0).all()
    if kind == "masked":
        assert not ((drawn[0] >= 5) & (drawn[0] < 90)).any()


# Heads without a divisor in common with the blocks; K = 20 and 40 are two blocks of the table.
@pytest.mark.parametrize(
    ("num_draws", "vocab", "width", "dtype", "softcap"),
    [
        (20, 37, 24, torch.float32, None),
        (40, 301, 70, torch.float32, 5.0),
        (5, 70, 33, torch.bfloat16, None),
        (20, 130, 64, torch.bfloat16, 5.0),
    ],
)
def test_draws_from_hidden_equal_the_truth(num_draws, vocab, width, dtype, softcap):
    args = arguments(num_draws=num_draws, vocab=vocab)
    head, truth, naive = head_arguments(args, width, dtype, softcap)
    drawn = run(head_gumbel_draw_triton, head)
    args["logits"] = truth
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args, naive)


def test_plain_head_without_options():
    args = arguments(num_draws=7, vocab=40, stop=-1) | {"temperature": torch.ones(7)}
    head, _, _ = head_arguments(args)
    head |= {"bias": None, "logit_bias": None, "logit_scale": 1.0}
    drawn = run(head_gumbel_draw_triton, head)
    args["logits"] = head["hidden"].double() @ head["weight"].double().T
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args, head["hidden"] @ head["weight"].T)
    assert torch.equal(drawn[1], drawn[3])


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_draws_do_not_depend_on_the_batch(monkeypatch, form):
    args = arguments(num_draws=9, vocab=130)
    op, whole_args = gumbel_draw_triton, args
    if form == "hidden":
        op, whole_args = head_gumbel_draw_triton, head_arguments(args)[0]
    whole = run(op, whole_args)
    again = run(op, whole_args)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    per_draw = ("rows", "temperature", "trajectory", "position", "forbid_stop")
    order = torch.randperm(9)
    parts = [
        run(op, whole_args | {name: whole_args[name][part] for name in per_draw})
        for part in order.split([1, 0, 5, 3])
    ]
    joined = [torch.cat([p[k] for p in parts]) for k in range(4)]
    moved_and_whole = list(zip(joined, (x[order] for x in whole), strict=True))
    matrix = "logits" if form == "logits" else "hidden"
    moved = whole_args | {matrix: whole_args[matrix].flip(0), "rows": 4 - args["rows"]}
    moved[matrix] = moved[matrix].contiguous()
    moved_and_whole += zip(run(op, moved), whole, strict=True)
    for a, b in moved_and_whole:
        # numpy's product, unlike a tensor core's, depends on where in the tile a row is
        tolerance = 0.0 if form == "logits" or a.dtype == torch.int64 else 2e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # Other tiles and splits: the same tokens, the log-probs to rounding.
    monkeypatch.setattr(sample_next, "LOGITS_BLOCK", 32)
    monkeypatch.setattr(head_sample_next, "_num_sms", lambda device: 1)
    for tiles in (1, 3):
        monkeypatch.setattr(sample_next, "LOGITS_TILES", tiles)
        other = run(op, whole_args)
        assert torch.equal(other[0], whole[0])
        for a, b in zip(other[1:], whole[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


# Draws of one row against its softmax, STOP forbidden for every other; four tests at p > 1e-3 / 4. Those from
# logits equal csrc's token by token, which have a test of their own.
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_chi_squared(temperature):
    n, vocab = 3000, 16
    args = arguments(num_draws=n, num_rows=1, vocab=vocab, seed=11)
    args |= {"rows": torch.zeros_like(args["rows"]), "temperature": torch.full((n,), temperature)}
    args |= {"trajectory": torch.arange(n), "forbid_stop": torch.arange(n) % 2 == 0}
    head, args["logits"], _ = head_arguments(args)
    token = run(head_gumbel_draw_triton, head)[0]
    for forbid in (False, True):
        z = args["logits"][0].double() / temperature
        z[STOP] = -math.inf if forbid else z[STOP]
        mine = token[args["forbid_stop"] == forbid]
        expected, observed = z.softmax(0) * len(mine), torch.bincount(mine, minlength=vocab)
        assert observed[expected == 0].sum() == 0
        rare = expected < 5
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        live = expected > 0
        statistic = ((observed - expected)[live] ** 2 / expected[live]).sum()
        degrees = float(live.sum() - 1)
        p_value = torch.special.gammaincc(torch.tensor(degrees / 2).double(), statistic / 2)
        assert p_value > 1e-3 / 4, f"chi-squared {statistic:.1f} on {degrees:.0f} degrees, p {p_value:.2g}"


# What the CPU refuses and a GPU can only mark.
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("nan", math.nan),
        ("inf", math.inf),
        ("all_masked", None),
        ("only_stop", None),
        ("row", 3),
        ("row", -1),
        ("position", 2**32),
        ("position", -1),
        ("position", -(2**32)),
        ("temperature", 0.0),
    ],
)
def test_bad_draws_are_marked(kind, wrong):
    args = arguments(num_draws=3, num_rows=3, vocab=20) | {"rows": torch.arange(3)}
    args["forbid_stop"] = torch.tensor([False, True, False])
    logits = args["logits"]
    if kind in ("nan", "inf"):
        logits[1, 7] = wrong
    elif kind == "all_masked":
        logits[1] = -math.inf
    elif kind == "only_stop":
        logits[1, :STOP] = logits[1, STOP + 1 :] = -math.inf
    elif kind == "row":
        args["rows"] = torch.tensor([0, wrong, 2])
    elif kind == "position":
        args["position"] = torch.tensor([0, wrong, 2**32 - 1])
    elif kind == "temperature":
        args["temperature"] = torch.tensor([0.5, wrong, 2.0])
    token, *log_probs = run(gumbel_draw_triton, args)
    assert token[1] == sample_next.NO_TOKEN and all(x[1].isnan() for x in log_probs)
    assert (token[::2] >= 0).all() and not any(x[::2].isnan().any() for x in log_probs)
    if kind in ("row", "position"):
        head = head_arguments(args)[0]
        token, *log_probs = run(head_gumbel_draw_triton, head)
        assert token[1] == sample_next.NO_TOKEN and all(x[1].isnan() for x in log_probs)
        assert (token[::2] >= 0).all()


def test_no_draws_and_strided_hidden():
    args = arguments(num_draws=4, vocab=20)
    head = head_arguments(args)[0]
    wide = torch.randn(5, 48, device=DEVICE)
    strided = head | {"hidden": wide[:, ::2]}
    packed = head | {"hidden": wide[:, ::2].contiguous()}
    for a, b in zip(run(head_gumbel_draw_triton, strided), run(head_gumbel_draw_triton, packed), strict=True):
        assert torch.equal(a, b)
    per_draw = ("rows", "temperature", "trajectory", "position", "forbid_stop")
    for op, some in ((gumbel_draw_triton, args), (head_gumbel_draw_triton, head)):
        none = run(op, some | {name: some[name][:0] for name in per_draw})
        assert [x.shape for x in none] == [(0,)] * 4 and none[0].dtype == torch.int64


# The last step of the width lies 2^31 elements on; of the 4 GiB only the pages that are read exist.
@pytest.mark.parametrize(("width", "step"), [(3, 2**30), (129, 2**24)])
def test_strides_beyond_32_bits(width, step):
    vocab, num_rows = 20, 5
    far = torch.empty((width - 1) * step + vocab + num_rows, dtype=torch.bfloat16, device=DEVICE)
    weight = far.as_strided((vocab, width), (1, step))
    hidden = far.as_strided((num_rows, width), (1, step), vocab)
    head = head_arguments(arguments(num_draws=4, vocab=vocab), width, torch.bfloat16)[0]
    want = run(head_gumbel_draw_triton, head)
    weight.copy_(head["weight"])
    hidden.copy_(head["hidden"])
    drawn = run(head_gumbel_draw_triton, head | {"hidden": hidden, "weight": weight})
    assert all(torch.equal(a, b) for a, b in zip(drawn, want, strict=True))


def test_the_cuda_key_is_taken():
    for op in ("gumbel_draw", "head_gumbel_draw"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgfn::{op}", "CUDA")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.ones(5, 37).double()},
            TypeError,
            "logits must be float32, bfloat16 or float16 on CUDA, got torch.float64",
        ),
        ({"logits": torch.ones(5, 74)[:, ::2]}, ValueError, "contiguous rows"),
        ({"rows": torch.zeros(16)}, TypeError, "rows must be torch.int64"),
        ({"position": torch.zeros(3).long()}, ValueError, r"position must be \(16,\), got \(3,\)"),
        (
            {"termination_token_id": 37},
            ValueError,
            r"termination_token_id must be -1 or in \[0, 37\), got 37",
        ),
    ],
)
def test_refuses_bad_input(change, error, message):
    with pytest.raises(error, match=f"gumbel_draw: .*{message}"):
        gumbel_draw_triton(*(arguments() | change).values())


def test_refuses_float64_hidden():
    head = head_arguments(arguments(), dtype=torch.float64)[0]
    with pytest.raises(TypeError, match="hidden must be float32, bfloat16 or float16 on CUDA"):
        head_gumbel_draw_triton(*head.values())
