"""Every Triton kernel in the interpreter on random shapes, strides, dtypes and options, against float64."""

from unittest.mock import patch

import pytest
import torch
from fuzz_cases import (
    attention_cases,
    fields,
    fuzz,
    head_cases,
    head_draws,
    head_logits,
    logits_cases,
    logits_draws,
)
from fuzz_decode_cases import (
    norm_cases,
    path_attention_cases,
    rope_cases,
    row_gate_cases,
    shared_path_cases,
    writes,
)
from hypothesis import strategies as st

from fastgfn import functional
from fastgfn.kernels import log_probs, path_attention, sample_next
from fastgfn.ops import attention, decode_layer, head
from fastgfn.ops.path_attention import path_attention_triton
from fastgfn.ops.sample_next import gumbel_draw_triton, head_gumbel_draw_triton
from fastgfn.reference import attention as attention_truth
from fastgfn.reference import decode_layer as layer_truth
from fastgfn.reference import linear_log_probs as head_truth
from fastgfn.reference import log_probs_from_logits as logits_truth
from fastgfn.testing import assert_drawn_log_probs, assert_drawn_tokens, assert_equals_reference, forest

EXAMPLES = 50
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# No multiple of a tile, a few tiles of 16.
VOCABULARIES = (1, 2, 7, 33, 40)
WIDTHS = (0, 1, 5, 16, 17, 33)
pytestmark = [
    pytest.mark.skipif(not log_probs.IS_INTERPRETED, reason="random shapes are for the interpreter"),
    # both sides of a where are computed, and what is masked overflows
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@fuzz(EXAMPLES, case=logits_cases(DTYPES, VOCABULARIES), block=st.sampled_from([16, 4096]))
def test_log_probs_from_logits(case, block):
    case[0]["backend"] = "triton"
    with patch.object(log_probs, "BLOCK_V", block):
        assert_equals_reference(fields(functional.log_probs_from_logits), logits_log_probs, *case)


def logits_log_probs(backend, **inputs):
    return logits_truth.log_probs_from_logits(**inputs)


@pytest.mark.usefixtures("small_blocks")
@fuzz(
    EXAMPLES,
    case=attention_cases(
        DTYPES, 34, ("plain", "padded", "nodes_first", "expanded"), (1, 5, 16, 24), heads=(2, 2)
    ),
)
def test_tree_attention(case):
    end, position = forest(case[0])

    def op(**inputs):
        return attention.tree_attention(**inputs, mask=attention.TreeMask(end, position), provider="triton")

    def truth(**inputs):
        return attention_truth.tree_attention(**inputs, end=end, position=position)

    assert_equals_reference(op, truth, *case[1])


@fuzz(EXAMPLES, case=path_attention_cases(DTYPES))
def test_path_attention(case):
    def op(*, scale, softcap, window, **tensors):
        return path_attention_triton(**tensors, scale=scale, softcap=softcap or 0.0, window=window or 0)

    assert_equals_reference(op, attention_truth.path_attention, *case)


@fuzz(EXAMPLES, case=shared_path_cases(DTYPES), lines=st.sampled_from([16, 32]))
def test_shared_prompts(case, lines):
    """In tiles of 16 nodes, so that there are several, also of splits, and of few rows."""

    def op(*, scale, softcap, window, shared, **tensors):
        options = dict(scale=scale, softcap=softcap or 0.0, window=window or 0)
        return path_attention_triton(**tensors, **options, tiles=shared[0], depth=shared[1])

    def truth(*, shared, **inputs):
        return attention_truth.path_attention(**inputs)

    blocks = {size: {64: (lines, 16, 4, 1)} for size in (2, 4)}
    with patch.object(path_attention, "SHARED_TILES", blocks):
        assert_equals_reference(op, truth, *case)


def check_head(case, provider, streams):
    name = "linear_log_probs" if streams == 1 else "policy_reward_log_probs"
    op, truth = fields(getattr(functional, name)), getattr(head_truth, name)
    with patch.object(head, "choose_provider", lambda *args, **kwargs: provider):
        assert_equals_reference(op, truth, *case)


# The logits of all rows at once, or of three rows of 40 tokens at a time.
CHUNKS = st.sampled_from([(head.CHUNK_BYTES, head.ROW_MULTIPLE, head.VOCAB_MULTIPLE), (3 * 40 * 4, 1, 8)])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("streams", [1, 2], ids=["one_stream", "two_streams"])
@pytest.mark.parametrize("provider", ["row_pass", "row_pass_narrow"])
@fuzz(EXAMPLES, data=st.data(), chunks=CHUNKS)
def test_head_row_pass(data, chunks, provider, streams):
    # in 16 bits it refuses a trainable head
    trainable = provider == "row_pass"
    case = data.draw(head_cases(DTYPES, VOCABULARIES, WIDTHS, streams=streams, trainable=trainable))
    with patch.multiple(
        head, **dict(zip(("CHUNK_BYTES", "ROW_MULTIPLE", "VOCAB_MULTIPLE"), chunks, strict=True))
    ):
        check_head(case, provider, streams)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("streams", [1, 2], ids=["one_stream", "two_streams"])
@fuzz(EXAMPLES, data=st.data())
def test_head_fused(data, streams):
    """Rows of scale 1 and no low temperature: the logit of a token and the one within lse are two float32
    sums, so log p near 0 is off by an ulp of the logit, which at 40 is more than the tolerance."""
    case = data.draw(head_cases(DTYPES, VOCABULARIES, WIDTHS, streams=streams, largest=1.0, masked=False))
    inputs, _, *rest = case
    inputs["temperature"] = max(inputs["temperature"], 1.0)
    check_head((inputs, (), *rest), "fused", streams)  # it serves calls without gradient


@fuzz(EXAMPLES, case=logits_draws((1, 2, 8, 37, 130)), block=st.sampled_from([32, 4096]))
def test_draw_from_logits(case, block):
    logits, mask, args = case
    args = {"logits": logits if mask is None else logits + mask} | args
    with patch.object(sample_next, "LOGITS_BLOCK", block):
        drawn = gumbel_draw_triton(*args.values())
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args)


@fuzz(EXAMPLES, case=head_draws((1, 2, 8, 37, 130), DTYPES, most=20))
def test_fused_head_draw(case):
    weights, args = case
    drawn = head_gumbel_draw_triton(**weights, **args | {"seed": torch.tensor([args["seed"]])})
    args["logits"], naive = head_logits(weights, rounded=False)
    assert_drawn_tokens(drawn[0], args)
    assert_drawn_log_probs(drawn, args, naive)


@fuzz(EXAMPLES, case=norm_cases(adds=False, dtypes=DTYPES))
def test_rms_norm(case):
    assert_equals_reference(decode_layer._rms_norm_triton, layer_truth.rms_norm, *case)


@fuzz(EXAMPLES, case=norm_cases(adds=True, dtypes=DTYPES))
def test_add_rms_norm(case):
    assert_equals_reference(decode_layer._add_rms_norm_triton, layer_truth.add_rms_norm, *case)


@fuzz(EXAMPLES, case=rope_cases(DTYPES))
def test_rope_write(case):
    op, truth = writes(decode_layer._rope_write_triton, flat=True), writes(layer_truth.rope_write)
    assert_equals_reference(op, truth, *case)


@fuzz(EXAMPLES, case=row_gate_cases(DTYPES))
def test_silu_mul_row(case):
    assert_equals_reference(decode_layer._silu_mul_row_triton, layer_truth.silu_mul_row, *case)
