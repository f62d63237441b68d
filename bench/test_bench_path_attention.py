"""Attention of one decoding step: n rows below G prompts of P nodes, each with L nodes of its own.

A step goes through the pools of several layers, so that own nodes come from memory, as they do in a model.
Rivals are given contiguous copies of what the paths lead to, made before the clock starts. A CPU reads a
prompt from its caches, so there the first two providers are one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from suite import DTYPES, Bench, Case, Outputs, Provider, Step, make_cases, worst_error
from torch import Tensor

from fastgfn.ops.path_attention import SharedPrompts, path_attention
from fastgfn.rollout.slots import tiles_of

SMOL = dict(H=9, Hkv=3, d=64)
LLAMA_1B = dict(H=32, Hkv=8, d=64)
LLAMA_8B = dict(H=32, Hkv=8, d=128)
GPT2_XL = dict(H=25, Hkv=25, d=64)
SHAPES = {
    "short": [dict(layers=2, n=6, G=2, P=40, L=5, H=4, Hkv=2, d=16)],
    "cpu": [
        dict(layers=4, n=64, G=1, P=200, L=30, **SMOL),
        dict(layers=4, n=64, G=1, P=200, L=30, **LLAMA_1B),
    ],
    "cuda": [
        dict(layers=8, n=256, G=1, P=200, L=30, **LLAMA_1B),
        dict(layers=8, n=256, G=16, P=200, L=30, **LLAMA_1B),
        dict(layers=8, n=64, G=1, P=1000, L=30, **LLAMA_1B),
        dict(layers=8, n=256, G=1, P=32, L=30, **LLAMA_1B),
        dict(layers=8, n=256, G=1, P=200, L=30, **LLAMA_8B),
        dict(layers=8, n=256, G=1, P=200, L=30, **GPT2_XL),
    ],
}


class Inputs(NamedTuple):
    """Rows of one prompt follow one another; the first n L nodes of a pool are their own."""

    query: Tensor  # (layers, n, H, d)
    keys: Tensor  # (layers, C, Hkv, d)
    values: Tensor  # (layers, C, Hkv, d)
    path: Tensor  # (n, P + L) int32
    length: Tensor  # (n,)
    shared: SharedPrompts


def cases(device: str, shapes: str) -> list[Case]:
    # Flash kernels take 16 bits only.
    dtypes = list(DTYPES) if device == "cpu" else ["bfloat16"]
    shapes = SHAPES[device if shapes == "full" else "short"]
    return make_cases("path_attention", device, ["decode"], dtypes, shapes)


def make_inputs(case: Case) -> Inputs:
    layers, n, prompts, depth, own = (case[x] for x in ("layers", "n", "G", "P", "L"))
    options = {"generator": torch.Generator(case.device).manual_seed(n), "device": case.device}
    shapes = (n, case["H"]), *[(n * own + prompts * depth, case["Hkv"])] * 2
    tensors = [torch.randn(layers, *s, case["d"], **options).to(DTYPES[case.dtype]) for s in shapes]
    prompt = torch.arange(n) * prompts // n
    path = torch.cat(
        [
            n * own + prompt[:, None] * depth + torch.arange(depth),
            torch.arange(n)[:, None] * own + torch.arange(own),
        ],
        dim=1,
    )
    tiles = tiles_of(prompt, torch.full((n,), depth))
    index = path.int(), torch.full((n,), depth + own), *tiles
    path, length, tiles, shared = (x.to(case.device) for x in index)
    return Inputs(*tensors, path, length, SharedPrompts(tiles[: n // 2], shared))


def step(case: Case, inputs: Inputs, shared: SharedPrompts | None) -> Step:
    def run() -> Outputs:
        layers = zip(inputs.query, inputs.keys, inputs.values, strict=True)
        options = {"scale": case["d"] ** -0.5, "shared": shared}
        return tuple(path_attention(*layer, inputs.path, inputs.length, **options) for layer in layers)

    return Step(torch.no_grad()(run))


def fastgfn(case: Case, inputs: Inputs) -> Step:
    return step(case, inputs, inputs.shared)


def fastgfn_unshared(case: Case, inputs: Inputs) -> Step:
    return step(case, inputs, None)


def contiguous(inputs: Inputs, path: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer the keys and values (rows, Hkv, nodes, d) of paths (rows, nodes)."""
    pools = zip(inputs.keys, inputs.values, strict=True)
    return [tuple(x[path.long()].transpose(1, 2).contiguous() for x in pair) for pair in pools]


def sdpa_unshared(case: Case, inputs: Inputs) -> Step:
    """Every row has a copy of its prompt."""
    pools = contiguous(inputs, inputs.path)

    def run() -> Outputs:
        layers = zip(inputs.query, pools, strict=True)
        found = [F.scaled_dot_product_attention(q[:, :, None], *kv, enable_gqa=True) for q, kv in layers]
        return tuple(x[:, :, 0] for x in found)

    return Step(torch.no_grad()(run))


def sdpa_pairs(case: Case, inputs: Inputs) -> Step:
    """Two calls, over the prompts and over the own parts, merged by their log-sum-exp; the query heads of a
    key head are queries of it, in the first with those of all rows of the prompt."""
    (n, heads, width), kv_heads = inputs.query.shape[1:], case["Hkv"]
    prompts, depth, group = case["G"], case["P"], heads // kv_heads
    whole = contiguous(inputs, inputs.path[:: n // prompts, :depth])
    own = contiguous(inputs, inputs.path[:, depth:])
    is_cpu = case.device == "cpu"
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if is_cpu else "")
    flash, flags = getattr(torch.ops.aten, name), (0.0, False) if is_cpu else (0.0, False, False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash(query, key, value, *flags)[:2]
        return out.float(), lse[..., None]

    def merged(query: Tensor, whole: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> Tensor:
        rows = query.view(prompts, -1, kv_heads, group, width).transpose(1, 2)
        first = attend(rows.flatten(2, 3), *whole)
        first = [x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for x in first]
        second = attend(query.view(n, kv_heads, group, width), *own)
        share = torch.sigmoid(first[1] - second[1])
        return torch.lerp(second[0], first[0], share).to(query.dtype).view_as(query)

    def run() -> Outputs:
        return tuple(merged(*layer) for layer in zip(inputs.query, whole, own, strict=True))

    return Step(torch.no_grad()(run))


def truth(case: Case, inputs: Inputs) -> Outputs:
    """Softmax in float64, one layer at a time."""
    found = []
    for q, k, v in zip(inputs.query, inputs.keys, inputs.values, strict=True):
        repeat, path = case["H"] // case["Hkv"], inputs.path.long()
        key, value = (x[path].double().repeat_interleave(repeat, 2) for x in (k, v))
        scores = torch.einsum("nhd,nwhd->nhw", q.double(), key) * case["d"] ** -0.5
        found.append(torch.einsum("nhw,nwhd->nhd", scores.softmax(-1), value))
    return tuple(found)


def error(case: Case, inputs: Inputs, have: Outputs, truth: Outputs) -> float:
    return worst_error(have, truth)


def work(case: Case) -> tuple[float, float]:
    """Two products with every node of every path; queries, outputs and every node of the pool once."""
    rows, nodes = case["n"], case["n"] * case["L"] + case["G"] * case["P"]
    flops = 4.0 * rows * (case["P"] + case["L"]) * case["H"] * case["d"]
    size = 2.0 * (rows * case["H"] + nodes * case["Hkv"]) * case["d"] * DTYPES[case.dtype].itemsize
    return case["layers"] * flops, case["layers"] * size


BENCH = Bench(
    name="path_attention",
    cases=cases,
    make_inputs=make_inputs,
    providers={
        "fastgfn": Provider(fastgfn),
        "fastgfn_unshared": Provider(fastgfn_unshared),
        "sdpa_unshared": Provider(sdpa_unshared),
        "sdpa_pairs": Provider(sdpa_pairs),
    },
    truth=truth,
    error=error,
    tolerance={"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)},
    work=work,
)


def test_path_attention(case, measure):
    measure(BENCH, case)
