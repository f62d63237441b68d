"""Checks that read the values of a tensor, and what stands in for them where values are not read.

Reading a value of a GPU waits for the GPU, so it is done on the CPU, or anywhere with FASTGFN_DEBUG=1.
"""

import os

import torch
from torch import Tensor

from fastgfn import checks


def is_debug() -> bool:
    return os.environ.get("FASTGFN_DEBUG") == "1"


def are_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or is_debug()


def check_range(name: str, arg: str, values: Tensor, high: int, low: int = 0) -> None:
    """Values in [low, high); an empty range is seen without reading any."""
    if are_read(values) or (high == low and values.numel()):
        bad = values[(values < low) | (values >= high)]
        checks.check(not len(bad), name, arg, f"in [{low}, {high})", bad[:1].tolist(), "correct that entry")


def clamped(values: Tensor, high: int, ignore: int | None = None) -> tuple[Tensor, Tensor | None]:
    """values with 0 where one is neither in [0, high) nor ignore, and where; None: values are read."""
    if are_read(values):
        return values, None
    bad = (values < 0) | (values >= high)
    if ignore is not None:
        bad &= values != ignore
    return values.masked_fill(bad, 0), bad


def marked(log_probs: Tensor, *faults: Tensor | None) -> Tensor:
    """NaN, without gradient, at the faults that `clamped` found."""
    for bad in faults:
        if bad is not None:
            log_probs = log_probs.masked_fill(bad, torch.nan)
    return log_probs
