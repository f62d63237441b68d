import time

import pytest
import torch

from fastgfn.phases import Recorder, phase


@phase("outer")
def outer():
    time.sleep(0.03)
    for _ in range(2):
        with phase("inner"):
            time.sleep(0.05)


def test_a_phase_is_charged_without_the_phases_inside():
    started = time.perf_counter()
    with Recorder() as recorder:
        time.sleep(0.01)
        outer()
    wall = time.perf_counter() - started
    seconds = {name: p.seconds for name, p in recorder.phases.items()}
    assert seconds["outer"] >= 0.03 and seconds["inner"] >= 0.1 and seconds["other"] >= 0.01
    assert seconds["outer"] < seconds["inner"]
    assert 0.5 * wall < sum(seconds.values()) <= wall
    assert {name: p.calls for name, p in recorder.phases.items()} == {"other": 0, "outer": 1, "inner": 2}


def test_memory_is_charged_to_the_phase_that_used_it():
    with Recorder() as recorder:
        with phase("large"):
            torch.ones(2**26)
        with phase("small"):
            torch.ones(2**10)
    large, small = (recorder.phases[n].peak_bytes for n in ("large", "small"))
    assert large - small > 0.9 * 2**28


def test_phases_end_with_an_error_and_without_a_recorder():
    outer()
    with pytest.raises(ValueError, match="expected"), Recorder() as recorder, phase("failing"):
        raise ValueError("expected")
    assert recorder.phases["failing"].calls == 1
    with Recorder() as recorder:
        pass
    assert list(recorder.phases) == ["other"]


def test_one_recorder_at_a_time():
    with Recorder(), pytest.raises(RuntimeError, match="leave the other"), Recorder():
        pass
    with Recorder():
        pass
