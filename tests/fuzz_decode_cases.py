"""Random inputs of the ops of a decoding step, see fuzz_cases.py."""

import torch
from fuzz_cases import ALL_DTYPES, Source, laid_out
from hypothesis import strategies as st


@st.composite
def norm_cases(draw, adds, dtypes):
    source = Source(draw)
    rows, width = source.size(0, 4), source.size(1, 40)
    inputs = {"x": source.normal(rows, width, scale=source.pick(1.0, 30.0, 1e-3))}
    inputs |= {"delta": source.normal(rows, width)} if adds else {}
    inputs |= {"weight": source.normal(width), "eps": source.pick(1e-5, 0.1)}
    return inputs, (), source.pick(*dtypes)


@st.composite
def row_gate_cases(draw, dtypes):
    source = Source(draw)
    row = source.normal(source.size(0, 4), 2 * source.size(0, 20), scale=source.pick(1.0, 30.0))
    return {"row": row}, (), source.pick(*dtypes)


@st.composite
def rope_cases(draw, dtypes):
    """Rows whose keys and values go to some nodes of a pool; cos and sin belong to no angle."""
    source = Source(draw)
    num_rows, width = source.size(0, 4), 2 * source.size(1, 12)
    heads, kv_heads, spare = source.size(1, 4), source.size(1, 3), source.size(0, 3)
    inputs = {"row": source.normal(num_rows, (heads + 2 * kv_heads) * width)}
    inputs |= {name: source.normal(num_rows, width) for name in ("cos", "sin")}
    inputs["nodes"] = torch.randperm(num_rows + spare, generator=source.generator)[:num_rows]
    pool = num_rows + spare, kv_heads, width
    inputs |= {name: source.normal(*pool, layout="plain") for name in ("keys", "values")}
    if source.flag():
        inputs |= {"query_weight": source.normal(width), "key_weight": source.normal(width)}
    return inputs, (), source.pick(*dtypes)


def writes(rope_write, flat=False):
    """(queries, keys, values) of a function that writes into the pools, from `rope_cases`."""

    def call(keys, values, query_weight=None, key_weight=None, **rest):
        keys, values, norms = keys.clone(), values.clone(), (query_weight, key_weight)
        order = (*(rest[name] for name in ("row", "cos", "sin", "nodes")), keys, values)
        norms = norms if flat else (norms if query_weight is not None else None,)
        out = rope_write(*order, *norms, 1e-5)
        return out if isinstance(out, tuple) else (out, keys, values)

    return call


@st.composite
def path_attention_cases(draw, dtypes=ALL_DTYPES, widths=(1, 5, 16, 40), most_rows=4, longest=20):
    """Rows whose paths share nodes of a pool in any order; what a path holds past its length is no node."""
    source = Source(draw)
    num_rows, capacity, longest = source.size(0, most_rows), source.size(1, 12), source.size(1, longest)
    width, kv_heads, group = source.pick(*widths), source.size(1, 2), source.size(1, 3)
    length = source.integers(1, longest + 1, num_rows)
    path = source.integers(0, capacity, num_rows, longest, dtype=torch.int32, layout="plain")
    path[torch.arange(longest) >= length[:, None]] = 2**30
    inputs = {
        "query": source.normal(num_rows, kv_heads * group, width),
        "keys": source.normal(capacity, kv_heads, width, layout="plain"),
        "values": source.normal(capacity, kv_heads, width, layout="plain"),
        "path": laid_out(path, source.pick("plain", "sliced", "transposed")),
        "length": length,
        "scale": source.pick(width**-0.5, 1.0),
        "softcap": source.pick(None, 1.5),
        "window": source.maybe(1, 8),
    }
    return inputs, (), source.pick(*dtypes)


@st.composite
def shared_path_cases(draw, dtypes=ALL_DTYPES, widths=(1, 5, 16, 40)):
    """Such rows, some of which begin with the same nodes and are in tiles (T, R), among empty ones."""
    inputs, leaves, dtype = draw(path_attention_cases(dtypes, widths, most_rows=9, longest=70))
    source, path, length = Source(draw), inputs["path"].clone(), inputs["length"].clone()
    columns, (num_rows, longest) = source.size(1, 6), path.shape
    rows, tiles = torch.randperm(num_rows, generator=source.generator), []
    depth = torch.zeros(num_rows, dtype=torch.int64)
    while len(rows) and source.size(0, 3):
        count = source.size(1, columns)
        own, rows = rows[:count], rows[count:]
        nodes = source.size(1, int(length[own[0]]))
        path[own, :nodes] = path[own[0], :nodes].clone()
        length[own] = length[own].clamp(min=nodes)
        depth[own] = nodes
        tiles += [own, *[own[:0]] * source.size(0, 1)]
    path[path == 2**30] = 0  # what became longer has nodes there
    path[torch.arange(longest) >= length[:, None]] = 2**30
    table = torch.full((len(tiles), columns), -1, dtype=torch.int32)
    for line, own in zip(table, tiles, strict=True):
        line[: len(own)] = own.int()
    layouts = ("plain", "sliced", "transposed")
    tables = laid_out(table, source.pick(*layouts)), laid_out(depth, source.pick("plain", "sliced"))
    inputs |= {"path": laid_out(path, source.pick(*layouts)), "length": length, "shared": tables}
    return inputs, leaves, dtype
