"""What every frozen dataclass of settings shares."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Self

from fastgfn import checks


class Settings:
    """Checks of fields and mappings; a subclass is a dataclass that checks itself when it is made."""

    __slots__ = ()

    def _check_type(self, field: str, kind: type) -> None:
        value = getattr(self, field)
        if kind is int:
            self._need(type(value) is int, field, "an integer")
        elif kind is float:
            number = type(value) in (int, float) and not math.isnan(value)
            self._need(
                number and (math.isfinite(value) or field == "max_grad_norm"), field, "a finite number"
            )
        elif kind is str:
            self._need(type(value) is str, field, "text")
        elif kind is bool:
            self._need(type(value) is bool, field, "true or false")
        elif kind == str | None:
            self._need(value is None or type(value) is str, field, "text or None")
        elif kind == float | None:
            number = type(value) in (int, float) and math.isfinite(value)
            self._need(value is None or number, field, "a finite number or None")
        elif kind == int | None:
            self._need(value is None or type(value) is int, field, "an integer or None")
        elif value is not None or kind == tuple[float, float]:
            numbers = isinstance(value, tuple) and all(type(v) in (int, float) for v in value)
            want = "two numbers" if kind == tuple[float, float] else "two numbers or None"
            self._need(numbers and len(value) == 2, field, want)

    def _pair(self, field: str, fits: Callable[[float], bool], want: str) -> None:
        value = getattr(self, field)
        self._need(all(map(fits, value)), field, want)

    def _need(self, ok: bool, field: str, want: str, fix: str = "change this setting") -> None:
        checks.check(ok, type(self).__name__, field, want, repr(getattr(self, field)), fix)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """Settings from a mapping (JSON, command line); an unknown key raises and names the closest one."""
        name = cls.__name__
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                fix = f"did you mean {close[0]!r}?" if close else f"see fastgfn.config.{name}"
                checks.fail(name, "every key", "a known setting", repr(key), fix)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def between(ends: tuple[float, float], progress: float) -> float:
    """From the first to the second of `ends` as progress goes from 0 to 1, and the second from there on."""
    start, end = ends
    return start + (end - start) * min(1.0, progress)
