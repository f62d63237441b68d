"""Attention of n samples over one prompt: the token tree against dense masks and unshared sequences.

The tree has P + n L nodes, the unshared sequences n (P + L) tokens; their outputs are compared on the nodes,
the gradients of copies added up. Masks are built before the clock starts: a model builds one for all layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from suite import DTYPES, Bench, Case, Outputs, Provider, Step, make_cases, need_cuda, worst_error
from torch import Tensor

from fastgfn.ops.attention import TreeMask, tree_attention

MODES = ("fwd", "fwd+bwd")
SMOL = dict(H=9, Hkv=3, d=64)
LLAMA = dict(H=32, Hkv=8, d=64)
SHAPES = {
    "short": [dict(P=12, n=3, L=5, H=4, Hkv=2, d=16)],
    "cpu": [
        dict(P=50, n=20, L=30, **SMOL),
        dict(P=200, n=20, L=30, **SMOL),
        dict(P=200, n=64, L=30, **SMOL),
        dict(P=200, n=20, L=30, **LLAMA),
    ],
    "cuda": [
        dict(P=200, n=20, L=30, **SMOL),
        dict(P=200, n=20, L=30, **LLAMA),
        dict(P=200, n=256, L=30, **LLAMA),
        dict(P=1000, n=64, L=128, **LLAMA),
    ],
}


class Inputs(NamedTuple):
    """The tree's tensors, and `node` (n, P + L): the node of every token of the unshared sequences."""

    query: Tensor  # (H, T, d)
    key: Tensor  # (Hkv, T, d)
    value: Tensor  # (Hkv, T, d)
    upstream: Tensor  # (H, T, d)
    end: Tensor  # (T,)
    position: Tensor  # (T,)
    node: Tensor  # (n, P + L)


# query, key, value -> output, in one layout.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, shapes: str) -> list[Case]:
    # Flash kernels take 16 bits only.
    dtypes = list(DTYPES) if device == "cpu" else ["bfloat16"]
    return make_cases("attention", device, MODES, dtypes, SHAPES[device if shapes == "full" else "short"])


def make_inputs(case: Case) -> Inputs:
    """n distinct samples of L tokens each below one prompt of P tokens."""
    prompt, n, length = case["P"], case["n"], case["L"]
    size = prompt + n * length
    generator = torch.Generator(case.device).manual_seed(size)
    heads = {"query": case["H"], "key": case["Hkv"], "value": case["Hkv"], "upstream": case["H"]}
    shape = size, case["d"]
    tensors = [
        torch.randn(num, *shape, generator=generator, device=case.device).to(DTYPES[case.dtype])
        for num in heads.values()
    ]
    own = torch.arange(n * length).view(n, length)
    position = torch.cat([torch.arange(prompt), prompt + own.flatten() % length])
    end = torch.cat([torch.full((prompt,), size), (prompt + (own // length + 1) * length).flatten()])
    node = torch.cat([torch.arange(prompt).expand(n, prompt), prompt + own], 1)
    return Inputs(*tensors, *(x.to(case.device) for x in (end.int(), position, node)))


def visible(inputs: Inputs) -> Tensor:
    """(T, T) bool: query row i sees key column j."""
    node = torch.arange(len(inputs.end), device=inputs.end.device)
    return (node[None] <= node[:, None]) & (node[:, None] < inputs.end[None])


def step(case: Case, tensors: tuple[Tensor, ...], attend: Attend) -> Callable[[], Outputs]:
    query, key, value, upstream = tensors
    if case.mode == "fwd":
        return torch.no_grad()(lambda: (attend(query, key, value),))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]

    def run() -> Outputs:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    return run


def fastgfn(case: Case, inputs: Inputs) -> Step:
    mask = TreeMask(inputs.end, inputs.position)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(query, key, value, mask, scale=case["d"] ** -0.5)

    return Step(step(case, inputs[:4], attend))


def sdpa(case: Case, inputs: Inputs) -> Step:
    seen = visible(inputs)
    mask = torch.zeros(seen.shape, dtype=inputs.query.dtype, device=seen.device)
    mask.masked_fill_(~seen, -torch.inf)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        args = query[None], key[None], value[None]
        return F.scaled_dot_product_attention(*args, attn_mask=mask, enable_gqa=True)[0]

    return Step(step(case, inputs[:4], attend))


def flex(case: Case, inputs: Inputs) -> Step:
    need_cuda(case)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end, size = inputs.end, len(inputs.end)

    def sees(b, h, i, j):
        return (j <= i) & (i < end[j])

    mask = create_block_mask(sees, None, None, size, size, device=case.device)
    attention = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query[None], key[None], value[None], block_mask=mask, enable_gqa=True)[0]

    return Step(step(case, inputs[:4], attend))


def unshared(inputs: Inputs) -> tuple[Tensor, ...]:
    """The four tensors as n (P + L) tokens (tokens, heads, d); a node's upstream is split over its copies."""
    node = inputs.node.flatten()
    query, key, value, upstream = (x.transpose(0, 1)[node].contiguous() for x in inputs[:4])
    copies = torch.bincount(node)[node]
    return query, key, value, (upstream / copies[:, None, None]).to(query.dtype)


def on_nodes(inputs: Inputs, result: Outputs) -> Outputs:
    """Results of unshared tokens in the tree's layout: the output of a copy, the sum of the gradients."""
    node = inputs.node.flatten()
    out, *grads = (x.double() for x in result)
    first = out.new_zeros(len(inputs.end), *out.shape[1:]).index_copy(0, node, out)
    sums = [g.new_zeros(len(inputs.end), *g.shape[1:]).index_add(0, node, g) for g in grads]
    return tuple(x.transpose(0, 1) for x in (first, *sums))


def sdpa_unshared(case: Case, inputs: Inputs) -> Step:
    """Causal SDPA over the n sequences as a batch; all have one length, so nothing is padded."""
    batch = inputs.node.shape

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        args = (x.view(*batch, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return Step(step(case, unshared(inputs), attend), lambda result: on_nodes(inputs, result))


def bounds(inputs: Inputs) -> tuple[Tensor, int]:
    n, length = inputs.node.shape
    return torch.arange(0, n * length + 1, length, dtype=torch.int32, device=inputs.end.device), length


def varlen(case: Case, inputs: Inputs) -> Step:
    need_cuda(case)
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = bounds(inputs)
    # torch 2.11 has no window_size or enable_gqa: there the heads are repeated.
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    has_gqa = "enable_gqa" in known
    repeat = case["H"] // case["Hkv"]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if has_gqa:
            options = causal | {"enable_gqa": True}
        else:
            options = causal
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        return varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)

    return Step(step(case, unshared(inputs), attend), lambda result: on_nodes(inputs, result))


def flash(case: Case, inputs: Inputs) -> Step:
    need_cuda(case)
    from flash_attn import flash_attn_varlen_func

    offsets, longest = bounds(inputs)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_varlen_func(query, key, value, offsets, offsets, longest, longest, causal=True)

    return Step(step(case, unshared(inputs), attend), lambda result: on_nodes(inputs, result))


def truth(case: Case, inputs: Inputs) -> Outputs:
    """Dense softmax in float64, one key head at a time."""
    repeat, seen = case["H"] // case["Hkv"], visible(inputs)
    parts = []
    for h in range(case["Hkv"]):
        group = slice(h * repeat, (h + 1) * repeat)
        heads = (inputs.query[group], inputs.key[h : h + 1], inputs.value[h : h + 1], inputs.upstream[group])

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = query @ key.transpose(1, 2) * case["d"] ** -0.5
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value

        parts.append(step(case, tuple(x.double() for x in heads), attend)())
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def error(case: Case, inputs: Inputs, have: Outputs, truth: Outputs) -> float:
    return worst_error(have, truth)


def work(case: Case) -> tuple[float, float]:
    """Visible pairs of the tree, two products forward and five backward; tensors read and written once."""
    prompt, n, length, width = case["P"], case["n"], case["L"], case["d"]
    pairs = prompt * (prompt + 1) / 2 + n * (length * prompt + length * (length + 1) / 2)
    has_grad = case.mode != "fwd"
    flops = 2.0 * pairs * case["H"] * width * (2 + 5 * has_grad)
    size = (prompt + n * length) * width * DTYPES[case.dtype].itemsize
    return flops, size * (2.0 * case["H"] + 2 * case["Hkv"]) * (1 + has_grad)


BENCH = Bench(
    name="attention",
    cases=cases,
    make_inputs=make_inputs,
    providers={
        "fastgfn": Provider(fastgfn),
        "flex": Provider(flex),
        "sdpa": Provider(sdpa),
        "sdpa_unshared": Provider(sdpa_unshared),
        "varlen_unshared": Provider(varlen),
        "flash_unshared": Provider(flash, "flash-attn"),
    },
    truth=truth,
    error=error,
    tolerance={"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)},
    work=work,
)


def test_attention(case, measure):
    measure(BENCH, case)
