"""log Z(X) that is learned beside the policy: its parameters, where they start, when they have diverged."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.models.flow import FlowHead, LogZTable

# Nats between a learned log Z(X) and the mean log R(x) / T - log q(x) of a batch: more, and it has diverged.
MOST_GAP = 1e4


class LearnedLogZ:
    """One value for all prompts ("scalar"), one of each ("per_prompt"), policy.flow_head ("head"), or none
    ("estimate").

    A value starts at the mean of log R(x) / T - log q(x) over the first batch that has its prompt, which is
    below log Z(X) by a divergence instead of by |log Z(X)|. A head starts as that constant; one that the
    policy already has is trained further.

    Raises:
        InputError: an unknown kind.
    """

    def __init__(self, kind: str, policy: Policy, num_prompts: int, *, seed: int = 0) -> None:
        kinds = ("estimate", "scalar", "per_prompt", "head")
        checks.check(kind in kinds, "LearnedLogZ", "kind", f"one of {kinds}", repr(kind), "use 'estimate'")
        self.kind = kind
        self.module = nn.Module()
        if kind == "head":
            policy.flow_head = policy.flow_head or FlowHead(policy, seed=seed)
            self.module = policy.flow_head
        elif kind != "estimate":
            self.module = LogZTable(policy, 1 if kind == "scalar" else num_prompts)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """By name, in a fixed order."""
        return [(f"log_z.{name}", p) for name, p in self.module.named_parameters()]

    def of(self, prompts: Sequence[int], estimate: Callable[[], Tensor]) -> Tensor | str | None:
        """`log_z` of `add_gradients` for these G prompts; `estimate` is asked for theirs, (G,), if one of
        them has none yet."""
        if self.kind == "estimate":
            return None
        rows = torch.as_tensor(prompts, device=next(self.module.parameters()).device)
        if self.kind != "per_prompt":
            rows = torch.zeros_like(rows)
        values = self._values
        if bool(values[rows].isnan().any()):
            self._start(values, rows, estimate())
        return "head" if self.kind == "head" else values[rows]

    @property
    def _values(self) -> Tensor:
        """What starts at an estimate."""
        return self.module.offset.view(1) if self.kind == "head" else self.module.values

    def snapshot(self) -> Tensor | None:
        """What has started at an estimate, for `restore`; the rest changes in an optimiser step alone."""
        return None if self.kind == "estimate" else self._values.detach().clone()

    @torch.no_grad()
    def restore(self, snapshot: Tensor | None) -> None:
        if snapshot is not None:
            self._values.copy_(snapshot)

    @torch.no_grad()
    def _start(self, values: Tensor, rows: Tensor, estimate: Tensor) -> None:
        """Set what is not set yet; prompts of one row get the mean of their estimates."""
        sums = torch.zeros_like(values).index_add_(0, rows, estimate.to(values))
        means = sums / torch.bincount(rows, minlength=len(values))  # nan where no prompt is
        values.copy_(torch.where(values.isnan(), means, values))

    def check(self, value: Tensor, estimate: Tensor) -> None:
        """Refuse (G,) values that are not finite, or far from the batch's estimates; where an estimate is not
        finite, it is not the value that is at fault.

        Raises:
            InputError: log Z(X) has diverged.
        """
        gap = (value.double() - estimate).abs()
        bad = estimate.isfinite() & ~(gap <= MOST_GAP)
        if bool(bad.any()):
            have = f"{float(value[bad][0]):.4g} where the batch's is {float(estimate[bad][0]):.4g}"
            want = f"within {MOST_GAP:g} nats of the estimate from a batch"
            checks.fail("Trainer.step", "the learned log Z(X)", want, have, "lower log_z_learning_rate")
