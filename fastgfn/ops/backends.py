"""Which backend serves each op on this machine, and why."""

import importlib.metadata
import platform

import torch

from fastgfn.ops.head_csrc import csrc_runs
from fastgfn.ops.linear import HAS_ONEDNN

_PACKAGES = ("fastgfn", "torch", "triton", "transformers", "peft", "safetensors", "numpy")
# The name of an op here -> the dispatcher op that tells whether its CUDA kernel was compiled.
_CSRC = {
    "tree_cumsum": "tree_cumsum",
    "subtree_sum": "subtree_sum",
    "segment_cumsum": "segment_cumsum",
    "path_nodes": "path_nodes",
    "gather_nodes": "gather_nodes",
    "scatter_add_nodes": "scatter_add_nodes",
    "subtb": "subtb_tree",
    "subtb_padded": "subtb_padded",
    "decode_update": "decode_update_",
}


def versions() -> dict[str, str]:
    """Installed versions, "absent" where a package is missing."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def backend_info() -> dict:
    """{"versions": {...}, "device": str, "ops": {op: {"cpu": backend, "cuda": backend}}}.

    For a device that this machine lacks the entry says what would serve it, the reason in brackets.
    """
    cuda = torch.cuda.is_available()
    absent = "" if cuda else " (no CUDA device here)"
    gemm = "oneDNN for float32, else torch" if HAS_ONEDNN else "torch (built without oneDNN)"
    tiles = f"{gemm}, vocabulary tiles" + ("; csrc C++ for bfloat16" if csrc_runs() else "")
    head = {"cuda": f"torch products and a triton row pass; fused triton without gradient{absent}"}
    ops = {
        "frozen_linear": {"cpu": gemm, "cuda": f"torch{absent}"},
        "lora_linear": {"cpu": gemm, "cuda": f"torch{absent}"},
        "quantize_rows": {"cpu": "csrc C++", "cuda": f"triton{absent}"},
        "silu_mul": {"cpu": "torch", "cuda": f"torch{absent}"},
        "linear_log_probs": head | {"cpu": tiles},
        "policy_reward_log_probs": head | {"cpu": f"{tiles}; both streams"},
        "log_probs_from_logits": {"cpu": "torch", "cuda": f"triton{absent}"},
        "sample_next": {"cpu": "csrc C++", "cuda": f"triton{absent}"},
        "sample_next_from_hidden": {"cpu": f"{gemm}, then csrc C++", "cuda": f"triton{absent}"},
        "tree_attention": {"cpu": "SDPA, blocks of rows against their ancestors", "cuda": f"triton{absent}"},
        "path_attention": {"cpu": "csrc C++", "cuda": f"triton{absent}"},
    }
    for name in ("rms_norm", "add_rms_norm", "rope_write", "silu_mul_row"):
        ops[name] = {"cpu": "torch", "cuda": f"triton{absent}"}
    for name, op in _CSRC.items():
        compiled = "csrc CUDA" if _has_cuda_kernel(op) else "not built (no CUDA toolkit)"
        ops[name] = {"cpu": "csrc C++", "cuda": compiled}
    ops["build_tree"] = {"cpu": "csrc C++", "cuda": "csrc C++ on the host"}
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions(), "device": device, "ops": ops}


def _has_cuda_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgfn::{op}", "CUDA")
