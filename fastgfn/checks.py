"""One error form: `<function>: <arg> must be <want>, got <have>; <fix>`.

Everything a user can get wrong raises one of the three classes below, so that the command line can tell a
bad input (one line, exit code 2) from a defect (a traceback).
"""

from typing import Any, NoReturn

import torch
from torch import Tensor


class InputError(ValueError):
    """A value, shape or device that the caller can correct."""


class InputTypeError(TypeError):
    """A type or dtype that the caller can correct."""


class MissingPackageError(ImportError):
    """An optional package that the requested feature needs."""


class NonFiniteError(InputError):
    """A loss, reward, gradient or activation that is nan or inf.

    tree, log_reward: the token tree and its (T,) log R, where it was the reward.
    trajectories: JSON-ready records of those behind it, as far as they are known, see fastgfn.failures.
    """

    def __init__(self, message: str, *, tree: Any = None, log_reward: Tensor | None = None) -> None:
        super().__init__(message)
        self.tree = tree
        self.log_reward = log_reward
        self.trajectories: list[dict] = []


USER_ERRORS = (InputError, InputTypeError, MissingPackageError)


def fail(function: str, arg: str, want: Any, have: Any, fix: str, *, kind: type = InputError) -> NoReturn:
    """Raise `kind` with the one message form."""
    raise kind(message(function, arg, want, have, fix))


def message(function: str, arg: str, want: Any, have: Any, fix: str) -> str:
    return f"{function}: {arg} must be {want}, got {have}; {fix}"


def check(ok: bool, function: str, arg: str, want: Any, have: Any, fix: str) -> None:
    if not ok:
        fail(function, arg, want, have, fix)


def check_shape(function: str, arg: str, tensor: Tensor, want: tuple[int | str, ...], fix: str) -> None:
    """`want` holds sizes, or a letter where any size will do."""
    have = tuple(tensor.shape)
    ok = len(have) == len(want) and all(isinstance(w, str) or w == h for w, h in zip(want, have, strict=True))
    if not ok:
        shown = "(" + ", ".join(str(w) for w in want) + ("," if len(want) == 1 else "") + ")"
        fail(function, arg, shown, have, fix)


def check_floating(function: str, arg: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        fail(function, arg, "floating point", tensor.dtype, "cast it to float32", kind=InputTypeError)


def check_integer(function: str, arg: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        fail(function, arg, "int32 or int64", tensor.dtype, "cast it to int64", kind=InputTypeError)


def check_same_device(function: str, **tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(devices.values()))
    for name, device in devices.items():
        if device != first:
            fail(function, name, f"on {first}", device, "move every argument to one device")


def missing_package(function: str, package: str, fix: str) -> NoReturn:
    raise MissingPackageError(f"{function}: package {package} must be installed, got none; {fix}")
