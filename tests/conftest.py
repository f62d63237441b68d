"""Seeds, and the Triton interpreter where there is no GPU (decided before triton is imported)."""

import os
import random
import shutil

# read when huggingface_hub is imported: no test may ask a hub
os.environ["HF_HUB_OFFLINE"] = "1"
# read by the pytest-benchmark of a test's own pytest, which runs beside no other
os.environ.pop("PYTEST_XDIST_WORKER", None)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch

# tiny models are faster on one thread, and a shared machine stays usable
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        # what runs wherever DEVICE is belongs to the GPU's tests where that is a GPU
        if "cuda" in (getattr(item.module, name, "cpu") for name in ("DEVICE", "TRITON_DEVICE")):
            item.add_marker("gpu")
        if "gpu" in item.keywords and not os.path.exists("/dev/nvidiactl"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seen_tokens(monkeypatch):
    """How many tokens every forward pass of a policy had."""
    from fastgfn.models import Policy

    counts, hidden = [], Policy.hidden
    monkeypatch.setattr(
        Policy,
        "hidden",
        lambda self, tokens, *rest: counts.append(len(tokens)) or hidden(self, tokens, *rest),
    )
    return counts


@pytest.fixture
def small_tiles(monkeypatch):
    """The kernels of the head with several tiles of everything, none of them full."""
    from fastgfn.kernels import head, head_backward, head_fused

    monkeypatch.setattr(head, "ROW_TILE", (16, 1))
    monkeypatch.setattr(head, "ENTRY_TILE", (16, 16))
    monkeypatch.setattr(head_backward, "TILE", (2, 16, 1))
    for name in ("WIDE", "LARGE", "SMALL", "SINGLE"):
        monkeypatch.setattr(head_fused, name, (16, 16, 16, 1, 2))


@pytest.fixture
def small_blocks(monkeypatch):
    """Tree attention with blocks of three shapes, so that small trees have full, partial and unseen ones."""
    from fastgfn.kernels import tree_attention as kernels

    sizes = ((32, 16), (16, 32), (16, 16))
    small = kernels.Table(*(kernels.Blocks(q, k, 4, 1) for q, k in sizes))
    for configurations in (kernels.SINGLE, *(table for pair in kernels.TABLES.values() for table in pair)):
        for width in configurations:
            monkeypatch.setitem(configurations, width, small)


class Plain:
    """A model with transformers' own attention, for comparison; it is no Policy."""

    def __init__(self, model):
        self.model = model.eval()

    def parameters(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]


@pytest.fixture
def tiny_policy():
    """Factory of a tiny policy with a LoRA adapter whose two matrices are both non-zero.

    "llama" takes its norms and rotary angles in float32 whatever the dtype; "gpt2" is float64 throughout.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from fastgfn.models import Policy

    def make(
        vocab=13,
        dtype=torch.float64,
        rank=4,
        scale=6.0,
        implementation="fastgfn",
        positions=64,
        family="llama",
    ):
        torch.manual_seed(7)
        if family == "gpt2":
            config = GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=positions)
        else:
            config = LlamaConfig(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
            )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        fan = dict(fan_in_fan_out=True) if family == "gpt2" else {}
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", **fan)
        model = get_peft_model(model, lora).to(dtype)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
                    p.copy_(noise * scale / (6 * p.shape[-1] ** 0.5))
        return Policy(model) if implementation == "fastgfn" else Plain(model)

    return make
