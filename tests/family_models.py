"""Tiny random models of every supported family, and the token trees they are tried on."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastgfn.functional.tree import build_tree
from fastgfn.models import Policy
from fastgfn.testing import random_sequences
from fastgfn.types import Constraints

VOCAB = 61
SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GATED = dict(**SMALL, intermediate_size=48, num_key_value_heads=2)
PLACES = dict(max_position_embeddings=64)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
GEMMA3 = dict(
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    },
)
FAMILIES = {
    "llama": LlamaConfig(**GATED),
    "llama-tied": LlamaConfig(**GATED, tie_word_embeddings=True, attention_bias=True),
    "mistral-window": MistralConfig(**GATED, sliding_window=3),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "gemma2": Gemma2Config(
        **GATED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**GATED | {"num_hidden_layers": 3}, head_dim=8, sliding_window=3, **GEMMA3),
    "gpt2": GPT2Config(**GPT),
    "gpt2-scaled": GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    "gptj": GPTJConfig(**GPT, rotary_dim=4, tie_word_embeddings=False),
    "neox": GPTNeoXConfig(**SMALL, **PLACES, intermediate_size=48),
    "opt": OPTConfig(**SMALL, **PLACES, ffn_dim=48, word_embed_proj_dim=32),
    "phi": PhiConfig(**SMALL, intermediate_size=48),
}
# Their own attention takes its softmax in float32, also in a float64 model.
SINGLE = {"gemma2", "gptj"}
# Outside transformers' AttentionInterface.
EXPLICIT = {"gptj"}
# sdpa would leave out the softcap, and GPT-J has none.
EAGER = {"gemma2", "gptj"}


def make_model(family, implementation, dtype=torch.float64, scale=8.0):
    """A causal LM whose weights, biases and norms among them, are large enough to make a wrong mask visible:
    untrained initialisations are nearly linear, and their biases zero."""
    if family in EXPLICIT or (implementation == "plain" and family in EAGER):
        implementation = "eager"
    implementation = "sdpa" if implementation == "plain" else implementation
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
            else:
                p.add_(0.2 * torch.randn(p.shape, generator=noise).to(dtype))
    return model.eval()


def make_policy(family, dtype=torch.float64, scale=8.0, trainable=False):
    return Policy(make_model(family, "fastgfn", dtype, scale).requires_grad_(trainable))


def random_tree(max_length=6):
    """(prompts, sequences, groups, their TokenTree); tokens below 4, so that many are shared."""
    g = torch.Generator().manual_seed(1)
    prompts, sequences, groups = random_sequences(
        g, num_groups=2, per_group=5, max_length=max_length, vocab=4
    )
    constraints = Constraints(termination_token_id=VOCAB - 1, max_length=max_length)
    tree = build_tree(sequences, prompts=prompts, group=groups, constraints=constraints)
    return prompts, sequences, groups, tree


def path_to(tree, node):
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parent[node])
    return path[::-1]
