"""What each phase of a step costs: stages name their phases, a `Recorder` measures those of a block.

    with Recorder(device) as recorder:
        trainer.step()
    recorder.phases["decode"].seconds

Without a recorder a phase costs a microsecond. With one the device is synchronised at every boundary, which
adds launch gaps to phases of many small kernels: take totals from runs without a recorder.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_recorder: "Recorder | None" = None


@dataclass(slots=True)
class Phase:
    """seconds: of wall time, without the phases inside. calls: times entered. peak_bytes: highest memory use,
    of torch's allocator on a GPU, of the process on the CPU."""

    seconds: float = 0.0
    calls: int = 0
    peak_bytes: int = 0


class Recorder:
    """Measures the phases that run inside its `with` block, in `phases` by name; "other" is the rest."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.phases: dict[str, Phase] = {}
        self._stack = ["other"]
        self._since = 0.0

    def __enter__(self) -> "Recorder":
        global _recorder
        if _recorder is not None:
            raise RuntimeError("Recorder: only one may be active at a time; leave the other's block first")
        _recorder = self
        self._restart()
        return self

    def __exit__(self, *error) -> None:
        global _recorder
        self._charge()
        _recorder = None

    def enter(self, name: str) -> None:
        self._charge()
        self._stack.append(name)
        self.phases.setdefault(name, Phase()).calls += 1
        self._restart()

    def leave(self) -> None:
        self._charge()
        self._stack.pop()
        self._restart()

    def _charge(self) -> None:
        synchronize(self.device)
        phase = self.phases.setdefault(self._stack[-1], Phase())
        phase.seconds += time.perf_counter() - self._since
        phase.peak_bytes = max(phase.peak_bytes, peak_bytes(self.device))

    def _restart(self) -> None:
        reset_peak(self.device)
        self._since = time.perf_counter()


@contextlib.contextmanager
def phase(name: str):
    """A block, or as a decorator a function, whose cost a recorder keeps under `name`."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    recorder.enter(name)
    try:
        yield
    finally:
        recorder.leave()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` start again from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Highest memory use since `reset_peak`; 0 on a CPU without Linux's /proc."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])
