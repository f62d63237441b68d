"""Random cases of the ops on trees and on padded rows; see fuzz_cases.py."""

import torch
from fuzz_cases import UPSTREAMS, Source, depths
from hypothesis import strategies as st

from fastgfn.functional._rows import LOSSES, NORMALIZATIONS, REDUCTIONS
from fastgfn.testing import parents

WIDE = (torch.float64, torch.float32)


@st.composite
def scan_cases(draw, is_tree):
    """Values with parents, or with offsets and a direction."""
    source = Source(draw)
    if is_tree:
        parent = parents(depths(source, 0, 9))
        size, inputs = len(parent), {"parent": parent}
    else:
        lengths = source.integers(0, 5, source.size(0, 4), layout="plain")
        size = int(lengths.sum())
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        inputs = {"offsets": offsets, "reverse": source.flag()}
    dtype = source.pick(*WIDE, torch.int64)
    if dtype == torch.int64:
        return inputs | {"values": source.integers(-9, 9, size)}, (), torch.float64, "random"
    return inputs | {"values": source.normal(size)}, ("values",), dtype, source.pick(*UPSTREAMS)


@st.composite
def index_cases(draw, gathers):
    """Values of nodes and an index of them, or values of an index and the number of nodes; -1 is none."""
    source = Source(draw)
    num_nodes, shape = source.size(0, 6), [source.size(0, 3) for _ in range(source.size(0, 3))]
    index = source.integers(-1, num_nodes, *shape, layout="plain")
    dtype = source.pick(*WIDE)
    if gathers and source.flag():
        values = source.integers(-9, 9, num_nodes, dtype=source.pick(torch.int64, torch.int8, torch.bool))
        return {"values": values, "index": index}, (), dtype, "random"
    if gathers:
        inputs = {"values": source.normal(num_nodes), "index": index}
        return inputs, ("values",), dtype, source.pick(*UPSTREAMS)
    inputs = {"grad": source.normal(*shape), "index": index, "num_nodes": num_nodes}
    return inputs, ("grad",), dtype, source.pick(*UPSTREAMS)


@st.composite
def path_cases(draw):
    source = Source(draw)
    depth = torch.tensor(depths(source, 1, 9))
    leaf = source.integers(0, len(depth), source.size(0, 4))
    above = torch.floor((depth[leaf] + 2) * torch.rand(leaf.shape, generator=source.generator)).long()
    num_nodes = above.clamp(max=depth[leaf] + 1)
    width = int(num_nodes.max()) if len(leaf) else 0
    return {
        "parent": parents(depth.tolist()),
        "leaf": leaf,
        "num_nodes": num_nodes,
        "width": width + source.size(0, 2),
    }


@st.composite
def tree_cases(draw):
    """A vocabulary of 3 makes shared prefixes and duplicates frequent; padding is never read."""
    source = Source(draw)
    prompts = [source.integers(0, 3, source.size(1, 3)) for _ in range(source.size(0, 3))]
    num_rows, width = source.size(0, 6) if prompts else 0, source.size(0, 4)
    first = source.pick(0, 2**62)
    tokens = first + source.integers(0, 3, num_rows, width)
    roles = source.integers(1, 4, num_rows, width, dtype=torch.int8) if source.flag() else None
    lengths = source.integers(0, width + 1, num_rows, dtype=source.pick(torch.int64, torch.int32))
    group = source.integers(0, max(len(prompts), 1), num_rows)
    return {"prompts": prompts, "tokens": tokens, "lengths": lengths, "group": group, "roles": roles}


@st.composite
def decode_cases(draw):
    source = Source(draw)
    num_rows, width = source.size(0, 5), source.size(1, 4)
    max_length = source.size(1, width)
    finished = source.where(0.4, num_rows)
    open_rows = (~finished).nonzero()[:, 0]
    rows = open_rows[torch.randperm(len(open_rows), generator=source.generator)][: source.size(0, 5)]
    state = {
        "tokens": source.integers(0, 9, num_rows, width, layout=source.pick("plain", "transposed", "sliced")),
        "lengths": source.integers(0, max_length, num_rows, layout=source.pick("plain", "sliced")),
        "finished": finished,
    }
    drawn = source.integers(0, 3, len(rows))
    return state, {"drawn": drawn, "rows": rows, "termination_token_id": 1, "max_length": max_length}


LAMBDAS = st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1)


@st.composite
def subtb_tree_cases(draw):
    source = Source(draw)
    parent = parents(depths(source, 0, 8))
    size = len(parent)
    inputs = {
        "log_pf": source.normal(size),
        "log_flow": source.normal(size, scale=source.pick(1.0, 30.0)),
        "parent": parent.to(source.pick(torch.int32, torch.int64)),
        "valid": source.where(source.pick(0.7, 1.0, 0.0), size),
        "weight": source.normal(size).abs() if source.flag() else source.integers(0, 4, size).double(),
        "subtb_lambda": draw(LAMBDAS),
    }
    return inputs, ("log_pf", "log_flow"), source.pick(*WIDE), source.pick(*UPSTREAMS)


@st.composite
def padded_cases(draw):
    source = Source(draw)
    num_rows, width = source.size(0, 4), source.size(0, 6)
    inputs = {
        "log_pf": source.normal(num_rows, width),
        "log_flow": source.normal(num_rows, width + 1, scale=source.pick(1.0, 30.0)),
        "lengths": source.integers(0, width + 1, num_rows, dtype=source.pick(torch.int32, torch.int64)),
        "subtb_lambda": draw(LAMBDAS),
        "loss": source.pick("squared", "huber", "shifted_cosh", "linex", "clamped"),
    }
    return inputs, ("log_pf", "log_flow"), source.pick(*WIDE), source.pick(*UPSTREAMS)


@st.composite
def loss_cases(draw):
    source = Source(draw)
    num_rows, width = source.size(0, 5), source.size(0, 5)
    normalization = source.pick(*NORMALIZATIONS)
    counts = source.integers(0, 4, num_rows) if source.flag() else None
    loss = source.pick(*LOSSES)
    inputs = {
        "log_pf": source.normal(num_rows, width),
        "log_flow": source.normal(num_rows, width + 1),
        "lengths": source.integers(0, width + 1, num_rows, dtype=source.pick(torch.int32, torch.int64)),
        "log_pb": source.normal(num_rows, width) if source.flag() else None,
        "subtb_lambda": draw(LAMBDAS),
        "normalization": normalization,
        "reduction": source.pick(*REDUCTIONS),
        "loss": loss,
        "residual_limit": source.pick(None, 0.5, 3.0) if loss == "clamped" else None,
        "weights": source.normal(num_rows).abs() if source.flag() else None,
        "counts": counts,
        "group_ids": source.integers(-1, 2, num_rows) if normalization == "group" else None,
    }
    leaves = ("log_pf", "log_flow") if inputs["log_pb"] is None else ("log_pf", "log_flow", "log_pb")
    return inputs, leaves, source.pick(*WIDE), source.pick(*UPSTREAMS)
