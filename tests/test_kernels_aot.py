"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills,
and those that multiply matrices use the tensor cores.

The compilation runs in one process of its own (this file as a script), because it fails in the interpreter.
"""

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile

from aot_decode_variants import (
    PATHS,
    STEP,
    STEP_32,
    norm_variants,
    path_variants,
    rope_variants,
    shared_variants,
)

from fastgfn.kernels import (
    decode_layer,
    head,
    head_backward,
    head_fused,
    head_sample_next,
    log_probs,
    quantize,
    sample_next,
    tree_attention,
)

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
LAUNCH = ("num_warps", "num_stages", "capabilities", "TYPES", "OPTIONS", "ALIGNED")

ALL_ON = {"HAS_STOP": True, "HAS_SOFTCAP": True, "HAS_BIAS": True} | {
    "BLOCK": log_probs.BLOCK_V,
    "stride_v": 1,
}
ALL_OFF = ALL_ON | {"HAS_STOP": False, "HAS_SOFTCAP": False, "HAS_BIAS": False}
TILES = {"NUM_TILES": 13}
LOGITS = {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "targets_ptr": "*i64"} | dict.fromkeys(
    ("pre_scale", "post_scale", "bias_scale", "factor"), "fp32"
)
HEAD_ON = dict.fromkeys(("HAS_BIAS", "HAS_MASK", "HAS_TWO_MASKS", "HAS_SOFTCAP"), True)
HEAD_OFF = dict.fromkeys(HEAD_ON, False)
FUSED_OFF = {name: False for name in HEAD_ON if name != "HAS_TWO_MASKS"}
FUSED_ON = dict.fromkeys(FUSED_OFF, True)
NO_SOFTCAP = FUSED_ON | {"HAS_SOFTCAP": False}
UNIT = {"stride_hidden_d": 1, "stride_weight_d": 1}
HEAD = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16"} | dict.fromkeys(
    ("pre_scale", "post_scale", "mask_scale", "p_scale"), "fp32"
)
INDICES = dict.fromkeys(("rows_ptr", "columns_ptr", "entry_starts_ptr", "entry_columns_ptr"), "*i64")
ROW_PASS = HEAD | INDICES | {"p_ptr": "*bf16"}
FUSED_32 = HEAD | {"hidden_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}


def attention_kinds(dtype):
    """Argument types of the tree attention kernels; rows of 16 bytes and more are aligned."""
    tensors = ("query", "key", "value", "out", "grad", "grad_out", "grad_query", "grad_key", "grad_value")
    kinds = {f"{name}_ptr": f"*{dtype}:16" for name in tensors}
    kinds |= dict.fromkeys(("lse_ptr", "delta_ptr", "grad_lse_ptr", "faults_ptr"), "*fp32:16")
    kinds |= dict.fromkeys(("end_ptr", "position_ptr", "plan_ptr"), "*i32:16")
    kinds |= {f"stride_{name}_{letter}": "i32:16" for name in tensors for letter in "ht"}
    return kinds | dict.fromkeys(("scale", "pre_scale", "post_scale"), "fp32")


def attention_variants(kernel):
    """Every block of the tables, with no option or both, or (FASTGFN_FUZZ) every choice of options."""
    options = ((False, False), (True, True))
    if "FASTGFN_FUZZ" in os.environ:
        options += ((True, False), (False, True))
    for capability, tables in tree_attention.TABLES.items():
        for softcap, window in options:
            for width, table in tables[softcap or window].items():
                blocks = getattr(table, kernel)
                yield {
                    "HEAD_DIM": width,
                    "BLOCK_D": width,
                    "BLOCK_Q": blocks.queries,
                    "BLOCK_K": blocks.keys,
                    "HAS_SOFTCAP": softcap,
                    "HAS_WINDOW": window,
                    "num_warps": blocks.num_warps,
                    "num_stages": blocks.num_stages,
                    "capabilities": (capability,),
                }


HALF = {kernel: tuple(attention_variants(kernel)) for kernel in tree_attention.Table._fields}
HALF_KINDS = attention_kinds("bf16")
ROWS = tuple({"HEAD_DIM": d, "BLOCK_D": d, "BLOCK": tree_attention.BLOCK_ROWS} for d in (64, 256))
# As at a launch: without it bfloat16 tiles are not copied asynchronously.
ALIGNED = ("logits_ptr", "hidden_ptr", "weight_ptr", "stride_r", "stride_h_r", "stride_w_v")
DRAWS = dict.fromkeys(("rows_ptr", "trajectory_ptr", "position_ptr", "seed_ptr", "token_ptr"), "*i64") | {
    "forbid_ptr": "*i1",
    "tokens_ptr": "*i32",
    "pre_scale": "fp32",
    "post_scale": "fp32",
}
LOGIT_TILES = {"TILES": sample_next.LOGITS_TILES, "BLOCK": sample_next.LOGITS_BLOCK, "ALIGNED": ALIGNED}


def draw_variants():
    """fused_draw: every block of its table, each with all options, the first of each type without any."""
    flags = ("HAS_BIAS", "HAS_LOGIT_BIAS", "HAS_SOFTCAP")
    for size, table in head_sample_next.HEAD_BLOCKS.items():
        types = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), {2: "*bf16", 4: "*fp32"}[size])
        for on in (True, False):
            for _, (block_m, block_v, block_d, warps, stages) in table[: None if on else 1]:
                yield dict.fromkeys(flags, on) | {
                    "WIDTH": 2048 if on else 2000,
                    "TILES": 4,
                    "BLOCK_M": block_m,
                    "BLOCK_V": block_v,
                    "BLOCK_D": block_d,
                    "stride_h_d": 1,
                    "stride_w_d": 1,
                    "TYPES": types,
                    "OPTIONS": {"num_warps": warps, "num_stages": stages},
                    "ALIGNED": ALIGNED,
                }


def tile(blocks, precision="ieee"):
    rows, vocab, width, num_warps, num_stages = blocks
    sizes = {"BLOCK_R": rows, "BLOCK_V": vocab, "BLOCK_D": width, "PRECISION": precision, "WIDTH": 2048}
    flags = {"IS_EVEN": True, "IS_INTERPRETED": False, "ALIGNED": "all"}
    return sizes | flags | {"num_warps": num_warps, "num_stages": num_stages} | UNIT


def row_pass_variants(constants):
    return tuple(flags | constants | {"ALIGNED": "all"} for flags in (HEAD_ON, HEAD_OFF))


# 50257 and such: their products with a weight are padded, so only these arguments lack a factor of 16.
ODD = ("vocab", "num_rows", "num_policy", "first_row", "num_grad_rows", "num_entries")
ODD += ("num_splits", "num_blocks", "stop", "num_heads", "num_kv_heads", "window")
WIDE, LARGE, SMALL, SINGLE = head_fused.WIDE, head_fused.LARGE, head_fused.SMALL, head_fused.SINGLE
UNEVEN = {"IS_EVEN": False, "WIDTH": 1602}

# Module and kernel -> argument types (default: *fp32 for pointers, i32), variants of its constants, warps.
# A variant may add TYPES, OPTIONS of the compiler and the ALIGNED arguments.
KERNELS = {
    "decode_layer._rms_norm_fwd_kernel": (STEP, tuple(norm_variants()), None),
    "decode_layer._rope_write_fwd_kernel": (STEP, tuple(rope_variants()), 1),
    "decode_layer._silu_mul_fwd_kernel": (
        STEP,
        tuple(
            {"BLOCK": decode_layer.GATE_TILE[0], "ALIGNED": "all", "TYPES": types} for types in ({}, STEP_32)
        ),
        decode_layer.GATE_TILE[1],
    ),
    "head._entry_logits_fwd_kernel": (
        HEAD | INDICES,
        row_pass_variants(
            {"WIDTH": 2048, "BLOCK_E": head.ENTRY_TILE[0], "BLOCK_D": head.ENTRY_TILE[1]} | UNIT
        ),
        4,
    ),
    "head._row_pass_fwd_kernel": (
        ROW_PASS,
        row_pass_variants({"NUM_TILES": 13, "BLOCK": head.ROW_TILE[0], "BLOCK_E": 16}),
        head.ROW_TILE[1],
    ),
    "head_backward._frozen_head_bwd_kernel": (
        HEAD | INDICES | {"grad_hidden_ptr": "*bf16", "factor": "fp32"},
        tuple(
            {"WIDTH": width, "BLOCK_E": head_backward.TILE[0], "BLOCK_D": head_backward.TILE[1]}
            | {"ALIGNED": "all", "stride_weight_d": 1}
            for width in (2048, 1602)
        ),
        head_backward.TILE[2],
    ),
    "head_fused._fused_parts_fwd_kernel": (
        HEAD,
        (
            FUSED_OFF | tile(WIDE) | {"capabilities": (90, 100)},
            *(NO_SOFTCAP | tile(WIDE) | {"capabilities": (90,)} | width for width in ({}, UNEVEN)),
            NO_SOFTCAP | tile(SMALL) | {"capabilities": (100,)} | UNEVEN,
            FUSED_OFF | tile(LARGE) | {"capabilities": (80,)},
            FUSED_ON | tile(LARGE) | {"capabilities": (80, 90)},
            FUSED_ON | tile(LARGE) | {"capabilities": (80, 90)} | UNEVEN,
            FUSED_ON | tile(SMALL),
            FUSED_ON | tile(SINGLE, "tf32x3") | {"TYPES": FUSED_32},
        ),
        8,
    ),
    "log_probs._log_probs_fwd_kernel": (LOGITS, (ALL_ON | TILES, ALL_OFF | TILES), 8),
    "log_probs._log_probs_bwd_kernel": (LOGITS, (ALL_ON, ALL_OFF), 8),
    "tree_attention._tree_attention_fwd_kernel": (HALF_KINDS, HALF["fwd"], None),
    "tree_attention._tree_attention_faults_kernel": (HALF_KINDS, ROWS, 4),
    "tree_attention_backward._tree_attention_delta_kernel": (HALF_KINDS, ROWS, 4),
    "tree_attention_backward._tree_attention_grad_kv_kernel": (HALF_KINDS, HALF["grad_kv"], None),
    "tree_attention_backward._tree_attention_grad_q_kernel": (HALF_KINDS, HALF["grad_q"], None),
    "path_attention._path_attention_fwd_kernel": (PATHS, tuple(path_variants()), None),
    "path_attention._shared_prompts_fwd_kernel": (PATHS, tuple(shared_variants()), None),
    # float8 begins at sm_89
    "quantize._quantize_rows_fwd_kernel": (
        {"values_ptr": "*fp8e4nv"},
        tuple(
            {"BLOCK": block, "num_warps": warps, "capabilities": (89, 90, 100), "TYPES": {"x_ptr": kind}}
            | {"ALIGNED": "all"}
            for block, warps in quantize.BLOCKS.items()
            for kind in ("*bf16", "*fp32")
        ),
        None,
    ),
    "sample_next._draw_from_logits_kernel": (DRAWS, (LOGIT_TILES,), 8),
    "sample_next._draw_combine_kernel": (
        DRAWS,
        ({"NONE": -1, "BLOCK_K": 64, "BLOCK_S": 16}, {"NONE": -1, "BLOCK_K": 4, "BLOCK_S": 256}),
        4,
    ),
    "head_sample_next._fused_draw_kernel": (DRAWS, tuple(draw_variants()), 4),
}


def find_kernels():
    import fastgfn.kernels

    found = {}
    for module in pkgutil.iter_modules(fastgfn.kernels.__path__):
        members = vars(importlib.import_module(f"fastgfn.kernels.{module.name}"))
        found |= {f"{module.name}.{n}": k for n, k in members.items() if n.endswith("_kernel")}
    return found


def compile_all(folder):
    jobs = [
        (name, variant, capability, folder)
        for name in find_kernels()
        for variant in KERNELS[name][1]
        for capability in variant.get("capabilities", CAPABILITIES)
    ]
    with multiprocessing.Pool() as pool:
        return pool.starmap(compile_one, jobs, chunksize=1)


def compile_one(name, variant, capability, folder):
    import triton
    from triton.backends.compiler import GPUTarget

    types, _, num_warps = KERNELS[name]
    options = {"num_warps": num_warps} | {n: variant[n] for n in LAUNCH[:2] if n in variant}
    options |= variant.get("OPTIONS", {})
    source = make_source(find_kernels()[name], types | variant.get("TYPES", {}), variant)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    row |= {"name": name, "sm": capability, "shared": compiled.metadata.shared, "variant": variant}
    row["bytes"] = len(compiled.asm["cubin"])
    row["has_dot"] = "tl.dot(" in source.fn.src or "tt.dot" in compiled.asm["ttir"]
    row["tensor_cores"] = TENSOR_CORES.search(compiled.asm["ptx"]) is not None
    return row


def make_source(kernel, types, variant):
    from triton.compiler import ASTSource

    constants = {n: v for n, v in variant.items() if n not in LAUNCH}
    kinds = {
        p.name: "constexpr"
        if p.name in constants
        else types.get(p.name, "*fp32" if p.name.endswith("_ptr") else "i32")
        for p in kernel.params
    }
    aligned = variant.get("ALIGNED", ())
    if aligned == "all":
        aligned = [n for n, k in kinds.items() if k[0] == "*" or (k == "i32" and n not in ODD)]
    signature = {n: kind.removesuffix(":16") for n, kind in kinds.items()}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, kind) in enumerate(kinds.items())
        if kind.endswith(":16") or n in aligned
    }
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)


def find_faults(row):
    if row["bytes"] == 0:
        yield "nothing was compiled"
    if row["shared"] > SHARED_BYTES[row["sm"]]:
        yield "too much shared memory"
    if row["tensor_cores"] != row["has_dot"]:
        yield "tensor cores not as expected"
    if row["STACK"] or row["LOCAL"]:
        yield "register spill"


def test_every_kernel_has_an_entry():
    assert find_kernels().keys() == KERNELS.keys()


def test_kernels_compile_without_spills(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    paths = os.path.dirname(__file__), env.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-P", __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    variants = [variant for _, variants, _ in KERNELS.values() for variant in variants]
    assert len(rows) == sum(len(variant.get("capabilities", CAPABILITIES)) for variant in variants)
    faults = [(fault, row) for row in rows for fault in find_faults(row)]
    assert not faults, "\n".join(f"{fault}: {row}" for fault, row in faults)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
