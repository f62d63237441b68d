"""Models of known sizes with random weights, for measuring speed where no weights are at hand."""

import contextlib

import torch

from fastgfn import checks
from fastgfn.attention import NAME
from fastgfn.models.load import add_adapter
from fastgfn.models.policy import Policy

# Llama architecture: layers, width, MLP width, query heads, key heads, head width, vocabulary, tied head.
LLAMA = {
    "tiny": (2, 64, 128, 4, 2, 16, 512, False),
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152, True),
    "smollm2-1.7b": (24, 2048, 8192, 32, 32, 64, 49152, True),
    "llama-1b": (16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3b": (28, 3072, 8192, 24, 8, 128, 128256, True),
    "llama-8b": (32, 4096, 14336, 32, 8, 128, 128256, False),
    "llama-70b": (80, 8192, 28672, 64, 8, 128, 128256, False),
}
# GPT-2 architecture, 1024 positions, tied head: layers, width, heads, vocabulary.
GPT2 = {
    "gpt2-tiny": (2, 64, 4, 509),
    "gpt2-xl": (48, 1600, 25, 50257),
}
SHAPES = LLAMA | GPT2


def random_policy(
    shape: str,
    *,
    lora_rank: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Policy:
    """A LoRA policy with random weights of a known size (a key of `SHAPES`) and no tokenizer.

    Raises:
        InputError: an unknown shape; the message lists the known ones.
    """
    from transformers import AutoModelForCausalLM

    fix = "choose one, or pass a model folder or hub id"
    checks.check(shape in SHAPES, "random_policy", "shape", f"one of {', '.join(SHAPES)}", repr(shape), fix)
    config = _gpt2(*GPT2[shape]) if shape in GPT2 else _llama(*LLAMA[shape])
    torch.manual_seed(seed)
    # Drawn on the device: an 8B model takes minutes to draw on a CPU.
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        causal = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype)
    causal.requires_grad_(False)
    return Policy(add_adapter(causal, lora_rank, lora_rank).to(device))


def _llama(layers, width, mlp, heads, kv_heads, head_dim, vocab, tied):
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )


def _gpt2(layers, width, heads, vocab):
    from transformers import GPT2Config

    end = dict(bos_token_id=vocab - 1, eos_token_id=vocab - 1)
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=1024, **end)


def peaked_policy(
    vocab_size: int,
    *,
    base_seed: int,
    peak: float = 2.0,
    lora_rank: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Policy:
    """A LoRA policy on a random Llama of 2 layers, 64 wide, whose distribution depends on its context.

    At the library's own initialisation a random model is near uniform and sees little but the last token.
    Here embeddings are standard normal, matrices (out, in) normal of standard deviation 1.5 / sqrt(in) and
    the head's peak / 8, so that logits have a standard deviation of `peak`.

    Args:
        base_seed: of the base, whose weights depend on nothing else. seed: of the adapter.
    """
    from transformers import AutoModelForCausalLM

    config = _llama(2, 64, 128, 4, 4, 16, vocab_size, False)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)
    causal.requires_grad_(False)
    generator = torch.Generator().manual_seed(base_seed)
    for name, weight in sorted(causal.named_parameters()):
        if weight.dim() < 2:
            continue
        scale = {"model.embed_tokens.weight": 1.0, "lm_head.weight": peak / 8}.get(name)
        scale = 1.5 * weight.shape[1] ** -0.5 if scale is None else scale
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    torch.manual_seed(seed)
    return Policy(add_adapter(causal.to(dtype), lora_rank, lora_rank).to(device))
