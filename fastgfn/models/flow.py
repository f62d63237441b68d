"""What may be learned beside the policy: log Z(X) of prompts, or log F(s) of every prefix."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from fastgfn.models.policy import Policy

WIDTH = 64


class FlowHead(nn.Module):
    """log F(s) = offset + outer . gelu(inner (h + e)) of the final hidden state h of s, normalised, and an
    encoding e of its length, the tokens of Z so far; at first the offset everywhere.

    The length stands beside h because with rotary positions h is the same wherever one token alone has come
    before, however often: s_0 after the prompt [a] and the state of Z = [a] could not have their own flows.
    The gradient goes on into the hidden states, so that the policy learns what the flows have to tell apart.
    The weights are scaled such that one Adam step size, in nats, suits the offset and them at any width of h.
    """

    def __init__(self, policy: Policy, *, seed: int = 0) -> None:
        super().__init__()
        weight = policy.head.weight
        size = weight.shape[1]
        options = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        generator = torch.Generator().manual_seed(seed)
        inner = torch.randn(WIDTH, size, generator=generator) * size**0.5 / 3
        self.inner_weight = nn.Parameter(inner.to(**options))
        self.outer_weight = nn.Parameter(torch.zeros(WIDTH, **options))
        self.offset = nn.Parameter(torch.full((), torch.nan, **options))

    def forward(self, hidden: Tensor, length: Tensor) -> Tensor:
        """(R, D) hidden states, (R,) tokens of Z -> (R,)"""
        size, dtype = hidden.shape[-1], self.inner_weight.dtype
        hidden = layer_norm(hidden.to(dtype), (size,)) + _encoded(length, size, dtype)
        inner = gelu(hidden @ self.inner_weight.T * (3 / size))
        return self.offset + 0.1 * (inner @ self.outer_weight)


def _encoded(length: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(R,) -> (R, size) sines and cosines of the length, at geometric frequencies (Vaswani et al. 2017)."""
    column = torch.arange(size, device=length.device)
    angle = length.to(dtype)[:, None] * 10000.0 ** -((column // 2).to(dtype) * (2 / size))
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


class LogZTable(nn.Module):
    """log Z(X), one value for all prompts or one for each; nan before the first estimate of it."""

    def __init__(self, policy: Policy, size: int) -> None:
        super().__init__()
        weight = policy.head.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.full((size,), torch.nan, dtype=dtype, device=weight.device))
