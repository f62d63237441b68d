"""Random cases of test_fuzz_ops.py and test_fuzz_kernels.py: sizes, options and strides come from hypothesis,
which shrinks them; numbers come from a drawn seed. FASTGFN_FUZZ sets the number of examples of every test.

A case is (inputs, leaves, dtype, upstream) of `testing.assert_equals_reference`, or the arguments of a draw.
"""

import functools
import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgfn.testing import cast, random_depths

ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UPSTREAMS = ("random", "expanded", "transposed")
LAYOUTS = ("plain", "transposed", "sliced", "padded", "expanded")
# A scalar temperature, or any of these for each draw.
TEMPERATURES = (1.0, 0.05, 0.7, 2.0, 8.0)


def fuzz(examples, **strategies):
    """Decorator: a test of so many examples, the same ones in every run."""
    examples = int(os.environ.get("FASTGFN_FUZZ", examples))
    # what a fixture sets here holds for all examples
    unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    options = dict(max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False)
    return lambda test: settings(**options, suppress_health_check=unchecked)(given(**strategies)(test))


def fields(function):
    """The outputs of a function of `functional` in the order of the reference's."""

    def call(**inputs):
        out = function(**inputs, return_lse=True)
        streams = out if isinstance(out, tuple) else (out,)
        return [(x.log_pf, x.log_pterm, x.lse) for x in streams]

    return call


# Making a strategy takes longer than drawing from it.
_between = functools.cache(st.integers)


class Source:
    """Numbers of one case, from its seed; every tensor in a layout that hypothesis chooses."""

    def __init__(self, draw, layouts=LAYOUTS):
        self.draw = draw
        self.layouts = layouts
        self.generator = torch.Generator().manual_seed(self.size(0, 2**32))

    def size(self, low, high):
        return self.draw(_between(low, high))

    def pick(self, *values):
        return values[self.size(0, len(values) - 1)]

    def flag(self):
        return self.size(0, 1) == 1

    def maybe(self, low, high):
        """A size or None."""
        return self.size(low, high) if self.flag() else None

    def some(self, names):
        """Some of the names, at least one."""
        return self.pick(names, *((name,) for name in names), names[:-1] or names)

    def normal(self, *shape, scale=1.0, layout=None):
        x = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return laid_out(x, self.pick(*self.layouts) if layout is None else layout)

    def integers(self, low, high, *shape, dtype=torch.int64, layout=None):
        """In [low, high), int64 or the dtype."""
        x = torch.randint(low, high, shape, generator=self.generator).to(dtype)
        return laid_out(x, self.pick(*self.layouts) if layout is None else layout)

    def where(self, chance, *shape):
        return torch.rand(shape, generator=self.generator) < chance


def laid_out(x, layout):
    """x with the strides of the layout, among NaN (or numbers out of any range); expanded repeats x[0]."""
    if layout == "plain" or x.dim() == 0:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "nodes_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    width = x.shape[-1]
    filler = torch.nan if x.is_floating_point() else x.dtype is torch.bool or 127
    around = torch.full((*x.shape[:-1], 2 * width + 4), filler, dtype=x.dtype)
    view = around[..., 1 : 2 * width + 1 : 2] if layout == "sliced" else around[..., 2 : width + 2]
    return view.copy_(x)


def depths(source, low, high):
    """Depths of a random forest in preorder, of low to high nodes."""
    size, deeper = source.size(low, high), source.pick(0.5, 0.0, 0.85, 1.0)
    return random_depths(size, deeper=deeper, seed=source.size(0, 2**16))


def vocabulary_mask(source, vocab, kept):
    """Additive (V,) mask, or None: -inf, -99 or -3 at some tokens, never at the token that is kept."""
    value = source.pick(None, -math.inf, -99.0, -3.0)
    if value is None:
        return None
    masked = source.where(source.pick(0.3, 0.9), vocab)
    masked[kept] = False
    return laid_out(torch.where(masked, value, 0.0).double(), source.pick("plain", "sliced"))


def logit_options(source, vocab):
    """Options that turn scores into log-probabilities, and mask."""
    options = {
        "termination_token_id": source.maybe(0, vocab - 1),
        "logit_scale": source.pick(1.0, 0.7, -0.3, 0.0),
        "final_logit_softcap": source.pick(None, 4.0, 0.5, 30.0),
        "temperature": source.pick(1.0, 0.3, 1.3, 8.0),
        "ignore_index": source.pick(-100, -1, 0),
    }
    return options, source.size(0, vocab - 1)


def targets(source, options, vocab, size):
    """(M,) tokens, among them the stop token and ignored ones."""
    tokens = source.integers(0, vocab, size, layout="plain")
    if options["termination_token_id"] is not None:
        tokens[source.where(0.3, size)] = options["termination_token_id"]
    tokens[source.where(0.2, size)] = options["ignore_index"]
    return laid_out(tokens.to(source.pick(torch.int64, torch.int32)), source.pick("plain", "sliced"))


@st.composite
def logits_cases(draw, dtypes=ALL_DTYPES, vocabularies=(1, 2, 3, 7, 33)):
    source = Source(draw)
    num_rows, vocab = source.size(0, 4), source.pick(*vocabularies)
    options, kept = logit_options(source, vocab)
    inputs = options | {
        "logits": source.normal(num_rows, vocab, scale=source.pick(3.0, 20.0)),
        "targets": targets(source, options, vocab, num_rows),
        "logit_bias": vocabulary_mask(source, vocab, kept),
    }
    return inputs, ("logits",), source.pick(*dtypes), source.pick(*UPSTREAMS)


def row_masks(source, vocab, kept, num_rows):
    """Masks in packed bits, which all allow the token that is kept, and the mask of each row or -1."""
    num_masks = source.size(1, 3)
    allowed = source.where(source.pick(0.5, 0.02, 0.98), num_masks, vocab)
    allowed[:, kept] = True
    bits = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little"))
    return {"allowed": bits, "allowed_row": source.integers(-1, num_masks, num_rows)}


@st.composite
def head_cases(
    draw, dtypes=ALL_DTYPES, vocabularies=(1, 2, 3, 7, 33), widths=tuple(range(7)), weights=LAYOUTS,
    streams=1, trainable=True, largest=8.0, masked=True,
):  # fmt: skip
    """linear_log_probs, or with two streams policy_reward_log_probs; largest: most scale of the rows; masked:
    rows may have masks of their own."""
    source = Source(draw)
    vocab, width = source.pick(*vocabularies), source.pick(*widths)
    options, kept = logit_options(source, vocab)
    inputs, tokens, rows = dict(options), [], []
    names = ("hidden",) if streams == 1 else ("policy_hidden", "reward_hidden")
    masks = ("logit_bias",) if streams == 1 else ("policy_logit_bias", "reward_logit_bias")
    for name, mask in zip(names, masks, strict=True):
        num_rows = source.size(0, 4)
        num_targets = source.size(0, 6) if num_rows else 0
        inputs[name] = source.normal(num_rows, width, scale=source.pick(1.0, largest))
        inputs[mask] = vocabulary_mask(source, vocab, kept)
        tokens.append(targets(source, options, vocab, num_targets))
        rows.append(source.integers(0, max(num_rows, 1), num_targets, layout=source.pick("plain", "sliced")))
    inputs["weight"] = source.normal(vocab, width, scale=max(width, 1) ** -0.5, layout=source.pick(*weights))
    inputs["bias"] = source.normal(vocab) if source.flag() else None
    inputs |= {"targets": tuple(tokens), "rows": tuple(rows)}
    if masked and source.flag():
        inputs |= row_masks(source, vocab, kept, len(inputs[names[0]]))
    if streams == 1:
        inputs |= {"targets": tokens[0], "rows": rows[0]}
        if len(tokens[0]) == len(inputs["hidden"]) and source.flag():
            inputs["rows"] = None
    leaves = names[:1]
    if trainable and source.flag():
        leaves = source.some((names[0], "weight", *([] if inputs["bias"] is None else ["bias"])))
    return inputs, leaves, source.pick(*dtypes), source.pick(*UPSTREAMS)


@st.composite
def attention_cases(draw, dtypes=ALL_DTYPES, nodes=8, layouts=LAYOUTS, widths=(1, 2, 5, 8), heads=(2, 3)):
    """Tree attention: (depths, case); heads: most key heads, most query heads of each."""
    source = Source(draw, layouts)
    tree = depths(source, 0, nodes)
    kv_heads, group, width = source.size(1, heads[0]), source.size(1, heads[1]), source.pick(*widths)
    inputs = {
        "query": source.normal(kv_heads * group, len(tree), width, scale=source.pick(1.0, 4.0)),
        "key": source.normal(kv_heads, len(tree), width),
        "value": source.normal(kv_heads, len(tree), width),
        "scale": source.pick(width**-0.5, 0.1, 1.0),
        "softcap": source.pick(None, 1.5, 30.0),
        "window": source.maybe(1, nodes),
    }
    leaves = source.some(("query", "key", "value"))
    return tree, (inputs, leaves, source.pick(*dtypes), source.pick(*UPSTREAMS))


def draw_options(source, num_rows, vocab, kept, most):
    """Arguments of `gumbel_draw` but the logits by name, up to `most` draws; `kept` is never masked."""
    num_draws = source.size(0, most)
    stop = source.size(-1, vocab - 1)
    may_forbid = stop >= 0 and stop != kept
    return {
        "rows": source.integers(0, num_rows, num_draws),
        "temperature": torch.tensor(TEMPERATURES)[source.integers(0, len(TEMPERATURES), num_draws)],
        "trajectory": source.integers(-(2**63), 2**63 - 1, num_draws),
        "position": source.integers(0, 2**32, num_draws),
        "seed": source.pick(0, 7, -5, 2**62 + 1, -(2**63)),
        "termination_token_id": stop,
        "forbid_stop": source.where(0.4 if may_forbid else 0.0, num_draws),
    }


@st.composite
def logits_draws(draw, vocabularies, dtypes=(torch.float32,), most=6):
    """(logits with their mask, the arguments of a draw from them)."""
    source = Source(draw)
    num_rows, vocab = source.size(1, 4), source.pick(*vocabularies)
    kept = source.size(0, vocab - 1)
    dtype = source.pick(*dtypes)
    # float64 itself would be off by more than its tolerance
    offset = source.pick(0.0, 1e4) if dtype == torch.float32 else 0.0
    logits = source.normal(num_rows, vocab, scale=source.pick(2.0, 0.0, 20.0), layout="plain") + offset
    logits = laid_out(logits, source.pick("plain", "padded", "expanded"))  # of contiguous rows
    mask = vocabulary_mask(source, vocab, kept)
    options = draw_options(source, num_rows, vocab, kept, most)
    return cast(logits, dtype), None if mask is None else mask.to(dtype), options


@st.composite
def head_draws(draw, vocabularies, dtypes, most=6):
    """(the head's arguments of `head_gumbel_draw` by name, those of the draw)."""
    source = Source(draw)
    num_rows, vocab, width = source.size(1, 4), source.pick(*vocabularies), source.size(1, 9)
    kept, dtype = source.size(0, vocab - 1), source.pick(*dtypes)
    mask = vocabulary_mask(source, vocab, kept)
    head = {
        "hidden": cast(source.normal(num_rows, width), dtype),
        "weight": cast(source.normal(vocab, width, scale=source.pick(1.0, 4.0)), dtype),
        "bias": source.normal(vocab).to(dtype) if source.flag() else None,
        "logit_bias": None if mask is None else mask.float(),
        "logit_scale": source.pick(1.0, 1.3, -0.4, 0.0),
        "softcap": source.pick(None, 5.0, 0.5),
    }
    return head, draw_options(source, num_rows, vocab, kept, most)


def head_logits(head, rounded=True):
    """The logits of a head in float64 and in float32; rounded: the product of a bfloat16 head in bfloat16."""
    dtype = head["hidden"].dtype
    scores = []
    for wide in (torch.float64, torch.float32):
        kind = dtype if rounded and dtype == torch.bfloat16 else wide
        bias = None if head["bias"] is None else head["bias"].to(kind)
        x = torch.nn.functional.linear(head["hidden"].to(kind), head["weight"].to(kind), bias).to(wide)
        x = x * head["logit_scale"]
        x = x if head["softcap"] is None else head["softcap"] * torch.tanh(x / head["softcap"])
        scores.append(x if head["logit_bias"] is None else x + head["logit_bias"].to(wide))
    return scores


def public(args, source):
    """The public options of a draw, where they may be left out; and its arguments to match."""
    stop, num_draws = args["termination_token_id"], len(args["rows"])
    options = {name: args[name] for name in ("rows", "temperature", "trajectory", "position", "seed")}
    options["termination_token_id"] = None if stop < 0 else stop
    force = None
    if stop >= 0:
        options["forbid_termination"] = args["forbid_stop"]
        force = source.where(0.3, num_draws) if source.flag() else None
        options["force_termination"] = force
        args["forbid_stop"] = args["forbid_stop"] if force is None else args["forbid_stop"] & ~force
    if source.flag():
        args["trajectory"] = torch.arange(num_draws)
        args["position"] = torch.zeros(num_draws, dtype=torch.int64)
        options["trajectory"] = options["position"] = None
    if source.flag():
        options["temperature"] = 0.7
        args["temperature"] = torch.full((num_draws,), 0.7)
    return options, force


@st.composite
def linear_cases(draw, with_lora):
    source = Source(draw)
    shape = [source.size(0, 4) for _ in range(source.size(0, 2))]
    width, out, rank = source.size(0, 6), source.size(0, 6), source.size(0, 3)
    inputs = {
        "x": source.normal(*shape, width),
        "weight": source.normal(out, width),
        "bias": source.normal(out) if source.flag() else None,
    }
    leaves = ("x",)
    if with_lora:
        inputs |= {"lora_a": source.normal(rank, width), "lora_b": source.normal(out, rank)}
        inputs["scale"] = source.pick(1.0, 0.7, -2.0, 0.0)
        leaves = source.some(("x", "lora_a", "lora_b"))
    return inputs, leaves, source.pick(*ALL_DTYPES), source.pick(*UPSTREAMS)


@st.composite
def quantized_cases(draw):
    """x, weight and bias of a product in 8 bits, and the dtype; float8 takes multiples of 16."""
    source = Source(draw)
    dtype = source.pick(torch.int8, torch.float8_e4m3fn)
    least, unit = (0, 1) if dtype == torch.int8 else (1, 16)
    rows, width, out = source.size(0, 5), unit * source.size(least, 9), unit * source.size(least, 9)
    x, weight = source.normal(rows, width, scale=source.pick(1.0, 1e3)), source.normal(out, width)
    bias = source.normal(out) if source.flag() else None
    return [t if t is None else t.to(torch.float32) for t in (x, weight, bias)], dtype


@st.composite
def gate_cases(draw):
    source = Source(draw)
    shape = [source.size(0, 4) for _ in range(source.size(0, 3))]
    inputs = {"gate": source.normal(*shape, scale=source.pick(1.0, 30.0)), "up": source.normal(*shape)}
    return inputs, source.some(("gate", "up")), source.pick(*ALL_DTYPES), source.pick(*UPSTREAMS)
