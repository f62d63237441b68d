"""The frozen list of enumerable problems, problems.json, and what a run needs of each.

    problem = load_problem("tiny-other", seed=0)
    Trainer(problem.policy, prompts=problem.prompts, reward=problem.reward, constraints=problem.constraints,
            grammar=problem.grammar, config=...)
    problem.evaluate()["tv"]

"dense": every prefix that may stop has an informative reward. "sparse": few strings have one.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.lab.posterior import Posterior, evaluate_exactly, exact_posterior
from fastgfn.models import Policy, load_policy
from fastgfn.models.shapes import peaked_policy
from fastgfn.rewards import LMReward, Reward, SequenceReward
from fastgfn.types import Constraints, Grammar

NAME = "load_problem"
FILE = Path(__file__).with_name("problems.json")
# Added to the logits of every token outside a restricted vocabulary.
OUTSIDE = -99.0
# Nodes that are forwarded at a time: small trees for tiny models, whose attention grows with their square.
MAX_TOKENS = {"tiny": 1024, "smollm2-135m": 2048}
REQUIRED = {
    "name": str,
    "about": str,
    "kind": str,
    "model": str,
    "prompts": list,
    "stop": (int, str),
    "min_length": int,
    "max_length": int,
    "reward": dict,
    "reward_temperature": (int, float),
    "num_strings": int,
}
OF_MODEL = {
    "tiny": {"vocab_size": int, "base_seed": int, "peak": (int, float)},
    "smollm2-135m": {"words": list},
}
OF_REWARD = {
    "lm": ({}, {"base_seed": int, "suffix": str}),
    "digit_sum": ({"target": int, "log_miss": (int, float)}, {}),
    "independent_sets": ({"num_vertices": int, "edges": list, "fugacity": (int, float)}, {}),
}


class IndependentSets:
    """The grammar of independent sets: vertices as tokens 1..n in ascending order, no two of them adjacent.
    Every prefix of such a sequence is one, so that stopping is allowed everywhere."""

    def __init__(
        self, num_vertices: int, edges: Sequence[Sequence[int]], *, stop: int, vocab_size: int
    ) -> None:
        fits = all(len(e) == 2 and 1 <= min(e) < max(e) <= num_vertices for e in edges)
        want, fix = f"pairs of vertices in [1, {num_vertices}]", "number the vertices from 1"
        checks.check(fits, "IndependentSets", "edges", want, list(edges)[:20], fix)
        ids = (0 <= stop < vocab_size, not 1 <= stop <= num_vertices, num_vertices < vocab_size)
        want, fix = f"> {num_vertices}, with the termination token {stop} apart", "give every vertex a token"
        checks.check(all(ids), "IndependentSets", "vocab_size", want, vocab_size, fix)
        tokens = torch.arange(vocab_size)
        # after vertex u: only higher ones, none adjacent to it, or stop
        self._after = (tokens > tokens[:, None]) & (tokens <= num_vertices)
        for a, b in edges:
            self._after[min(a, b), max(a, b)] = False
        self._after[:, stop] = True
        self._first = (tokens >= 1) & (tokens <= num_vertices) | (tokens == stop)

    def allowed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(K, V) bool, see Grammar."""
        rows = [self._after[list(z)].all(0) if len(z) else self._first for z in sequences]
        return torch.stack(rows)


@dataclass(frozen=True)
class Problem:
    """An enumerable problem with a fresh sampler.

    kind: "dense" or "sparse". model: "tiny" or "smollm2-135m".
    policy: with an untrained adapter. prompts: token ids.
    reward: of the un-tempered log R of every prefix; the target is R^(1/reward_temperature).
    vocabulary: the tokens of Z.
    posteriors: the exact target of each prompt.
    """

    name: str
    about: str
    kind: str
    model: str
    policy: Policy
    prompts: list[list[int]]
    constraints: Constraints
    grammar: Grammar | None
    reward: Reward
    reward_temperature: float
    vocabulary: list[int]
    posteriors: list[Posterior]

    def evaluate(self) -> dict[str, float]:
        """`evaluate_exactly` of the policy, over prompts the worst of each: the largest distance or error,
        the smallest mode coverage, the drift farthest from 0, and of the rest the mean."""
        results = self.evaluate_prompts()
        return {name: _worst(name, [r[name] for r in results]) for name in results[0]}

    def evaluate_prompts(self) -> list[dict[str, float]]:
        """`evaluate_exactly` of the policy for each prompt."""
        return [evaluate_exactly(posterior, self.policy) for posterior in self.posteriors]


def _worst(name: str, values: list[float]) -> float:
    if name == "mode_coverage":
        return min(values)
    if name.endswith("drift"):
        return max(values, key=abs)
    if name in ("tv", "kl_target_to_model", "kl_model_to_target", "invalid_mass", "log_z_error"):
        return max(values)
    return sum(values) / len(values)


def load_problem(
    name: str,
    *,
    seed: int = 0,
    lora_rank: int = 16,
    reward_temperature: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """A problem of the frozen list, with its exact posterior.

    Args:
        name: one of NAMES.
        seed, lora_rank: of the policy's adapter.
        reward_temperature: another than the list's, for runs at several temperatures.

    Raises:
        InputError: an unknown name, or a posterior that is not of the size that the list states.
        MissingPackageError: the bundled model's package is absent.
    """
    if name not in SPECS:
        fix = f"choose one of {', '.join(NAMES)}"
        close = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.0)
        fix = f"did you mean '{close[0]}'? {fix}"
        checks.fail(NAME, "name", "of the frozen list", repr(name), fix)
    return build_problem(
        SPECS[name],
        seed=seed,
        lora_rank=lora_rank,
        reward_temperature=reward_temperature,
        dtype=dtype,
        device=device,
    )


def build_problem(
    spec: dict,
    *,
    seed: int = 0,
    lora_rank: int = 16,
    reward_temperature: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """The problem that an entry of the list's form describes."""
    check_spec(spec)
    options = dict(lora_rank=lora_rank, dtype=dtype, device=device, seed=seed)
    policy = _tiny(spec, spec["base_seed"], options) if spec["model"] == "tiny" else load_policy(**options)
    prompts = [_ids(policy, p) for p in spec["prompts"]]
    vocabulary, constraints = _strings(spec, policy)
    grammar, reward = _reward(spec, policy, constraints, options)
    temperature = spec["reward_temperature"] if reward_temperature is None else reward_temperature
    posteriors = [
        exact_posterior(
            prompt,
            constraints=constraints,
            reward=reward,
            vocabulary=vocabulary,
            reward_temperature=temperature,
            grammar=grammar,
            device=policy.device,
            max_tokens=MAX_TOKENS[spec["model"]],
        )
        for prompt in prompts
    ]
    for posterior in posteriors:
        want, have = f"{spec['num_strings']}, as the list states", len(posterior.sequences)
        fix = "correct num_strings"
        checks.check(have == spec["num_strings"], NAME, f"strings of {spec['name']!r}", want, have, fix)
    kept = {key: spec[key] for key in ("name", "about", "kind", "model")}
    return Problem(
        **kept,
        policy=policy,
        prompts=prompts,
        constraints=constraints,
        grammar=grammar,
        reward=reward,
        reward_temperature=temperature,
        vocabulary=vocabulary,
        posteriors=posteriors,
    )


def _tiny(spec: dict, base_seed: int, options: dict) -> Policy:
    return peaked_policy(spec["vocab_size"], base_seed=base_seed, peak=spec["peak"], **options)


def _ids(policy: Policy, prompt: str | list[int]) -> list[int]:
    return policy.encode(prompt) if isinstance(prompt, str) else list(prompt)


def _strings(spec: dict, policy: Policy) -> tuple[list[int], Constraints]:
    """The tokens of Z and the limits of its strings."""
    stop = spec["stop"]
    stop = _token(policy, stop) if isinstance(stop, str) else stop
    limits = dict(min_length=spec["min_length"], max_length=spec["max_length"])
    if "words" not in spec:
        vocabulary = [t for t in range(policy.vocab_size) if t != stop]
        return vocabulary, Constraints(stop, **limits)
    vocabulary = [_token(policy, word) for word in spec["words"]]
    logit_bias = torch.full((policy.vocab_size,), OUTSIDE)
    logit_bias[[*vocabulary, stop]] = 0.0
    return vocabulary, Constraints(stop, logit_bias=logit_bias, **limits)


def _token(policy: Policy, text: str) -> int:
    ids = policy.encode(text)
    fix = "choose words that are one token of the model"
    checks.check(len(ids) == 1, NAME, repr(text), "one token", f"{len(ids)}", fix)
    return ids[0]


def _reward(
    spec: dict, policy: Policy, constraints: Constraints, options: dict
) -> tuple[Grammar | None, Reward]:
    given, stop = spec["reward"], constraints.termination_token_id
    if given["type"] == "digit_sum":
        target, miss = given["target"], float(given["log_miss"])
        return None, SequenceReward(lambda zs: [0.0 if sum(z) == target else miss for z in zs])
    if given["type"] == "independent_sets":
        log_fugacity = math.log(given["fugacity"])
        graph = given["num_vertices"], given["edges"]
        grammar = IndependentSets(*graph, stop=stop, vocab_size=policy.vocab_size)
        return grammar, SequenceReward(lambda zs: [len(z) * log_fugacity for z in zs])
    model = policy
    if "base_seed" in given:
        model = _tiny(spec, given["base_seed"], options)
    suffixes = policy.encode(given["suffix"]) if "suffix" in given else None
    return None, LMReward(model.reference, suffixes=suffixes, max_tokens=MAX_TOKENS[spec["model"]])


def check_spec(spec: dict) -> None:
    """Refuse an entry that is not of the list's form; the message names the entry."""
    name = spec.get("name", "an entry without name")
    model, reward = spec.get("model"), spec.get("reward")
    _check_choice(name, "model", model, OF_MODEL)
    kind = reward.get("type") if isinstance(reward, dict) else None
    _check_choice(name, "reward.type", kind, OF_REWARD)
    _check_choice(name, "kind", spec.get("kind"), ("dense", "sparse"))
    _check_keys(name, "", spec, REQUIRED | OF_MODEL[model], {})
    needed, optional = OF_REWARD[kind]
    _check_keys(name, "reward.", reward, {"type": str} | needed, optional)
    of_tiny = sorted({"base_seed"} & reward.keys()) if model != "tiny" else sorted({"suffix"} & reward.keys())
    checks.check(not of_tiny, NAME, f"reward of {name!r}", f"one that {model} has", of_tiny, "drop it")
    for key in ("reward_temperature", "num_strings", "max_length"):
        checks.check(spec[key] > 0, NAME, f"{key} of {name!r}", "> 0", spec[key], "correct it")
    prompts = spec["prompts"]
    checks.check(
        len(prompts) > 0 and all(prompts), NAME, f"prompts of {name!r}", "non-empty", prompts, "add one"
    )


def _check_choice(name: str, key: str, have: object, known: Sequence[str]) -> None:
    want = f"one of {', '.join(known)}"
    checks.check(have in known, NAME, f"{key} of {name!r}", want, repr(have), "choose one")


def _check_keys(name: str, prefix: str, have: dict, needed: dict, optional: dict) -> None:
    known = needed | optional
    for key in have:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        fix = f"did you mean '{prefix}{close}'?"
        checks.check(key in known, NAME, f"keys of {name!r}", "known", f"'{prefix}{key}'", fix)
        right = isinstance(have[key], known[key]) and not isinstance(have[key], bool)
        want = getattr(known[key], "__name__", "a number or text")
        checks.check(right, NAME, f"{prefix}{key} of {name!r}", want, repr(have[key]), "correct it")
    missing = [f"{prefix}{key}" for key in needed if key not in have]
    checks.check(not missing, NAME, f"keys of {name!r}", "complete", f"none of {missing}", "add them")


def _load(file: Path) -> dict[str, dict]:
    specs = json.loads(file.read_text())["problems"]
    table = {}
    for spec in specs:
        check_spec(spec)
        name = spec["name"]
        checks.check(name not in table, NAME, "names", "distinct", f"{name!r} twice", "rename one")
        table[name] = spec
    return table


SPECS = _load(FILE)
NAMES: tuple[str, ...] = tuple(SPECS)
DENSE_NAMES = tuple(name for name in NAMES if SPECS[name]["kind"] == "dense")
