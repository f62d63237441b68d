"""What the kernels of a decoding step are compiled for in test_kernels_aot.py."""

from fastgfn.kernels import decode_layer, path_attention

STEP_32 = dict.fromkeys(
    ("x", "delta", "weight", "sum", "out", "row", "cos", "sin", "query_weight", "key_weight"), "*fp32"
)
STEP_32 = {f"{name}_ptr": kind for name, kind in STEP_32.items()}
STEP_32 |= dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), "*fp32")
STEP = dict.fromkeys(STEP_32, "*bf16") | {"nodes_ptr": "*i64", "eps": "fp32"}
BF16_ROWS = {"row_ptr": "*bf16", "delta_ptr": "*bf16"}


def norm_variants():
    """Every number of warps, with its widest row, as a sum and alone."""
    alone = {"HAS_DELTA": False, "delta_ptr": None, "sum_ptr": None}
    for width, num_warps in decode_layer.NORM_WARPS:
        for flags in ({"HAS_DELTA": True}, alone):
            for types in ({}, STEP_32 | BF16_ROWS):
                yield flags | {
                    "IS_INTERPRETED": False,
                    "BLOCK": width,
                    "ALIGNED": "all",
                    "TYPES": types,
                    "OPTIONS": {"num_warps": num_warps},
                }


def rope_variants():
    none = {"HAS_NORM": False, "query_weight_ptr": None, "key_weight_ptr": None}
    for width in (64, 80, 128, 256):
        for flags in (none, {"HAS_NORM": True}):
            for types in ({}, STEP_32 | BF16_ROWS):
                yield flags | {
                    "IS_INTERPRETED": False,
                    "WIDTH": width,
                    "BLOCK": 1 << (width // 2 - 1).bit_length(),
                    "ALIGNED": "all",
                    "TYPES": types,
                }


FLOATS = ("query_ptr", "keys_ptr", "values_ptr", "out_ptr")
PATHS = dict.fromkeys(FLOATS, "*bf16") | {
    "path_ptr": "*i32",
    "length_ptr": "*i64",
    "tiles_ptr": "*i32",
    "depth_ptr": "*i64",
    "pre_scale": "fp32",
    "softcap": "fp32",
}


def path_variants():
    """Whole paths, and what is left of them, the latter in float32 too."""
    for width, group, softcap, itemsize in (
        (64, 3, False, 2),
        (128, 4, True, 2),
        (256, 2, True, 2),
        (128, 4, True, 4),
    ):
        tiles = {False: path_attention.TILE, True: path_attention.own_tile(group, width, itemsize)}
        for shared, (block_n, num_warps) in tiles.items() if itemsize == 2 else [(True, tiles[True])]:
            yield {
                "HAS_SHARED": shared,
                "HAS_SOFTCAP": softcap,
                "IS_INTERPRETED": False,
                "PRECISION": {2: "ieee", 4: "tf32x3"}[itemsize],
                "GROUP": group,
                "WIDTH": width,
                "NUM_SPLITS": 2,
                "SHARED_N": 64,
                "BLOCK_H": 16,
                "BLOCK_D": width,
                "BLOCK_N": block_n,
                "num_warps": num_warps,
                "TYPES": {} if itemsize == 2 else dict.fromkeys(FLOATS, "*fp32"),
                "ALIGNED": "all",
            }


def shared_variants():
    """Every tile of the table for a group of 1, 4 and 8, with all options in the last."""
    for itemsize, table in path_attention.SHARED_TILES.items():
        for width in table:
            for group in (1, 4, 8) if itemsize == 2 else (1, 8):
                yield {
                    **path_attention.shared_constants(256, 16, 8, group, width, 230, itemsize),
                    "HAS_SOFTCAP": group == 8,
                    "HAS_WINDOW": group == 8,
                    "IS_INTERPRETED": False,
                    "PRECISION": {2: "ieee", 4: "tf32x3"}[itemsize],
                    "TYPES": {} if itemsize == 2 else dict.fromkeys(FLOATS, "*fp32"),
                    "ALIGNED": "all",
                }
