import math

import pytest
import torch
from torch.library import opcheck

from fastgfn.functional.sampling import sample_next
from fastgfn.ops.sample_next import gumbel_draw, philox4x32
from fastgfn.reference import sample_next as ref
from fastgfn.testing import assert_close_to_truth
from fastgfn.types import as_int64

STOP = 2
MAX32 = 0xFFFFFFFF


def arguments(num_draws=64, num_rows=5, vocab=37, dtype=torch.float32, seed=7, stop=STOP, scale=2.0):
    return {
        "logits": torch.randn(num_rows, vocab, dtype=dtype) * scale,
        "rows": torch.randint(num_rows, (num_draws,)),
        "temperature": torch.tensor([0.5, 1.0, 2.0])[torch.arange(num_draws) % 3],
        "trajectory": torch.randint(0, 2**62, (num_draws,)),
        "position": torch.randint(0, 2**32, (num_draws,)),
        "seed": seed,
        "termination_token_id": stop,
        "forbid_stop": torch.arange(num_draws) % 4 == 0,
    }


# Known-answer vectors of the Random123 library.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MAX32] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert ref.philox4x32(as_int64([counter]), key).tolist() == [words]
    assert philox4x32(as_int64([counter]), key).tolist() == [words]


def test_philox_equals_reference():
    counter = torch.randint(0, 2**32, (1000, 4))
    for seed in (0, 123, -5, 2**62 + 1):
        assert torch.equal(philox4x32(counter, seed), ref.philox4x32(counter, seed))


# Equal tokens on large random counters prove the counter layout; 300 tokens cross a tile, 37 a block.
@pytest.mark.parametrize("seed", [0, -3, 2**40 + 5])
@pytest.mark.parametrize("vocab", [3, 37, 300, 1030])
@pytest.mark.parametrize("stop", [STOP, -1])
def test_equals_reference(vocab, stop, seed):
    args = arguments(vocab=vocab, stop=stop, seed=seed)
    truth_args = args | {"logits": args["logits"].double()}
    naive = naive_log_probs(args)
    truth = ref.gumbel_draw(*truth_args.values())
    for dtype_args in (args, truth_args):
        have = gumbel_draw(*dtype_args.values())
        assert torch.equal(have[0], truth[0])
        for name, fused, low, want in zip(
            ("log_pf", "log_pterm", "log_behavior"), have[1:], naive(truth[0]), truth[1:], strict=True
        ):
            assert fused.dtype == dtype_args["logits"].dtype
            finite = want.isfinite()
            assert torch.equal(finite, fused.isfinite()) and torch.equal(
                fused[~finite], want[~finite].to(fused)
            )
            low = low if fused.dtype == torch.float32 else want
            assert_close_to_truth(name, fused[finite], low[finite], want[finite])


def naive_log_probs(args):
    """The three log-probs of given tokens by float32 log_softmax."""

    def log_probs(token):
        z = args["logits"][args["rows"]]
        stop = args["termination_token_id"]
        if stop >= 0:
            z[:, stop] = z[:, stop].masked_fill(args["forbid_stop"], -math.inf)
        read = token[:, None]
        log_q = z.log_softmax(1)
        log_pterm = log_q[:, stop] if stop >= 0 else torch.full((len(z),), -math.inf)
        tempered = (z / args["temperature"][:, None]).log_softmax(1)
        return log_q.gather(1, read)[:, 0], log_pterm, tempered.gather(1, read)[:, 0]

    return log_probs


# Masks, extreme gaps and offsets: the skip of hopeless tokens must not change a draw.
@pytest.mark.parametrize("kind", ["peaked", "offset", "masked", "stop_certain", "stop_rare", "flat", "cold"])
def test_equals_reference_on_hard_rows(kind):
    args = arguments(num_draws=300, vocab=301)
    logits = args["logits"]
    if kind == "peaked":
        logits[:, 200] += 40.0
    elif kind == "offset":
        logits += 1e4
    elif kind == "masked":
        logits[:, 5:290] = -math.inf
    elif kind == "stop_certain":
        logits[:, STOP] += 200.0
    elif kind == "stop_rare":
        logits[:, STOP] = -1e4
    elif kind == "flat":
        logits.zero_()
    elif kind == "cold":
        args["temperature"] = torch.full((300,), 1e-3)
    have, want = gumbel_draw(*args.values()), ref.gumbel_draw(*args.values())
    assert torch.equal(have[0], want[0])
    for fused, truth in zip(have[1:], want[1:], strict=True):
        assert torch.allclose(fused, truth, rtol=1e-6, atol=1e-6)


def test_only_stop_left():
    logits = torch.full((1, 5), -math.inf)
    logits[0, STOP] = 3.0
    draw = sample_next(logits, termination_token_id=STOP, seed=0)
    assert draw.token.item() == STOP and draw.log_pf.item() == draw.log_pterm.item() == 0


# 100,000 draws per temperature from one row against the exact softmax; six tests at p > 1e-3 / 6.
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("forbid", [False, True])
def test_chi_squared(temperature, forbid):
    n, vocab = 100_000, 16
    logits = torch.randn(1, vocab)
    draw = sample_next(
        logits,
        rows=torch.zeros(n, dtype=torch.int64),
        temperature=temperature,
        termination_token_id=STOP,
        forbid_termination=torch.full((n,), forbid),
        seed=11,
    )
    z = logits[0].double()
    z[STOP] = -math.inf if forbid else z[STOP]
    expected = (z / temperature).softmax(0) * n
    observed = torch.bincount(draw.token, minlength=vocab)
    live = expected > 0
    assert expected[live].min() > 5 and observed[~live].sum() == 0
    statistic = ((observed - expected)[live] ** 2 / expected[live]).sum()
    degrees = float(live.sum() - 1)
    p_value = torch.special.gammaincc(torch.tensor(degrees / 2).double(), statistic / 2)
    assert p_value > 1e-3 / 6, f"chi-squared {statistic:.1f} on {degrees:.0f} degrees, p {p_value:.2g}"


def test_draws_do_not_depend_on_the_batch():
    args = arguments(num_draws=100, vocab=300)
    whole = gumbel_draw(*args.values())
    per_draw = ("rows", "temperature", "trajectory", "position", "forbid_stop")

    def pick(index):
        return gumbel_draw(*(args | {name: args[name][index] for name in per_draw}).values())

    order = torch.randperm(100)
    splits = [pick(part) for part in order.split([1, 0, 60, 39])]
    for k, want in enumerate(whole):
        assert torch.equal(torch.cat([s[k] for s in splits]), want[order])
    # The same rows held in another place of another matrix.
    moved = args | {"logits": args["logits"].flip(0), "rows": 4 - args["rows"]}
    assert all(torch.equal(a, b) for a, b in zip(gumbel_draw(*moved.values()), whole, strict=True))


def test_public_function_options():
    logits, bias = torch.randn(4, 9), torch.randn(9)
    force = torch.tensor([True, False, True, False])
    draw = sample_next(
        logits,
        logit_bias=bias,
        temperature=0.7,
        termination_token_id=STOP,
        forbid_termination=torch.tensor([True, True, False, False]),
        force_termination=force,
        seed=5,
    )
    assert (draw.token[force] == STOP).all()
    for log_prob in (draw.log_pf, draw.log_pterm, draw.log_behavior):
        assert (log_prob[force] == 0).all()
    assert draw.log_pterm[1] == -math.inf and draw.token[1] != STOP
    log_q = (logits + bias).log_softmax(1)
    assert torch.allclose(draw.log_pterm[3], log_q[3, STOP], atol=1e-6)
    plain = sample_next(logits + bias, temperature=torch.full((4,), 0.7), termination_token_id=STOP, seed=5)
    assert draw.token[3] == plain.token[3]
    tempered = ((logits + bias) / 0.7).log_softmax(1).gather(1, plain.token[:, None])[:, 0]
    assert torch.allclose(plain.log_behavior, tempered, atol=1e-6)
    none = sample_next(logits, seed=5)
    assert (none.log_pterm == -math.inf).all()
    assert not sample_next(logits.requires_grad_(), seed=5).log_pf.requires_grad


# One token, one row, no draw, rows of an expanded or wider buffer.
def test_odd_shapes():
    one = sample_next(torch.randn(1, 1), seed=0)
    assert one.token.tolist() == [0] and one.log_pf.tolist() == [0.0]
    none = sample_next(torch.randn(0, 4), seed=0)
    assert none.token.shape == (0,) and none.token.dtype == torch.int64
    row = torch.randn(12)
    wide = sample_next(row.view(2, 6)[:, :4], seed=1)
    assert torch.equal(wide.token, sample_next(row.view(2, 6)[:, :4].contiguous(), seed=1).token)
    same = sample_next(row.expand(3, 12), seed=1)
    assert torch.equal(same.token, sample_next(row[None], rows=as_int64([0, 0, 0]), seed=1).token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"logit_bias": torch.ones(6) / 3}, {"top_k": 3}], ids=str)
def test_any_dtype_and_strides(dtype, options):
    """Values of 16 bits are exact in float32, where the bias is added; log-probs are not rounded to 16."""
    rows = torch.randn(4, 6).to(dtype)
    want = sample_next(rows if dtype == torch.float64 else rows.float(), seed=1, **options)
    wide = torch.zeros(4, 12, dtype=dtype)
    wide[:, ::2] = rows
    for logits in (rows, rows.T.contiguous().T, wide[:, ::2]):
        draw = sample_next(logits, seed=1, **options)
        assert torch.equal(draw.token, want.token) and torch.equal(draw.log_pf, want.log_pf)
        assert draw.log_pf.dtype == want.log_pf.dtype
    assert sample_next(torch.zeros(1, 3).T, seed=0).token.tolist() == [0] * 3


def test_repeat_gives_equal_bits():
    args = arguments(vocab=500)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(gumbel_draw(*args.values()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    opcheck(torch.ops.fastgfn.gumbel_draw.default, tuple(arguments(dtype=dtype, num_draws=4).values()))
    opcheck(torch.ops.fastgfn.philox4x32.default, (torch.ones(2, 4, dtype=torch.int64), 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(3)}, ValueError, r"logits must be \(R, V\), got \(3,\)"),
        (
            {"logits": torch.ones(2, 3).long()},
            TypeError,
            "logits must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be \(2,\), got \(3,\)"),
        ({"logit_bias": torch.ones(2)}, ValueError, r"logit_bias must be \(3,\)"),
        ({"termination_token_id": 3}, ValueError, r"termination_token_id must be in \[0, 3\), got 3"),
        ({"termination_token_id": None}, ValueError, "termination_token_id must be given with forbid_term"),
        ({"forbid_termination": torch.ones(2)}, TypeError, "forbid_termination must be bool"),
        ({"position": torch.zeros(3)}, ValueError, r"position must be \(2,\)"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
        ({"seed": 2**63}, ValueError, r"seed must be in \[-2\^63, 2\^63\), got 9223372036854775808"),
    ],
)
def test_refuses_bad_input(change, error, message):
    good = {
        "logits": torch.ones(2, 3),
        "termination_token_id": STOP,
        "forbid_termination": torch.zeros(2, dtype=torch.bool),
    }
    with pytest.raises(error, match=f"sample_next: {message}"):
        sample_next(**({"seed": 0} | good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.full((1, 3), math.nan)}, "logits must be free of nan and inf"),
        ({"logits": torch.tensor([[0.0, 0.0, math.nan]])}, "logits must be free of nan and inf"),
        ({"logits": torch.tensor([[0.0, math.inf, 0.0]])}, "logits must be free of nan and inf"),
        ({"logits": torch.full((1, 3), -math.inf)}, "with a token above -inf per row"),
        (
            {"logits": torch.tensor([[-math.inf, -math.inf, 0.0]])},
            "forbid_stop must be false where only stop",
        ),
        ({"rows": as_int64([1])}, r"rows must be in \[0, 1\), got 1"),
        ({"position": as_int64([-1])}, r"position must be in \[0, 2\^32\), got -1"),
        ({"position": as_int64([1, 2])}, r"every per-draw argument must be \(1,\), got \[2\]"),
        ({"temperature": torch.tensor([math.nan])}, "temperature must be finite and > 0"),
        ({"logits": torch.ones(1, 6)[:, ::2]}, "contiguous rows"),
    ],
)
def test_op_refuses_bad_input(change, message):
    args = arguments(num_draws=1, num_rows=1, vocab=3) | change
    with pytest.raises(ValueError, match=f"gumbel_draw: .*{message}"):
        gumbel_draw(*args.values())
