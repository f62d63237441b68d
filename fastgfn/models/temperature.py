"""One adapter for a range of target temperatures T: its ranks are scaled by a function of T.

A LoRA layer computes x (W + c B diag(g(T)) A)^T, with c the scaling of peft and, for each rank, a gain g of
    s(T) = 1/T - 1,  or  1 at every temperature.
"split_scale" gives s to one half of the ranks and 1 to the other, for any reward.
"adapter_scale" gives every rank s: at T = 1 the policy is the base, whatever is learned. It is for powers
q^(1/T) of the base's own q, whose log-probs move with 1/T - 1 to first order. LMReward, p(Z stop | X), is q
only where max_length does not bind, since q stops there for certain: else its target at T = 1 is another.

Trained weights are peft's LoRA tensors as ever. What peft alone computes from them has g = 1 everywhere,
which is T = 0.5; `save_adapter(..., temperature=T)` writes an ordinary adapter of one temperature.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastgfn import checks

KINDS = ("adapter_scale", "split_scale")


class Conditioning:
    """How a policy depends on the target temperature, and at which one it is: None until it is told.

    Without a temperature the adapted layers refuse to compute; the base, with the adapter off, does not.

    Args:
        kind: "adapter_scale" or "split_scale", see fastgfn.models.temperature.
        temperatures: the trained range, lowest and highest; 0 < lowest < highest.

    Raises:
        InputError: another kind, or no such range.
    """

    def __init__(self, kind: str, temperatures: tuple[float, float]) -> None:
        name = "Conditioning"
        checks.check(kind in KINDS, name, "kind", f"one of {KINDS}", repr(kind), "use 'adapter_scale'")
        low, high = map(float, temperatures)
        want, fix = "0 < lowest < highest, finite", "pass e.g. (0.4, 1.2)"
        is_range = 0.0 < low < high < math.inf
        checks.check(is_range, name, "temperatures", want, (low, high), fix)
        self.kind, self.temperatures = kind, (low, high)
        self.temperature: float | None = None
        self.layers: list[nn.Module] = []  # peft's
        self._gains_of: float | None = None

    def set(self, temperature: float | None) -> None:
        """Be at `temperature`, in memory that stays where it is: a CUDA graph keeps reading it.

        Raises:
            InputError: outside of the trained range; the adapter is merged at another temperature.
        """
        if temperature is not None:
            low, high = self.temperatures
            want, fix = f"in the trained range [{low}, {high}]", "train with another range for others"
            is_inside = low <= temperature <= high
            checks.check(is_inside, "at_temperature", "temperature", want, temperature, fix)
            self._scale(temperature)
        self.temperature = temperature

    def _scale(self, temperature: float) -> None:
        if temperature == self._gains_of:
            return
        # by peft, or by Policy.merged: such weights hold the temperature that they were made at
        merged = any(m.merged or getattr(m.forward, "merged", None) is not None for m in self.layers)
        have, fix = "merged at another temperature", "leave Policy.merged, or call unmerge_adapter(), first"
        checks.check(not merged, "at_temperature", "the adapter", "unmerged", have, fix)
        for layer in self.layers:
            for part in layer.lora_A.values():
                part.scale(1.0 / temperature - 1.0)
        self._gains_of = temperature

    def needed(self) -> None:
        """Refuse to compute the adapter without a temperature."""
        want, fix = "that of a target", "use `with policy.at_temperature(T)`, or sample(target_temperature=T)"
        known = self.temperature is not None
        checks.check(known, "Policy", "the temperature of a conditioned adapter", want, None, fix)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "temperatures": list(self.temperatures)}


class RankScaled(nn.Linear):
    """Stands in for the `lora_A` (r, K) of one layer, with its parameter.

    `weight` is diag(g) A, which is what all of its readers want: our ops, the copies of `Policy.merged`,
    peft's forwards and peft's merging. The parameter keeps its name and its place in the state.
    """

    def __init__(self, inner: nn.Linear, conditioning: Conditioning) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self._parameters["weight"] = parameter = inner.weight
        self.bias = None
        self.conditioning = conditioning
        self.num_free = self.out_features // 2 if conditioning.kind == "split_scale" else 0
        gains = torch.ones(self.out_features, 1, dtype=parameter.dtype, device=parameter.device)
        self.register_buffer("gains", gains, persistent=False)

    @torch.no_grad()
    def scale(self, value: float) -> None:
        """g = value but for the ranks that no temperature scales, the first ones."""
        self.gains[self.num_free :] = value

    @property
    def weight(self) -> Tensor:
        """(r, K) diag(g) A."""
        self.conditioning.needed()
        return self._parameters["weight"] * self.gains


def condition(policy, kind: str, temperatures: tuple[float, float]) -> None:
    """Make the adapter of a policy depend on the target temperature, see this module.

    Before training: with B = 0, as a new adapter has it, the policy is the base at every temperature.

    Raises:
        InputError: no plain LoRA adapter, trainable weights besides it, one rank alone to split, a policy
            that is conditioned already.
    """
    name, conditioning = "condition", Conditioning(kind, temperatures)
    fix = "load it again without a conditioning"
    checks.check(policy.conditioning is None, name, "policy", "not conditioned yet", "one that is", fix)
    layers = [m for m in policy.model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    want, fix = "of one plain LoRA adapter", "use load_policy, which makes one"
    checks.check(bool(layers), name, "policy", want, "one without adapter", fix)
    for layer in layers:
        is_plain = len(layer.lora_A) == 1 and not layer.lora_variant and not hasattr(layer, "parameter_name")
        checks.check(is_plain and not layer.merged, name, "policy", want, type(layer).__name__, fix)
        (rank,) = layer.r.values()
        fits = kind != "split_scale" or rank >= 2
        checks.check(fits, name, "the rank", ">= 2 with kind='split_scale'", rank, "raise it")
    is_lora = (".lora_A.", ".lora_B.")
    for parameter, _ in policy.parameters():
        plain = any(part in parameter for part in is_lora) and parameter.endswith(".weight")
        checks.check(plain, name, "every trainable weight", "LoRA's A or B", parameter, fix)
    for layer in layers:
        (adapter,) = layer.lora_A
        layer.lora_A[adapter] = RankScaled(layer.lora_A[adapter], conditioning)
    conditioning.layers = layers
    policy.conditioning = conditioning


def check_temperature(function: str, policy, temperature: float) -> None:
    """Refuse a target temperature that the policy cannot take."""
    want, fix = "conditioned on the temperature", "train it with TrainConfig.conditioning"
    checks.check(policy.conditioning is not None, function, "policy", want, "one that is not", fix)
    is_number = isinstance(temperature, int | float) and type(temperature) is not bool and temperature > 0.0
    checks.check(is_number, function, "temperature", "a number > 0", repr(temperature), "pass e.g. 0.7")


@contextlib.contextmanager
def at_temperature(policy, temperature: float) -> Iterator[None]:
    """See `Policy.at_temperature`."""
    check_temperature("at_temperature", policy, temperature)
    conditioning = policy.conditioning
    before = conditioning.temperature
    conditioning.set(float(temperature))
    try:
        yield
    finally:
        conditioning.set(before)


def state_at(policy, temperature: float) -> dict[str, Tensor]:
    """The state of the model with an ordinary adapter, which is the policy at one temperature."""
    state = policy.model.state_dict()
    with at_temperature(policy, temperature):
        for name, module in policy.model.named_modules():
            if isinstance(module, RankScaled):
                state[f"{name}.weight"] = module.weight.detach()
    return state
