"""Which backend serves each op on this machine, and why."""

import importlib.metadata
import platform

import torch

from fastgfn.ops.linear import HAS_ONEDNN

_PACKAGES = ("fastgfn", "torch", "triton", "transformers", "peft", "safetensors", "numpy")
_CSRC = (
    "build_tree",
    "tree_cumsum",
    "segment_cumsum",
    "gather_nodes",
    "subtb",
    "decode_update",
    "sample_next",
)


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
    compiled = _has_cuda_kernel("subtb_padded")
    gemm = "oneDNN for float32, else torch" if HAS_ONEDNN else "torch (built without oneDNN)"
    ops = {
        "linear": {"cpu": gemm, "cuda": f"torch{absent}"},
        "lora_linear": {"cpu": gemm, "cuda": f"torch{absent}"},
        "linear_log_probs": {"cpu": f"{gemm}, vocabulary tiles", "cuda": f"torch, vocabulary tiles{absent}"},
        "log_probs_from_logits": {"cpu": "torch", "cuda": f"triton{absent}"},
        "tree_attention": {"cpu": "SDPA, dense mask", "cuda": f"FlexAttention{absent}"},
        "decode_attention": {"cpu": "torch matmul", "cuda": f"torch matmul{absent}"},
    }
    for name in _CSRC:
        ops[name] = {"cpu": "csrc C++", "cuda": "none yet: CPU only"}
    ops["subtb_padded"] = {
        "cpu": "csrc C++",
        "cuda": "csrc CUDA" if compiled else "not built (no CUDA toolkit)",
    }
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions(), "device": device, "ops": ops}


def _has_cuda_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgfn::{op}", "CUDA")
