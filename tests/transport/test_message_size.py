"""A message that would take far more memory than its bytes is refused before it is parsed."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model.errors import BadRequest
from overlay.transport import codec, message_size
from overlay.transport.codec import pb2

MIB = 1024 * 1024
ROWS = pb2.Segment(number=1, count=4096, payloads=pb2.Column(items=[b"x" * 200] * 4096))
SINGLE = pb2.Segment(
    number=7, count=1, payloads=pb2.Column(items=[b"x"]), remaining_us=10**7, first_id=1 << 60,
    team="green", handler="echo", hops=["A", "B"], targets=["C", "D", "F"], mode=pb2.ANY,
)  # fmt: skip
FAILED = pb2.Slice(
    number=1, count=4096,
    parts=[
        pb2.PartSlice(
            process_id=worker,
            failures=[pb2.Detail(start=n, count=1, code=13, reason="failed") for n in range(4096)],
        )
        for worker in "CDF"
    ],
)  # fmt: skip

DENSE = {
    "segments": b"\x0a\x00" * MIB,
    "cancels": b"\x12\x00" * MIB,
    "parts of a slice": pb2.Frame(slices=[pb2.Slice(parts=[pb2.PartSlice()] * MIB)]),
    "failures of a part": pb2.Frame(
        slices=[pb2.Slice(parts=[pb2.PartSlice(failures=[pb2.Detail()] * MIB)])]
    ),
    "hops of a segment": pb2.Frame(segments=[pb2.Segment(hops=[""] * 2 * MIB)]),
}


@pytest.mark.parametrize("what", DENSE)
def test_a_message_of_many_empty_parts_is_refused(what):
    made = DENSE[what]
    message = made if isinstance(made, bytes) else made.SerializeToString()
    with pytest.raises(BadRequest, match=r"has so many parts that it would take more than"):
        codec.read_frame(message)


def test_a_request_of_many_empty_names_is_refused_too():
    message = pb2.Request(hops=[""] * 2 * MIB).SerializeToString()
    with pytest.raises(BadRequest, match="so many parts"):
        codec.read_message(message, pb2.Request.FromString)


@pytest.mark.parametrize(
    "frame",
    [
        pb2.Frame(segments=[ROWS]),
        pb2.Frame(segments=[SINGLE] * 10_000),
        pb2.Frame(slices=[FAILED] * 3),
        pb2.Frame(segments=[pb2.Segment(payloads=pb2.Column(items=[b"x" * 16 * MIB]))]),
        pb2.Frame(cancels=[pb2.Cancel(number=n, start=1, count=1) for n in range(20_000)]),
    ],
    ids=["rows", "single ones", "failures", "a large body", "cancels"],
)
def test_a_genuine_message_is_read(frame):
    assert codec.read_frame(frame.SerializeToString()) == frame


@given(st.binary(min_size=1, max_size=60))
def test_broken_bytes_are_left_to_the_parser(few):
    with suppress(BadRequest):
        message_size.check(few * (message_size.MIN_BYTES // len(few) + 2), codec._FRAME)
