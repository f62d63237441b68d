"""One training micro-step the way the published next_sentence code does it: the baseline of bench_step.

Own code, same algorithm: n copies of the prompt are decoded token by token *under autograd through the KV
cache*, a whole-vocabulary log_softmax is kept per step, all prefixes are rewarded in one padded forward with
LoRA off, and the loss loops over window lengths. What the original computes and never uses is left out
(the prompt's logits, a softmax for the disabled top-k/top-p, the vocabulary mask), so this is no slower.

Convention `own`: the length limits bind the sampler only, a prefix below min_length gets the reward -99, and
log_pterm at max_length stays the model's own.
Source: Hu et al. 2024 (arXiv:2310.04363), appendix A; GFNOrg/gfn-lm-tuning, next_sentence.
Widths: S = longest sequence + 1; column t is the prefix of t tokens.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

TOO_SHORT = -99.0


class Limits(NamedTuple):
    """termination_token_id; fewest and most tokens that the sampler draws before it."""

    termination_token_id: int
    min_length: int
    max_length: int


class Decoded(NamedTuple):
    """tokens (N, S) int64, terminated and padded with the termination token; log_pf, log_pterm (N, S)."""

    tokens: Tensor
    log_pf: Tensor
    log_pterm: Tensor


def restore_plain(model: torch.nn.Module) -> None:
    """Undo what Policy does to a model: the loop runs transformers' and peft's own forwards and SDPA."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        module.__dict__.pop("forward", None)


def micro_step(
    model: torch.nn.Module,
    prompt: Tensor,  # (P,) int64
    limits: Limits,
    *,
    num_samples: int,
    temperature: float = 1.0,
    reward_temperature: float = 1.0,
    subtb_lambda: float = 1.0,
    action_seq: Tensor | None = None,  # (N, A) int64
) -> tuple[Tensor, Tensor]:
    """Sample (or force `action_seq`), reward, return (loss (), tokens (N, S)); `model` is a PEFT model."""
    prompts = prompt.expand(num_samples, -1)
    decoded = decode(model, prompts, limits, temperature=temperature, action_seq=action_seq)
    log_reward = prefix_log_reward(model, prompts, decoded.tokens, limits) / reward_temperature
    return windowed_loss(decoded, log_reward, limits.termination_token_id, subtb_lambda), decoded.tokens


def decode(
    model: torch.nn.Module,
    prompts: Tensor,  # (N, P) int64
    limits: Limits,
    *,
    temperature: float = 1.0,
    action_seq: Tensor | None = None,
) -> Decoded:
    """Token-by-token decoding with gradients; rows of `action_seq` end at their first termination token."""
    stop = limits.termination_token_id
    active = torch.ones(prompts.shape[0], dtype=torch.bool, device=prompts.device)
    tokens, log_pf, log_pterm = [], [], []
    inputs, cache = prompts, None
    for t in range(limits.max_length + 1):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        log_prob = output.logits[:, -1].log_softmax(-1)
        if action_seq is None:
            drawn = _draw(log_prob.detach(), t, limits, temperature)
        elif t < action_seq.shape[1]:
            drawn = action_seq[:, t]
        else:
            drawn = torch.full_like(action_seq[:, 0], stop)
        drawn = torch.where(active, drawn, stop)
        log_pterm.append(torch.where(active, log_prob[:, stop], 0.0))
        active = active & (drawn != stop)
        inputs = drawn[:, None]
        log_pf.append(torch.where(active, log_prob.gather(1, inputs)[:, 0], 0.0))
        tokens.append(drawn)
        if not active.any():
            break
    return Decoded(torch.stack(tokens, 1), torch.stack(log_pf, 1), torch.stack(log_pterm, 1))


def _draw(log_prob: Tensor, t: int, limits: Limits, temperature: float) -> Tensor:
    stop = limits.termination_token_id
    if t >= limits.max_length:
        return torch.full((log_prob.shape[0],), stop, device=log_prob.device)
    prob = (log_prob / temperature).softmax(-1)
    if t < limits.min_length:
        prob[:, stop] = 0.0
    return torch.multinomial(prob, 1)[:, 0]


@torch.no_grad()
def prefix_log_reward(model: torch.nn.Module, prompts: Tensor, tokens: Tensor, limits: Limits) -> Tensor:
    """(N, S) log p_base(prefix, stop | prompt) of every prefix; 0 after a row has stopped."""
    stop, width = limits.termination_token_id, tokens.shape[1]
    text = torch.cat([prompts, tokens[:, :-1]], 1)
    with model.disable_adapter():
        log_prob = model(input_ids=text, use_cache=False, logits_to_keep=width).logits.log_softmax(-1)
    log_reward = log_prob[:, :, stop].clone()
    if width > 1:
        log_reward[:, 1:] += log_prob[:, :-1].gather(2, tokens[:, :-1, None])[:, :, 0].cumsum(1)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    ended[:, 1:] = (tokens[:, :-1] == stop).cumsum(1) > 0
    log_reward[:, : limits.min_length] = TOO_SHORT
    return log_reward.masked_fill(ended, 0.0)


def windowed_loss(
    decoded: Decoded,
    log_reward: Tensor,  # (N, S)
    termination_token_id: int,
    subtb_lambda: float = 1.0,
) -> Tensor:
    """Modified SubTB, () mean over all windows of the batch: one masked pass per window length, O(N S^2)."""
    tokens, log_pf, log_pterm = decoded
    width = tokens.shape[1]
    if width < 2:
        raise ValueError(
            f"windowed_loss: tokens must be at least 2 wide, got {width}; the loss needs a token in some row"
        )
    log_flow = log_reward - log_pterm
    delta = log_flow[:, :-1] + log_pf[:, :-1] - log_flow[:, 1:]
    potential = torch.cat([torch.zeros_like(delta[:, :1]), delta.cumsum(1)], 1)
    # ends[:, k]: the prefix of k + 1 tokens exists, so windows may end there.
    ends = (tokens[:, :-1] == termination_token_id).cumsum(1) == 0
    total = potential.new_zeros(())
    weight = potential.new_zeros(())
    for m in range(1, width):
        square = (potential[:, m:] - potential[:, :-m]) ** 2
        inside = ends[:, m - 1 :]
        total = total + subtb_lambda ** (m - 1) * square.masked_fill(~inside, 0.0).sum()
        weight = weight + subtb_lambda ** (m - 1) * inside.sum()
    return total / weight


def load_original(folder: str) -> ModuleType:
    """The original's utils.py from a local copy of its next_sentence folder, without its unused imports."""
    unused = ("editdistance", "spacy", "sentence_transformers", "sentence_transformers.util")
    missing = [name for name in unused if name not in sys.modules]
    for name in missing:
        sys.modules[name] = ModuleType(name)
    sys.modules["sentence_transformers"].SentenceTransformer = None
    sys.modules["sentence_transformers.util"].cos_sim = None
    try:
        spec = importlib.util.spec_from_file_location("published_utils", Path(folder) / "utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name in missing:
            del sys.modules[name]
    return module


def original_micro_step(
    utils: ModuleType,
    model: torch.nn.Module,
    prompt: Tensor,
    limits: Limits,
    *,
    num_samples: int,
    action_seq: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`micro_step` made of the original's own functions, called as its Lightning module calls them."""
    stop = limits.termination_token_id
    reward = utils.FrozenModelSentenceGivenPrompt(stop, min_len=limits.min_length)
    text, log_pf, log_pterm, log_r, _ = utils.generate_and_return_termination_logprob(
        model,
        prompt.unsqueeze(0).expand(num_samples, -1),
        termination_token_id=stop,
        reward_fn=lambda batch: reward.score(batch, len(prompt), model, None),
        max_len=limits.max_length,
        min_len=limits.min_length,
        action_seq=action_seq,
    )
    loss = utils.modified_subtb_loss(log_pf, log_r, log_pterm, text, stop, len(prompt))
    return loss, text[:, len(prompt) :]
