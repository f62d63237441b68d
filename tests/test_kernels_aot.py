"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100, without a GPU and without spills.

The compilation runs in one process of its own (this file as a script), because it fails in the interpreter.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

CAPABILITIES = (80, 90, 100)
MAX_SHARED_BYTES = 99 * 1024

ALL_ON = {"HAS_STOP": True, "HAS_SOFTCAP": True, "HAS_BIAS": True, "BLOCK": 4096, "stride_v": 1}
ALL_OFF = {"HAS_STOP": False, "HAS_SOFTCAP": False, "HAS_BIAS": False, "BLOCK": 4096, "stride_v": 1}
TILES = {"NUM_TILES": 13}
LOGITS = {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "targets_ptr": "*i64"} | dict.fromkeys(
    ("pre_scale", "post_scale", "bias_scale", "factor"), "fp32"
)

# Module and kernel -> argument types (default: *fp32 for pointers, i32), variants of its constants, warps.
KERNELS = {
    "log_probs._log_probs_fwd_kernel": (LOGITS, (ALL_ON | TILES, ALL_OFF | TILES), 8),
    "log_probs._log_probs_bwd_kernel": (LOGITS, (ALL_ON, ALL_OFF), 8),
}


def find_kernels():
    import fastgfn.kernels

    found = {}
    for module in pkgutil.iter_modules(fastgfn.kernels.__path__):
        members = vars(importlib.import_module(f"fastgfn.kernels.{module.name}"))
        found |= {f"{module.name}.{n}": k for n, k in members.items() if n.endswith("_kernel")}
    return found


def compile_all(folder):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = []
    for name, kernel in find_kernels().items():
        types, variants, num_warps = KERNELS[name]
        for constants in variants:
            signature = {
                p.name: "constexpr"
                if p.name in constants
                else types.get(p.name, "*fp32" if p.name.endswith("_ptr") else "i32")
                for p in kernel.params
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            for capability in CAPABILITIES:
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
                path = os.path.join(folder, "kernel.cubin")
                with open(path, "wb") as file:
                    file.write(compiled.asm["cubin"])
                command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                row = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
                shared, num_bytes = compiled.metadata.shared, len(compiled.asm["cubin"])
                rows.append(row | {"name": name, "sm": capability, "shared": shared, "bytes": num_bytes})
    return rows


def test_every_kernel_has_an_entry():
    assert find_kernels().keys() == KERNELS.keys()


def test_kernels_compile_without_spills(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-P", __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(CAPABILITIES) * sum(len(variants) for _, variants, _ in KERNELS.values())
    for row in rows:
        assert row["bytes"] > 0 and row["shared"] <= MAX_SHARED_BYTES, row
        assert row["STACK"] == 0 and row["LOCAL"] == 0, f"register spill: {row}"


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
