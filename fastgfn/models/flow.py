"""What may be learned beside the policy: log Z(X) of prompts, or log F(s) of every prefix."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from fastgfn.models.policy import Policy

WIDTH = 64


class FlowHead(nn.Module):
    """log F(s) = offset + outer . gelu(inner h) of the final hidden state h of s, normalised; at first the
    offset everywhere.

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
        self.inner = nn.Parameter(inner.to(**options))
        self.outer = nn.Parameter(torch.zeros(WIDTH, **options))
        self.offset = nn.Parameter(torch.full((), torch.nan, **options))

    def forward(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R,)"""
        hidden = layer_norm(hidden.to(self.inner.dtype), hidden.shape[-1:])
        inner = gelu(hidden @ self.inner.T * (3 / hidden.shape[-1]))
        return self.offset + 0.1 * (inner @ self.outer)


class LogZTable(nn.Module):
    """log Z(X), one value for all prompts or one for each; nan before the first estimate of it."""

    def __init__(self, policy: Policy, size: int) -> None:
        super().__init__()
        weight = policy.head.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.full((size,), torch.nan, dtype=dtype, device=weight.device))
