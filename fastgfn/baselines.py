"""What a step costs without this library: transformers' own generate and padded forwards, all-pairs SubTB."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn.models import Policy
from fastgfn.phases import phase
from fastgfn.reference.subtb import subtb_padded
from fastgfn.types import Constraints


def plain_step(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    constraints: Constraints,
    *,
    num_samples: int,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step of modified SubTB with the base model's reward, every sequence padded to its own row.

    Prompts have one length, sequences run to max_length (as `generate` is told), the limits are `forced`.
    Both forwards compute the logits of the generated positions only.

    Returns:
        The loss.
    """
    stop, longest = constraints.termination_token_id, constraints.max_length
    inputs = torch.tensor([list(p) for p in prompts], device=policy.device)
    with policy.plain() as model:
        with phase("decode"), torch.no_grad():
            # without the stop token, so that every sequence has max_length tokens; the choice is free
            # because the objective holds for any behaviour
            tokens = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=num_samples,
                max_new_tokens=longest,
                min_new_tokens=longest,
                suppress_tokens=[stop],
                eos_token_id=stop,
                pad_token_id=stop,
            )
        with phase("score"):
            log_pf, log_pterm = _log_probs(model, tokens, longest, stop)
        with phase("reward"), torch.no_grad(), model.disable_adapter():
            p_token, p_stop = _log_probs(model, tokens, longest, stop)
            log_reward = torch.nn.functional.pad(p_token.cumsum(1), (1, 0)) + p_stop
        with phase("loss"):
            log_pterm = torch.cat([log_pterm[:, :-1], torch.zeros_like(log_pterm[:, -1:])], dim=1)
            lengths = torch.full((len(tokens),), longest, device=tokens.device)
            total, weight = subtb_padded(log_pf, log_reward - log_pterm, lengths, 1.0)
            loss = total.sum() / weight.sum()
        optimizer.zero_grad()
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
    return float(loss.detach())


def _log_probs(model, tokens: Tensor, longest: int, stop: int) -> tuple[Tensor, Tensor]:
    """log p of the last `longest` tokens (N, L) and of stopping before and after each (N, L + 1)."""
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=longest + 1).logits
    log_p = logits.float().log_softmax(-1)
    log_pf = log_p[:, :-1].gather(2, tokens[:, -longest:, None]).squeeze(2)
    return log_pf, log_p[..., stop]
