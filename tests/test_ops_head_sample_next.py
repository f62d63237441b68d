import math
import shutil

import pytest
import torch
from torch.library import opcheck

from fastgfn import checks
from fastgfn.functional import sample_next, sample_next_from_hidden, sampling, values
from fastgfn.ops import sample_next as ops
from fastgfn.reference import sample_next as ref
from fastgfn.testing import assert_close_to_truth
from fastgfn.types import as_int64

DEVICE = "cuda" if shutil.which("nvidia-smi") else "cpu"
STOP = 2
NAMES = ("log_pf", "log_pterm", "log_behavior")


def arguments(num_draws=64, num_rows=5, vocab=37, width=24, dtype=torch.float32, **change):
    return {
        "hidden": torch.randn(num_rows, width).to(dtype),
        "weight": (torch.randn(vocab, width) * 0.4).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "logit_bias": torch.randn(vocab),
        "logit_scale": 1.3,
        "softcap": 5.0,
        "rows": torch.randint(num_rows, (num_draws,)),
        "temperature": torch.tensor([0.5, 1.0, 2.0])[torch.arange(num_draws) % 3],
        "trajectory": torch.randint(0, 2**62, (num_draws,)),
        "position": torch.randint(0, 2**32, (num_draws,)),
        "seed": torch.tensor([7]),
        "termination_token_id": STOP,
        "forbid_stop": torch.arange(num_draws) % 4 == 0,
    } | change


PLAIN = {"bias": None, "logit_bias": None, "logit_scale": 1.0, "softcap": None}


# Every option and none; float64 hidden are drawn from in float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, PLAIN], ids=["options", "plain"])
@pytest.mark.parametrize("stop", [STOP, -1])
def test_equals_reference(dtype, options, stop):
    args = arguments(num_draws=300, vocab=301, dtype=dtype, termination_token_id=stop, **options)
    have = ops.head_gumbel_draw(*args.values())

    def reference(cast):
        floats = ("hidden", "weight", "bias", "logit_bias")
        return ref.head_gumbel_draw(
            *(args | {n: None if args[n] is None else cast(args[n]) for n in floats}).values()
        )

    truth = reference(torch.Tensor.double)
    naive = reference(torch.Tensor.float)
    assert torch.equal(have[0], truth[0])
    for name, fused, low, want in zip(NAMES, have[1:], naive[1:], truth[1:], strict=True):
        finite = want.isfinite()
        assert fused.dtype == torch.float32 and torch.equal(fused[~finite], want[~finite].float())
        assert_close_to_truth(name, fused[finite], low[finite], want[finite])


# The logits of all rows at once, or of one or two rows at a time: the draws of every row in its chunk.
@pytest.mark.parametrize("limit", [1, 2 * 4 * 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows_give_the_draws_of_the_whole(monkeypatch, limit, dtype):
    args = arguments(dtype=dtype)
    whole = ops.head_gumbel_draw(*args.values())
    x = torch.nn.functional.linear(args["hidden"], args["weight"], args["bias"]).float() * 1.3
    logits = 5.0 * torch.tanh(x / 5.0) + args["logit_bias"]
    draws = list(args.values())[6:]
    draws[4] = 7
    assert torch.equal(whole[0], ops.gumbel_draw(logits, *draws)[0])
    monkeypatch.setattr(ops, "LOGIT_BYTES", limit)
    for part, want in zip(ops.head_gumbel_draw(*args.values()), whole, strict=True):
        torch.testing.assert_close(part, want, rtol=1e-5, atol=1e-5)


def test_odd_shapes():
    one = ops.head_gumbel_draw(*arguments(num_draws=1, num_rows=1, vocab=3, width=1).values())
    assert one[0].shape == (1,)
    none = ops.head_gumbel_draw(*arguments(num_draws=0, num_rows=0 + 1).values())
    assert [x.shape for x in none] == [(0,)] * 4 and none[0].dtype == torch.int64
    certain = arguments(vocab=1, num_draws=4, termination_token_id=0, forbid_stop=torch.zeros(4).bool())
    token, *log_probs = ops.head_gumbel_draw(*certain.values())
    assert (token == 0).all() and all((x == 0).all() for x in log_probs)


def test_repeat_gives_equal_bits():
    args = arguments()
    first, second = (ops.head_gumbel_draw(*args.values()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["options", "plain"])
def test_opcheck(options):
    opcheck(torch.ops.fastgfn.head_gumbel_draw.default, tuple(arguments(num_draws=4, **options).values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(24)}, ValueError, r"hidden must be \(R, D\), got \(24,\)"),
        ({"hidden": torch.ones(5, 24).long()}, TypeError, "hidden must be floating point"),
        ({"weight": torch.ones(37, 23)}, ValueError, r"weight must be \(V, 24\), got \(37, 23\)"),
        ({"weight": torch.ones(37, 24).half()}, TypeError, "weight must be torch.float32 like hidden"),
        ({"weight": torch.ones(0, 24)}, ValueError, r"weight must be \(V, D\) with V >= 1"),
        ({"bias": torch.ones(36)}, ValueError, r"bias must be \(37,\)"),
        ({"logit_bias": torch.ones(37).long()}, TypeError, "logit_bias must be floating point"),
        ({"seed": torch.tensor(7)}, ValueError, r"seed must be \(1,\)"),
        ({"seed": torch.tensor([7.0])}, TypeError, "seed must be int64"),
        ({"rows": torch.full((64,), 5)}, ValueError, r"rows must be in \[0, 5\), got \[5\]"),
        ({"temperature": torch.ones(64).double()}, TypeError, "temperature must be torch.float32"),
        ({"trajectory": torch.ones(2).long()}, ValueError, r"trajectory must be \(64,\), got \(2,\)"),
        ({"forbid_stop": torch.ones(64)}, TypeError, "forbid_stop must be torch.bool"),
        ({"termination_token_id": 37}, ValueError, r"termination_token_id must be -1 or in \[0, 37\)"),
        ({"temperature": torch.zeros(64)}, ValueError, "temperature must be finite and > 0"),
    ],
)
def test_op_refuses_bad_input(change, error, message):
    with pytest.raises(error, match=f"gumbel_draw: {message}"):
        ops.head_gumbel_draw(*arguments(**change).values())


def public(args, **change):
    """The public function's options from those of the op."""
    keys = ("bias", "logit_bias", "logit_scale", "rows", "temperature", "trajectory", "position", "seed")
    options = {k: args[k] for k in keys} | {"final_logit_softcap": args["softcap"]}
    options |= {"termination_token_id": STOP, "forbid_termination": args["forbid_stop"]}
    return options | change


def test_public_function_equals_the_op_and_sample_next():
    args = arguments()
    want = ops.head_gumbel_draw(*args.values())
    for seed in (7, torch.tensor(7), torch.tensor([7])):
        draw = sample_next_from_hidden(args["hidden"], args["weight"], **public(args, seed=seed))
        have = (draw.token, draw.log_pf, draw.log_pterm, draw.log_behavior)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    logits = args["hidden"] @ args["weight"].T
    force = torch.arange(5) % 2 == 0
    options = dict(termination_token_id=STOP, force_termination=force, temperature=0.7, seed=3)
    draw = sample_next_from_hidden(args["hidden"], args["weight"], **options)
    same = sample_next(logits, **options)
    assert torch.equal(draw.token, same.token) and (draw.token[force] == STOP).all()
    assert (draw.log_behavior[force] == 0).all()
    torch.testing.assert_close(draw.log_pf, same.log_pf)
    weight = args["weight"].requires_grad_()
    assert not sample_next_from_hidden(args["hidden"], weight, seed=0).log_pf.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcap": 0.0}, "final_logit_softcap must be > 0 or None"),
        ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ({"temperature": -1.0}, r"temperature must be finite and > 0, got \[-1.0\]"),
        ({"termination_token_id": None}, "termination_token_id must be given with forbid_termination"),
        ({"rows": torch.zeros(2, 2).long()}, r"rows must be \(K,\)"),
        ({"position": torch.zeros(3).long()}, r"position must be \(64,\)"),
        ({"logit_bias": torch.zeros(3)}, r"logit_bias must be \(37,\)"),
    ],
)
def test_public_function_refuses_bad_input(change, message):
    args = arguments()
    with pytest.raises(ValueError, match=f"sample_next_from_hidden: {message}"):
        sample_next_from_hidden(args["hidden"], args["weight"], **public(args, **change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.nn.Linear(24, 37)},
            NotImplementedError,
            r"weight must be a plain .* got Linear; .*",
        ),
        (
            {"weight": torch.ones(37, 24).to(torch.int8)},
            NotImplementedError,
            "weight must be a plain .*, got Tensor torch.int8; .* pass them to sample_next",
        ),
        ({"weight": torch.ones(37, 24).half()}, checks.InputTypeError, "weight must be torch.float32 like"),
        ({"hidden": torch.ones(5, 24).long()}, checks.InputTypeError, "hidden must be float16, bfloat16,"),
        ({"bias": torch.ones(36)}, checks.InputError, r"bias must be \(37,\)"),
        ({"bias": torch.ones(37).double()}, checks.InputTypeError, "bias must be torch.float32 like hidden"),
        ({"seed": 1.5}, checks.InputTypeError, "seed must be an int, got float"),
        ({"seed": True}, checks.InputTypeError, "seed must be an int, got bool"),
        ({"seed": -(2**63) - 1}, checks.InputError, r"seed must be in \[-2\^63, 2\^63\)"),
        ({"seed": torch.tensor([1.0])}, checks.InputTypeError, "seed must be an int or an int64 tensor, got"),
        ({"seed": torch.tensor([1, 2])}, checks.InputError, r"seed must be \(\) or \(1,\), got \(2,\)"),
    ],
)
def test_public_function_refuses_other_heads_and_seeds(change, error, message):
    good = {"hidden": torch.ones(5, 24), "weight": torch.ones(37, 24), "seed": 0}
    with pytest.raises(error, match=f"sample_next_from_hidden: {message}"):
        sample_next_from_hidden(**(good | change))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 1e-9},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters(options, dtype):
    """Draws stay in the kept set with its density; log_pf and log_pterm are those of the whole policy."""
    num_draws, vocab = 400, 12
    logits, bias = torch.randn(2, vocab, dtype=dtype) * 2, torch.randn(vocab)
    rows = torch.arange(num_draws) % 2
    forbid = torch.arange(num_draws) % 4 < 2
    common = dict(rows=rows, temperature=1.5, logit_bias=bias, seed=4)
    common |= dict(termination_token_id=STOP, forbid_termination=forbid)
    draw = sample_next(logits, **common, **options)
    z = (logits + bias.to(dtype)).double()[rows]
    z[:, STOP] = z[:, STOP].masked_fill(forbid, -math.inf)
    p = (z / 1.5).softmax(1)
    seen = set()
    for k in range(num_draws):
        kept = ref.kept_tokens(p[k].tolist(), **options)
        v = int(draw.token[k])
        seen.add(v)
        assert v in kept
        mass = math.log(sum(float(p[k, u]) for u in kept))
        assert float(draw.log_behavior[k]) == pytest.approx(float(p[k, v].log()) - mass, abs=1e-5)
    assert len(seen) > 1
    log_q = z.log_softmax(1)
    assert draw.log_pf.dtype == dtype
    torch.testing.assert_close(
        draw.log_pf.double(), log_q.gather(1, draw.token[:, None])[:, 0], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(draw.log_pterm.double(), log_q[:, STOP], atol=1e-5, rtol=0)


def test_filters_that_keep_all_change_nothing():
    logits = torch.randn(50, 20)
    plain = sample_next(logits, temperature=0.8, seed=1)
    for options in ({"top_k": 20}, {"top_p": 1.0}, {"min_p": 0.0}):
        draw = sample_next(logits, temperature=0.8, seed=1, **options)
        assert torch.equal(draw.token, plain.token)
        assert (draw.log_pterm == -math.inf).all()
        torch.testing.assert_close(draw.log_behavior, plain.log_behavior)
    tied = sample_next(torch.zeros(200, 6), seed=1, top_k=2)
    assert set(tied.token.tolist()) == {0, 1}
    assert sample_next(torch.randn(3, 5), rows=as_int64([]), seed=0, top_k=2).token.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be >= 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\] or None"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\] or None"),
    ],
)
def test_filters_refuse_bad_values(options, message):
    with pytest.raises(ValueError, match=f"sample_next: {message}"):
        sample_next(torch.ones(1, 3), seed=0, **options)


FILTERS = [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": as_int64([0, -1])}, checks.InputError, r"rows must be in \[0, 3\), got \[-1\]"),
        ({"rows": as_int64([99, 0])}, checks.InputError, r"rows must be in \[0, 3\), got \[99\]"),
        (
            {"rows": torch.tensor([True, False, True])},
            checks.InputTypeError,
            "rows must be int64, got torch.bool",
        ),
        ({"position": as_int64([0, 2**32, 0])}, checks.InputError, r"position must be in \[0, 4294967296\)"),
        ({"trajectory": torch.zeros(3).int()}, checks.InputTypeError, "trajectory must be int64"),
    ],
)
def test_indices_are_checked_whatever_the_filter(options, change, error, message):
    with pytest.raises(error, match=f"sample_next: {message}"):
        sample_next(torch.randn(3, 5), seed=0, **options, **change)
    if not options:
        with pytest.raises(error, match=f"sample_next_from_hidden: {message}"):
            sample_next_from_hidden(torch.randn(3, 4), torch.randn(5, 4), seed=0, **change)


@pytest.fixture
def unread(monkeypatch):
    """The draws of a GPU, which reads no value, in the interpreter."""
    monkeypatch.setattr(values, "are_read", lambda tensor: False)
    monkeypatch.setattr(sampling, "gumbel_draw", ops.gumbel_draw_triton)
    monkeypatch.setattr(sampling, "head_gumbel_draw", ops.head_gumbel_draw_triton)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_bad_draws_are_marked_where_values_are_not_read(unread, monkeypatch, options):
    rows, position = as_int64([0, -1, 3, 1, 2]), as_int64([0, 0, 0, 2**32, 0])
    force = torch.tensor([True, True, False, False, False])
    per_draw = dict(rows=rows, position=position, force_termination=force)
    common = {n: x.to(DEVICE) for n, x in per_draw.items()} | dict(seed=0, termination_token_id=STOP)
    draws = [sample_next(torch.randn(3, 5, device=DEVICE), **common, **options)]
    if not options:
        hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
        draws.append(sample_next_from_hidden(hidden, weight, **common))
    for draw in draws:
        assert draw.token[0] == STOP and draw.token[1:4].tolist() == [-1] * 3 and draw.token[4] >= 0
        for log_prob in (draw.log_pf, draw.log_pterm, draw.log_behavior):
            assert log_prob.isnan().tolist() == [False, True, True, True, False]
    monkeypatch.setenv("FASTGFN_DEBUG", "1")
    with pytest.raises(checks.InputError, match="sample_next: logits must be .* got none at draw"):
        sample_next(torch.full((1, 5), math.nan, device=DEVICE), seed=0)
