"""Grammars of a policy: a regex, a JSON schema or a context-free grammar over the text of Z.

    grammar = LLGuidanceGrammar("regex", "[0-9]{1,3}", tokenizer=policy.tokenizer,
                                vocab_size=policy.vocab_size, termination_token_id=stop)
    rollouts = sample(
        prompts, policy=policy, constraints=Constraints(stop), num_samples=8, grammar=grammar
    )
    tree = pack(rollouts, grammar=grammar)

`Trainer(..., grammar=grammar)` does the same, and learns the posterior conditioned on the grammar.

The text of Z is the bytes of its tokens: a token " 7" starts with a space, which the grammar must allow.
Every spelling of a text in tokens is allowed. Special tokens are no text.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastgfn import checks

KINDS = ("regex", "json_schema", "lark", "ebnf")
# Prefixes whose matchers are kept; one of a small JSON schema takes 20 to 30 KB in either package.
CAPACITY = 2048


class PrefixGrammar(ABC):
    """A fastgfn.rollout.Grammar made of matchers that can be copied and advanced by a token.

    The matcher of a prefix is a copy of that of its longest known prefix, advanced: by one token where
    prefixes grow by one each step. Rows that share a prefix share its matcher. At most `capacity` matchers
    outlive a call, those of the prefixes that were used last; what is forgotten is made again.

    The termination token may follow exactly what the grammar accepts; extra ones of the Constraints may where
    the grammar allows them as text, which special tokens are not. At max_length a sequence ends all the
    same: `allowed([z])[0, termination_token_id]` says whether the grammar accepts z. There it is a sequence
    like others to a reward, which should be low where it is cut short.
    """

    def __init__(self, start: Any, vocab_size: int, termination_token_id: int, capacity: int) -> None:
        name = type(self).__name__
        checks.check(capacity >= 1, name, "capacity", ">= 1", capacity, f"use e.g. {CAPACITY}")
        self.vocab_size = vocab_size
        self.termination_token_id = termination_token_id
        self.capacity = capacity
        self._start = start  # the matcher of the empty prefix
        self._known: dict[tuple[int, ...], Any] = {}  # those used last stand last

    @abstractmethod
    def _copy(self, matcher: Any) -> Any:
        """An independent matcher in the same state."""

    @abstractmethod
    def _advance(self, matcher: Any, token: int) -> str | None:
        """Advance the matcher in place; why it cannot be, or None."""

    @abstractmethod
    def _accepts(self, matcher: Any) -> bool:
        """Whether the prefix is a whole text of the grammar."""

    @abstractmethod
    def _masks(self, matchers: list[Any]) -> np.ndarray:
        """(U, >= V) uint8, 1 for the tokens that may follow; the termination token's column is not read."""

    def allowed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(K, V) bool: which tokens may follow each prefix of Z, the termination token's column included.

        A row is all False where the grammar goes on with text that only the termination token could write.

        Raises:
            InputError: a sequence that the grammar does not accept, or a limit of the package.
        """
        place: dict[tuple[int, ...], int] = {}
        rows = [place.setdefault(tuple(z), len(place)) for z in sequences]
        if not rows:
            return torch.zeros(0, self.vocab_size, dtype=torch.bool)
        matchers = [self._matcher(prefix) for prefix in place]
        for prefix in list(self._known)[: -self.capacity]:
            del self._known[prefix]
        out = torch.from_numpy(self._masks(matchers)).view(torch.bool)[:, : self.vocab_size]
        out[:, self.termination_token_id] = torch.tensor([self._accepts(m) for m in matchers])
        return out if len(place) == len(rows) else out[rows]

    def _matcher(self, prefix: tuple[int, ...]) -> Any:
        if not prefix:
            return self._start
        found = self._known.pop(prefix, None)
        if found is None:
            known = len(prefix) - 1
            while known and prefix[:known] not in self._known:
                known -= 1
            found = self._copy(self._known[prefix[:known]] if known else self._start)
            for k in range(known, len(prefix)):
                self._follow(found, prefix, k)
        self._known[prefix] = found
        return found

    def _follow(self, matcher: Any, prefix: tuple[int, ...], k: int) -> None:
        token, reason = prefix[k], "it is the termination token"
        if token != self.termination_token_id:
            reason = f"no id in [0, {self.vocab_size})"
            if 0 <= token < self.vocab_size:
                reason = self._advance(matcher, token)
        if reason is not None:
            have = f"token {token} after {list(prefix[max(0, k - 20) : k])} ({_line(reason)})"
            fix = "pass prefixes and tool output that it accepts"
            checks.fail(type(self).__name__, "sequence", "accepted by the grammar", have, fix)


class LLGuidanceGrammar(PrefixGrammar):
    """A grammar of llguidance.

    Args:
        kind: "regex" (of the whole Z), "json_schema", "lark", or "ebnf" (GBNF).
        definition: the grammar's text; a JSON schema may be a dict.
        tokenizer: a fast tokenizer of transformers.
        termination_token_id: that of the Constraints.
        vocab_size: V of the model; None: the tokenizer's.
        capacity: prefixes whose matchers are kept.

    Raises:
        InputError: the package refuses the grammar or the tokenizer.
        MissingPackageError: llguidance is not installed.
    """

    def __init__(
        self,
        kind: str,
        definition: str | dict,
        *,
        tokenizer: Any,
        termination_token_id: int,
        vocab_size: int | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        name = "LLGuidanceGrammar"
        try:
            import llguidance
            import llguidance.hf
            import llguidance.numpy
        except ImportError:
            checks.missing_package(name, "llguidance", "run `pip install 'fastgfn[grammar]'`")
        size, ids = _sizes(name, kind, tokenizer, termination_token_id, vocab_size)
        try:
            table = llguidance.hf.from_tokenizer(tokenizer, n_vocab=ids, eos_token=termination_token_id)
        except ValueError as error:
            _refuse_tokenizer(name, error)
        try:
            text = _lark(llguidance, kind, definition)
        except ValueError as error:
            _refuse_grammar(name, kind, definition, error)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        start = llguidance.LLMatcher(table, text, log_level=0, limits=limits)
        if start.is_error():
            _refuse_grammar(name, kind, definition, start.get_error())
        super().__init__(start, size, termination_token_id, capacity)
        self._words = (ids + 31) // 32
        self._executor = llguidance.LLExecutor(torch.get_num_threads())
        self._fill = llguidance.numpy.fill_next_token_bitmask_par

    def _copy(self, matcher: Any) -> Any:
        return matcher.deep_copy()

    def _advance(self, matcher: Any, token: int) -> str | None:
        return None if matcher.consume_token(token) else matcher.get_error()

    def _accepts(self, matcher: Any) -> bool:
        return matcher.is_accepting()

    def _masks(self, matchers: list[Any]) -> np.ndarray:
        bits = np.zeros((len(matchers), self._words), dtype=np.int32)
        self._fill(self._executor, [(m, i) for i, m in enumerate(matchers)], bits)
        for matcher in matchers:
            if matcher.is_error():
                fix = "simplify the grammar"
                have = _line(matcher.get_error())
                checks.fail("LLGuidanceGrammar", "grammar", "within llguidance's limits", have, fix)
        return _unpacked(bits)


class XGrammar(PrefixGrammar):
    """A grammar of xgrammar; arguments and errors are those of LLGuidanceGrammar.

    Special tokens, which xgrammar takes for their text, are never allowed.
    """

    def __init__(
        self,
        kind: str,
        definition: str | dict,
        *,
        tokenizer: Any,
        termination_token_id: int,
        vocab_size: int | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        name = "XGrammar"
        try:
            import xgrammar
        except ImportError:
            checks.missing_package(name, "xgrammar", "run `pip install 'fastgfn[grammar]'`")
        size, ids = _sizes(name, kind, tokenizer, termination_token_id, vocab_size)
        stop = [termination_token_id]
        try:
            table = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=ids, stop_token_ids=stop)
        except ValueError as error:
            _refuse_tokenizer(name, error)
        compiler = xgrammar.GrammarCompiler(table, max_threads=torch.get_num_threads(), cache_enabled=False)
        compile_it = getattr(compiler, "compile_grammar" if kind == "ebnf" else f"compile_{kind}")
        try:
            compiled = compile_it(_text(definition))
        except (RuntimeError, ValueError) as error:
            _refuse_grammar(name, kind, definition, error)
        super().__init__(xgrammar.GrammarMatcher(compiled), size, termination_token_id, capacity)
        self._words = (ids + 31) // 32
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=torch.get_num_threads())
        self._special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def _copy(self, matcher: Any) -> Any:
        return matcher.fork()

    def _advance(self, matcher: Any, token: int) -> str | None:
        if token in self._special:
            return "it is a special token"
        return None if matcher.accept_token(token) else "xgrammar refuses it"

    def _accepts(self, matcher: Any) -> bool:
        return matcher.is_completed()

    def _masks(self, matchers: list[Any]) -> np.ndarray:
        bits = torch.zeros(len(matchers), self._words, dtype=torch.int32)
        self._batch.batch_fill_next_token_bitmask(matchers, bits)
        out = _unpacked(bits.numpy())
        out[:, list(self._special)] = 0
        return out


def _unpacked(bits: np.ndarray) -> np.ndarray:
    """(U, 32 * W) uint8 from (U, W) int32, the lowest bit first."""
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")


def _sizes(name: str, kind: str, tokenizer: Any, stop: int, vocab_size: int | None) -> tuple[int, int]:
    """V and the number of ids that a mask must hold: a model may have more than its tokenizer, or fewer."""
    checks.check(kind in KINDS, name, "kind", f"one of {', '.join(KINDS)}", repr(kind), "choose one")
    fast = hasattr(tokenizer, "backend_tokenizer")
    fix = "pass policy.tokenizer"
    checks.check(fast, name, "tokenizer", "a fast tokenizer of transformers", type(tokenizer).__name__, fix)
    ids = max(tokenizer.get_vocab().values()) + 1
    size = ids if vocab_size is None else vocab_size
    checks.check(size >= 1, name, "vocab_size", ">= 1", size, "pass policy.vocab_size")
    fix = "pass that of the Constraints"
    checks.check(0 <= stop < size, name, "termination_token_id", f"in [0, {size})", stop, fix)
    return size, max(ids, size)


def _lark(llguidance: Any, kind: str, definition: str | dict) -> str:
    """Without the option, text that the grammar forces may be spelt in the tokenizer's own way only."""
    text = _text(definition)
    if kind == "regex":
        text = f"start: /{llguidance.regex_to_lark(text, '')}/"
    elif kind == "json_schema":
        text = f"start: %json {json.dumps(json.loads(text))}"
    elif kind == "ebnf":
        text = llguidance.grammar_from(kind, text)
    return '%llguidance {"no_forcing": true}\n' + text


def _text(definition: str | dict) -> str:
    return definition if isinstance(definition, str) else json.dumps(definition)


def _refuse_grammar(name: str, kind: str, definition: str | dict, error: object) -> NoReturn:
    package = "xgrammar" if name == "XGrammar" else "llguidance"
    have = f"{_text(definition)[:100]!r} ({_line(error)})"
    checks.fail(name, "definition", f"a {kind} that {package} takes", have, "correct it")


def _refuse_tokenizer(name: str, error: object) -> NoReturn:
    fix = "pass policy.tokenizer"
    checks.fail(name, "tokenizer", "one that the package takes", _line(error), fix)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
