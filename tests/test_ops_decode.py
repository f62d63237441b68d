import pytest
import torch
from torch.library import opcheck

from fastgfn.ops.decode import decode_update_
from fastgfn.reference import decode as ref
from fastgfn.types import as_int64

STOP = 3


def state(num_rows=4, width=5):
    return (
        torch.zeros(num_rows, width, dtype=torch.int64),
        torch.zeros(num_rows, dtype=torch.int64),
        torch.zeros(num_rows, dtype=torch.bool),
    )


@pytest.mark.parametrize("max_length", [1, 3, 5])
def test_equals_reference_over_a_whole_decode(max_length):
    have, want = state(), state()
    for _ in range(max_length):
        active = (~have[2]).nonzero()[:, 0]
        rows = active[torch.randperm(len(active))]
        drawn = torch.randint(0, STOP + 1, (len(rows),))
        decode_update_(*have, drawn, rows, STOP, max_length)
        ref.decode_update_(*want, drawn, rows, STOP, max_length)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert have[2].all()


def test_odd_shapes():
    tokens, lengths, finished = state(num_rows=0)
    decode_update_(tokens, lengths, finished, as_int64([]), as_int64([]), STOP, 5)
    # Strided state: the middle column of a wider buffer, and rows drawn with a stride.
    buffer = torch.zeros(2, 4, dtype=torch.int64)
    tokens, lengths, finished = buffer[:, 1:3], torch.zeros(2, dtype=torch.int64), state(2)[2]
    drawn, rows = as_int64([[7, 0], [STOP, 0]])[:, 0], as_int64([[1, 9], [0, 9]])[:, 0]
    decode_update_(tokens, lengths, finished, drawn, rows, STOP, 2)
    assert buffer.tolist() == [[0, 0, 0, 0], [0, 7, 0, 0]]
    assert lengths.tolist() == [0, 1] and finished.tolist() == [True, False]


def test_repeat_gives_equal_bits():
    first, second = state(), state()
    for s in (first, second):
        decode_update_(*s, as_int64([1, STOP]), as_int64([2, 0]), STOP, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    opcheck(
        torch.ops.fastgfn.decode_update_.default,
        (*state(), as_int64([1, STOP]), as_int64([2, 0]), STOP, 5),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": as_int64([1, 1])}, r"rows must be distinct and in \[0, 4\), got 1"),
        ({"rows": as_int64([0, 4])}, r"rows must be distinct and in \[0, 4\), got 4"),
        ({"rows": as_int64([0, 2])}, "rows must be unfinished, got finished row 2"),
        ({"rows": as_int64([0])}, r"rows must be \[2\], got \[1\]"),
        ({"rows": as_int64([0, 3])}, r"lengths must be in \[0, 5\), got 5"),
        ({"max_length": 6}, r"max_length must be in \[1, 5\], got 6"),
        ({"drawn": torch.zeros(2)}, "drawn must be Long, got Float"),
    ],
)
def test_refuses_bad_input_and_writes_nothing(change, message):
    tokens, lengths, finished = state()
    finished[2] = True
    lengths[3] = 5
    before = [x.clone() for x in (tokens, lengths, finished)]
    arguments = {"drawn": as_int64([1, 1]), "rows": as_int64([0, 1]), "max_length": 5} | change
    with pytest.raises(ValueError, match=f"decode_update_: {message}"):
        decode_update_(
            tokens,
            lengths,
            finished,
            arguments["drawn"],
            arguments["rows"],
            STOP,
            arguments["max_length"],
        )
    assert all(torch.equal(a, b) for a, b in zip(before, (tokens, lengths, finished), strict=True))
