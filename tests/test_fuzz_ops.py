"""Every CPU op on random shapes, strides, dtypes and options, against its float64 reference."""

import math
from unittest.mock import patch

import pytest
import torch
from fuzz_cases import (
    Source,
    attention_cases,
    fields,
    fuzz,
    gate_cases,
    head_cases,
    head_draws,
    head_logits,
    linear_cases,
    logits_cases,
    logits_draws,
    public,
    quantized_cases,
)
from fuzz_decode_cases import (
    norm_cases,
    path_attention_cases,
    rope_cases,
    row_gate_cases,
    shared_path_cases,
    writes,
)
from fuzz_tree_cases import (
    WIDE,
    decode_cases,
    index_cases,
    loss_cases,
    padded_cases,
    path_cases,
    scan_cases,
    subtb_tree_cases,
    tree_cases,
)
from hypothesis import strategies as st

from fastgfn import functional
from fastgfn.ops import attention, decode_layer, head_tiles, linear, log_probs_from_logits, scan, subtb, tree
from fastgfn.ops import sample_next as draws
from fastgfn.ops.decode import decode_update_
from fastgfn.ops.path_attention import SharedPrompts, path_attention
from fastgfn.ops.silu_mul import silu_mul
from fastgfn.reference import attention as attention_truth
from fastgfn.reference import decode as decode_truth
from fastgfn.reference import decode_layer as layer_truth
from fastgfn.reference import linear as linear_truth
from fastgfn.reference import linear_log_probs as head_truth
from fastgfn.reference import log_probs_from_logits as logits_truth
from fastgfn.reference import quantized as quantized_truth
from fastgfn.reference import sample_next as draws_truth
from fastgfn.reference import scan as scan_truth
from fastgfn.reference import silu_mul as silu_mul_truth
from fastgfn.reference import subtb as subtb_truth
from fastgfn.reference import tree as tree_truth
from fastgfn.testing import assert_drawn_log_probs, assert_drawn_tokens, assert_equals_reference, forest

EXAMPLES = 1000


# Running sums and gathers.


@fuzz(EXAMPLES, case=scan_cases(is_tree=True))
def test_tree_cumsum(case):
    assert_equals_reference(scan.tree_cumsum, scan_truth.tree_cumsum, *case)


@fuzz(EXAMPLES, case=scan_cases(is_tree=True))
def test_subtree_sum(case):
    assert_equals_reference(scan.subtree_sum, scan_truth.subtree_sum, *case)


@fuzz(EXAMPLES, case=scan_cases(is_tree=False))
def test_segment_cumsum(case):
    assert_equals_reference(scan.segment_cumsum, scan_truth.segment_cumsum, *case)


@fuzz(EXAMPLES, case=index_cases(gathers=True))
def test_gather_nodes(case):
    assert_equals_reference(tree.gather_nodes, tree_truth.gather_nodes, *case)


@fuzz(EXAMPLES, case=index_cases(gathers=False))
def test_scatter_add_nodes(case):
    assert_equals_reference(tree.scatter_add_nodes, tree_truth.scatter_add_nodes, *case)


@fuzz(EXAMPLES, inputs=path_cases())
def test_path_nodes(inputs):
    assert_equals_reference(tree.path_nodes, tree_truth.path_nodes, inputs, (), torch.float64)


@fuzz(EXAMPLES, inputs=tree_cases())
def test_build_tree(inputs):
    assert_equals_reference(tree.build_tree, tree_truth.build_tree, inputs, (), torch.float64)


@fuzz(EXAMPLES, case=decode_cases())
def test_decode_update(case):
    state, step = case
    want = {name: x.clone() for name, x in state.items()}
    decode_truth.decode_update_(**want, **step)
    decode_update_(**state, **step)
    assert all(torch.equal(state[name], want[name]) for name in want)


# Sub-trajectory balance.


@fuzz(EXAMPLES, case=subtb_tree_cases())
def test_subtb_tree(case):
    assert_equals_reference(subtb.subtb_tree, subtb_truth.subtb_tree, *case)
    pairs = {name: case[0][name] for name in ("parent", "valid", "subtb_lambda")}
    assert_equals_reference(subtb.subtb_tree_pairs, subtb_truth.subtb_tree_pairs, pairs, (), torch.float64)


def subtb_padded(loss, **inputs):
    if loss == "squared":
        return subtb.subtb_padded(**inputs)
    return subtb.subtb_pairwise(**inputs, loss=loss)


def subtb_padded_truth(**inputs):
    numerator, denominator = subtb_truth.subtb_padded(**inputs)
    return numerator, denominator.detach()


@fuzz(EXAMPLES, case=padded_cases(), tile=st.sampled_from([2**17, 1, 10]))
def test_subtb_padded(case, tile):
    with patch.object(subtb, "TILE_ELEMENTS", tile):
        assert_equals_reference(subtb_padded, subtb_padded_truth, *case)


# Reductions of the padded losses, weights, counts and groups.


def subtb_loss_truth(
    log_pf, log_flow, lengths, log_pb, subtb_lambda, normalization, reduction, loss, residual_limit, weights,
    counts, group_ids,
):  # fmt: skip
    """The definitions of functional/subtb.py by groups of rows: one, every row its own, or the prompts."""
    half = 0.5 if loss == "half_squared" else 1.0
    net = log_pf if log_pb is None else log_pf - log_pb
    kind = "squared" if loss == "half_squared" else loss
    num, den = subtb_truth.subtb_padded(net, log_flow, lengths, subtb_lambda, kind, residual_limit or 100.0)
    num, ones = half * num if weights is None else half * num * weights, torch.ones_like(den)
    counts = ones if counts is None else counts.to(den)
    if normalization == "trajectory":
        terms = torch.where(den > 0, num / torch.where(den > 0, den, 1.0), 0.0)
        rows, terms, weight = terms, terms * counts, (den > 0) * counts
    else:
        ids = torch.zeros(len(den)) if group_ids is None else group_ids
        pooled = [float((den * counts)[ids == i].sum()) for i in ids]
        divisor = ones if group_ids is None else den.new_tensor([x or 1.0 for x in pooled])
        terms, weight = num * counts / divisor, den * counts / divisor
        rows = terms
    if reduction == "none":
        return rows
    return terms.sum() / (float(weight.sum()) or 1.0) if reduction == "mean" else terms.sum()


@fuzz(EXAMPLES, case=loss_cases())
def test_subtb_loss(case):
    assert_equals_reference(functional.subtb_loss, subtb_loss_truth, *case)


# The head.

by_torch = patch.object(head_tiles, "uses_csrc", lambda hidden, weight: False)


@fuzz(EXAMPLES, case=head_cases(), tile=st.sampled_from([512, 1, 3]))
def test_linear_log_probs_torch(case, tile):
    with by_torch, patch.object(head_tiles, "VOCAB_TILE", tile):
        assert_equals_reference(fields(functional.linear_log_probs), head_truth.linear_log_probs, *case)


EVEN = head_cases(
    (torch.bfloat16,),
    (1, 2, 7, 33, 600),
    (2, 4, 6, 34),
    ("plain", "padded"),
    trainable=False,
    masked=False,
)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="served by torch here")
@fuzz(EXAMPLES, case=EVEN)
def test_linear_log_probs_csrc(case):
    calls, by_csrc = [], head_tiles.rest_by_csrc
    with patch.object(head_tiles, "rest_by_csrc", lambda *args: calls.append(1) or by_csrc(*args)):
        assert_equals_reference(fields(functional.linear_log_probs), head_truth.linear_log_probs, *case)
    assert len(calls) == (case[0]["hidden"].numel() > 0)


@fuzz(EXAMPLES, case=head_cases(streams=2), tile=st.sampled_from([512, 1, 3]))
def test_policy_reward_log_probs(case, tile):
    with patch.object(head_tiles, "VOCAB_TILE", tile):
        function = fields(functional.policy_reward_log_probs)
        assert_equals_reference(function, head_truth.policy_reward_log_probs, *case)


@fuzz(EXAMPLES, case=logits_cases(), chunk=st.sampled_from([2**19, 1, 40]))
def test_log_probs_from_logits(case, chunk):
    with patch.object(log_probs_from_logits, "CHUNK_ELEMENTS", chunk):
        function = fields(functional.log_probs_from_logits)
        assert_equals_reference(function, logits_truth.log_probs_from_logits, *case)


# Draws.


def assert_draw(draw, args, naive_logits, force, filtered=None):
    """filtered: the arguments of the draw after top_k, top_p and min_p; they decide token and behaviour."""
    out = (draw.token, draw.log_pf, draw.log_pterm, draw.log_behavior)
    if force is not None:
        stop = args["termination_token_id"]
        assert all(bool((x[force] == (0 if k else stop)).all()) for k, x in enumerate(out))
        out = tuple(x[~force] for x in out)
        per_draw = ("rows", "temperature", "trajectory", "position", "forbid_stop")
        args = args | {name: args[name][~force] for name in per_draw}
        if filtered is not None:
            filtered = filtered | {name: filtered[name][~force] for name in per_draw}
    if filtered is None:
        assert_drawn_tokens(out[0], args)
        assert_drawn_log_probs(out, args, naive_logits)
        return
    assert_drawn_tokens(out[0], filtered)
    assert_drawn_log_probs(out, args, naive_logits, names=("log_pf", "log_pterm"))
    low = filtered["logits"].to(naive_logits.dtype)
    assert_drawn_log_probs(out, filtered, low, names=("log_behavior",))


FILTERS = st.none() | st.fixed_dictionaries({
    "top_k": st.none() | st.integers(1, 9),
    "top_p": st.sampled_from([None, 1e-9, 0.37, 0.83, 1.0]),
    "min_p": st.sampled_from([None, 0.0, 0.07, 1.0]),
})  # fmt: skip


def after_filters(args, filters):
    """The arguments of a draw of every row's own filtered logits."""
    z = args["logits"].double()[args["rows"]]
    stop, temperature = args["termination_token_id"], args["temperature"].double()[:, None]
    if stop >= 0:
        z[:, stop] = z[:, stop].masked_fill(args["forbid_stop"], -math.inf)
    for row, p in zip(z, (z / temperature).softmax(1), strict=True):
        kept = draws_truth.kept_tokens(p.tolist(), **filters)
        row[[v for v in range(len(p)) if v not in kept]] = -math.inf
    return args | {"logits": z, "rows": torch.arange(len(z))}


@fuzz(EXAMPLES, case=logits_draws((1, 2, 5, 8, 37, 300), WIDE), filters=FILTERS, data=st.data())
def test_sample_next(case, filters, data):
    logits, mask, args = case
    options, force = public(args, Source(data.draw))
    draw = functional.sample_next(logits, logit_bias=mask, **options, **(filters or {}))
    args["logits"] = logits if mask is None else logits + mask
    filtered = after_filters(args, filters) if filters else None
    assert_draw(draw, args, args["logits"], force, filtered)


@fuzz(EXAMPLES, case=head_draws((1, 2, 5, 8, 37), (*WIDE, torch.bfloat16)),
      chunk=st.sampled_from([2**26, 1, 80]), data=st.data())  # fmt: skip
def test_sample_next_from_hidden(case, chunk, data):
    head, args = case
    options, force = public(args, Source(data.draw))
    names = {"softcap": "final_logit_softcap"}
    with patch.object(draws, "LOGIT_BYTES", chunk):
        draw = functional.sample_next_from_hidden(**{names.get(n, n): x for n, x in head.items()}, **options)
    args["logits"], naive = head_logits(head)
    assert_draw(draw, args, naive, force)


# Layers and attention.


@fuzz(EXAMPLES, case=linear_cases(with_lora=True))
def test_lora_linear(case):
    assert_equals_reference(linear.lora_linear, linear_truth.lora_linear, *case)


@fuzz(EXAMPLES, case=quantized_cases())
def test_quantized_product(case):
    (x, weight, bias), dtype = case
    out = linear.product(x, linear.rollout_weight(weight, dtype), bias).double()
    x, weight, bias = (t if t is None else t.double() for t in (x, weight, bias))
    exact, bound = linear_truth.frozen_linear(x, weight, bias), quantized_truth.error_bound(x, weight, dtype)
    sums = x.abs() @ weight.abs().T + (0.0 if bias is None else bias.abs())
    rounding = 1e-5 if dtype == torch.int8 else 2.0**-8
    assert out.shape == exact.shape and bool(((out - exact).abs() <= bound + rounding * (sums + bound)).all())


@fuzz(EXAMPLES, case=linear_cases(with_lora=False))
def test_frozen_linear(case):
    assert_equals_reference(linear.frozen_linear, linear_truth.frozen_linear, *case)


@fuzz(EXAMPLES, case=gate_cases())
def test_silu_mul(case):
    assert_equals_reference(silu_mul, silu_mul_truth.silu_mul, *case)


@fuzz(EXAMPLES, case=attention_cases(), mask_bytes=st.sampled_from([64 * 2**20, 1, 100]))
def test_tree_attention(case, mask_bytes):
    end, position = forest(case[0])

    def op(**inputs):
        return attention.tree_attention(**inputs, mask=attention.TreeMask(end, position), provider="sdpa")

    def truth(**inputs):
        return attention_truth.tree_attention(**inputs, end=end, position=position)

    with patch.object(attention, "MASK_BYTES", mask_bytes):
        assert_equals_reference(op, truth, *case[1])


@fuzz(EXAMPLES, case=path_attention_cases())
def test_path_attention(case):
    assert_equals_reference(path_attention, attention_truth.path_attention, *case)


HALF = (torch.float32, torch.bfloat16, torch.float16)


@fuzz(EXAMPLES, case=norm_cases(adds=False, dtypes=HALF))
def test_rms_norm(case):
    assert_equals_reference(decode_layer.rms_norm, layer_truth.rms_norm, *case)


@fuzz(EXAMPLES, case=norm_cases(adds=True, dtypes=HALF))
def test_add_rms_norm(case):
    assert_equals_reference(decode_layer.add_rms_norm, layer_truth.add_rms_norm, *case)


@fuzz(EXAMPLES, case=rope_cases(HALF))
def test_rope_write(case):
    assert_equals_reference(writes(decode_layer.rope_write), writes(layer_truth.rope_write), *case)


@fuzz(EXAMPLES, case=row_gate_cases(HALF))
def test_silu_mul_row(case):
    assert_equals_reference(decode_layer.silu_mul_row, layer_truth.silu_mul_row, *case)


@fuzz(EXAMPLES, case=shared_path_cases())
def test_path_attention_of_shared_prompts(case):
    def op(*, shared, **inputs):
        return path_attention(**inputs, shared=SharedPrompts(*shared))

    def truth(*, shared, **inputs):
        return attention_truth.path_attention(**inputs)

    assert_equals_reference(op, truth, *case)
