"""The trajectories of a request: what was drawn so far, and what becomes of it."""

import operator
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.ops.decode import decode_update_
from fastgfn.rollout.hooks import Tool
from fastgfn.types import Constraints, Rollouts


class Trajectories:
    """N trajectories on the host: tokens (N, L), lengths, finished (N,), and the log-probs of Rollouts."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        group: Tensor,
        constraints: Constraints,
        tool: Tool | None,
        vocab: int,
        *,
        has_grammar: bool,
    ) -> None:
        self.prompts = tuple(prompts)
        self.group = group
        self.constraints = constraints
        self.tool = tool
        self.vocab = vocab
        self.has_grammar = has_grammar
        total, longest = len(group), constraints.max_length
        self.tokens = torch.zeros(total, longest, dtype=torch.int64)
        self.lengths = torch.zeros(total, dtype=torch.int64)
        self.finished = torch.zeros(total, dtype=torch.bool)
        self.terminated = torch.zeros(total, dtype=torch.bool)
        self.is_action = torch.zeros(total, longest, dtype=torch.bool)
        self.log_behavior = torch.zeros(total, dtype=torch.float32)
        self.log_pf = torch.zeros(total, longest, dtype=torch.float32)
        self.log_pterm = torch.full((total, longest + 1), torch.nan, dtype=torch.float32)
        # tool tokens that are still to be appended
        self._observations: dict[int, deque[int]] = {}

    def sequence(self, trajectory: int) -> list[int]:
        return self.tokens[trajectory, : self.lengths[trajectory]].tolist()

    def num_actions(self, alive: Tensor) -> Tensor:
        """(A,) the tokens of each that are no observations."""
        return self.is_action[alive].sum(1)

    def observations(self, alive: Tensor) -> Tensor:
        """(A,) the next token that a tool has returned, -1 where one is to be drawn."""
        if not self._observations:
            return torch.full_like(alive, -1)
        waiting = self._observations
        return torch.tensor([waiting[i].popleft() if waiting.get(i) else -1 for i in alive.tolist()])

    def draw(
        self, alive: Tensor, token: Tensor, log_pf: Tensor, log_pterm: Tensor, log_behavior: Tensor
    ) -> None:
        """Note the log-probs (A,) of tokens that `append` is about to append."""
        step = self.lengths[alive]
        self.log_behavior[alive] += log_behavior.float()
        self.log_pterm[alive, step] = log_pterm.float()
        goes_on = token != self.constraints.termination_token_id
        alive, step = alive[goes_on], step[goes_on]
        self.log_pf[alive, step] = log_pf[goes_on].float()
        self.is_action[alive, step] = True

    def append(self, alive: Tensor, token: Tensor) -> Tensor:
        """Append a token to each, or end it if that is the termination token; (A,) bool, those that go on."""
        limits = self.constraints
        stop, longest = limits.termination_token_id, limits.max_length
        self.terminated[alive] = token == stop
        decode_update_(self.tokens, self.lengths, self.finished, token, alive, stop, longest)
        if limits.termination == "forced":
            is_full = self.finished[alive] & ~self.terminated[alive]
            self.log_pterm[alive[is_full], longest] = 0.0
        going = ~self.finished[alive]
        if self.tool is not None:
            self._ask_tool(alive[going])
        return going

    def _ask_tool(self, alive: Tensor) -> None:
        for i in alive.tolist():
            if self._observations.get(i):
                continue
            self._observations.pop(i, None)
            if self.is_action[i, self.lengths[i] - 1]:
                found = _token_ids(self.tool(i, self.sequence(i)))
                stops = self.constraints.termination_token_ids
                ok = all(0 <= t < self.vocab and t not in stops for t in found)
                want = f"ids in [0, {self.vocab}) without {list(stops)}"
                fix = "use this model's ids and leave termination tokens out"
                checks.check(ok, "sample", "tool output", want, found[:20], fix)
                self._observations[i] = deque(found)

    def finish(
        self,
        trajectories: Tensor,  # (K,) int64
        tokens: Tensor,  # (K, L)
        lengths: Tensor,  # (K,)
        terminated: Tensor,  # (K,) bool
        log_behavior: Tensor,  # (K,)
        log_pf: Tensor,  # (K, L)
        log_pterm: Tensor,  # (K, L + 1)
    ) -> None:
        """Take over whole trajectories, each ended by a draw or by max_length."""
        longest, own = self.constraints.max_length, trajectories
        if self.constraints.termination == "forced":
            log_pterm = log_pterm.clone()
            log_pterm[:, longest] = log_pterm[:, longest].masked_fill(~terminated, 0.0)
        self.tokens[own], self.lengths[own], self.terminated[own] = tokens, lengths, terminated
        self.log_behavior[own], self.log_pf[own], self.log_pterm[own] = log_behavior, log_pf, log_pterm
        self.is_action[own] = torch.arange(longest) < lengths[:, None]
        self.finished[own] = True

    def restart(self, trajectories: Tensor) -> None:
        """Forget what these have drawn."""
        self.lengths[trajectories] = 0
        self.is_action[trajectories] = False
        self.log_behavior[trajectories] = 0.0
        self.log_pf[trajectories] = 0.0
        self.log_pterm[trajectories] = torch.nan
        self._observations.clear()

    def result(self) -> Rollouts:
        """The finished trajectories."""
        done = self.finished
        per_row = (self.group, self.tokens, self.lengths, self.log_behavior)
        return Rollouts(
            self.prompts,
            *(x[done] for x in per_row),
            self.constraints,
            log_pf=self.log_pf[done],
            log_pterm=self.log_pterm[done],
            terminated=self.terminated[done],
            is_action=self.is_action[done],
            has_grammar=self.has_grammar,
        )


def _token_ids(output) -> list[int]:
    """What a tool returned, as integers; nothing for None."""
    found = output.tolist() if isinstance(output, Tensor) else [] if output is None else output
    try:
        return [operator.index(t) for t in found]
    except TypeError:
        have, fix = repr(output)[:80], "return a list of token ids, or None"
        checks.fail("sample", "tool output", "token ids", have, fix, kind=checks.InputTypeError)
