"""Frames: golden bytes, any split of a stream parses alike, and any bytes parse or are a violation."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import ProtocolViolation
from p2p import frames as f

GOLDEN = {
    f.pack_open(7, "add", 2.5, 65536): "010000000000000f0000000000000007400400000000000000010000616464",
    f.pack_data_header(7, 5, first=True, end=True): "02030000000000050000000000000007",
    f.pack_data_header(1 << 40, 0, first=False, end=True): "02020000000000000000010000000000",
    f.pack_prefix(3, 70000): "0000000300011170",
    f.pack_refuse(2, f.Refusal("busy", "x", 0.5, {"a": "b"})): (
        "0300000000000016000000000000000294a462757379a178cb3fe000000000000081a161a162"
    ),
    f.pack_cancel(3): "04000000000000000000000000000003",
    f.pack_credit(4, 1 << 20): "0500000000000004000000000000000400100000",
    f.pack_ping(9): "060000000000000800000000000000000000000000000009",
    f.pack_pong(9): "070000000000000800000000000000000000000000000009",
}


@pytest.mark.parametrize(("packed", "golden"), GOLDEN.items(), ids=[str(n) for n in range(len(GOLDEN))])
def test_the_golden_bytes_of_version_1(packed, golden):
    assert packed.hex() == golden


ids = st.integers(1, 2**64 - 1)
frames = st.one_of(
    st.builds(
        lambda call, name, deadline, window: (
            f.pack_open(call, name, deadline, window),
            f.Open(call, name, deadline, window),
        ),
        ids,
        st.text(min_size=1, max_size=f.METHOD_CHARS_MAX),
        st.floats(1e-3, f.DEADLINE_S_MAX),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(
        lambda call, data, first, end: (
            f.pack_data_header(call, len(data), first=first, end=end) + data,
            (call, data, first, end),
        ),
        ids,
        st.binary(min_size=1, max_size=60),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(lambda call: (f.pack_cancel(call), f.Cancel(call)), ids),
    st.builds(lambda call, n: (f.pack_credit(call, n), f.Credit(call, n)), ids, st.integers(0, 2**32 - 1)),
    st.builds(lambda n: (f.pack_ping(n), f.Ping(n)), ids),
    st.builds(lambda n: (f.pack_pong(n), f.Pong(n)), ids),
    st.builds(
        lambda call, text, after: (
            f.pack_refuse(call, f.Refusal("busy", text, after)),
            f.Refuse(call, f.Refusal("busy", text, after)),
        ),
        ids,
        st.text(max_size=20),
        st.none() | st.floats(0, 100),
    ),
    st.builds(
        lambda call: (f.pack_data_header(call, 0, first=False, end=True), (call, b"", False, True)), ids
    ),
)


@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_any_split_of_a_stream_parses_alike(sent, sizes):
    stream = b"".join(packed for packed, _ in sent)
    parser = f.FrameParser()
    events = []
    at = turn = 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        events += parser.feed(stream[at : at + size])
        at += size
        turn += 1
    controls = [event for event in events if not isinstance(event, f.Piece)]
    assert controls == [event for _, event in sent if type(event) is not tuple]
    pieces = iter([event for event in events if isinstance(event, f.Piece)])
    for _, wanted in sent:
        if type(wanted) is not tuple:
            continue
        call, data, first, end = wanted
        got = b""
        while True:
            piece = next(pieces)
            assert piece.call == call
            assert piece.first == (first and not got)
            got += piece.data
            assert piece.end == (end and len(got) == len(data))
            if len(got) >= len(data):
                break
        assert got == data
    assert next(pieces, None) is None


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_parse_or_are_a_violation(chunks):
    parser = f.FrameParser()
    try:
        for chunk in chunks:
            parser.feed(chunk)
    except ProtocolViolation:
        pass


@given(frames, st.data())
def test_damaged_frames_parse_or_are_a_violation(frame, data):
    raw = bytearray(frame[0])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        f.FrameParser().feed(bytes(raw) * 2)
    except ProtocolViolation:
        pass


def header(kind, flags=0, zero=0, length=0, call=1):
    return struct.pack("!BBHIQ", kind, flags, zero, length, call)


@pytest.mark.parametrize(
    "raw",
    [header(0), header(8), header(255), header(2, length=2**32 - 1), header(2, length=(1 << 20) + 1),
     header(2, flags=4, length=1), header(2, zero=1, length=1), header(2, length=0), header(2, flags=1, length=0),
     header(2, flags=3, length=0), header(2, length=1, call=0), header(4, length=1), header(4, flags=2),
     header(4, call=0), header(5, length=3), header(5, length=5), header(6, length=8), header(6, length=7, call=0),
     header(3, length=8193), header(3), header(1, length=12), header(1, length=525), header(1, length=2**31)],
    ids=lambda raw: raw.hex(),
)  # fmt: skip
def test_impossible_headers_are_violations_at_once(raw):
    with pytest.raises(ProtocolViolation):
        f.FrameParser().feed(raw)


@pytest.mark.parametrize("deadline", [0.0, -1.0, math.nan, math.inf, 8 * 24 * 3600.0])
def test_impossible_deadlines_are_violations(deadline):
    with pytest.raises(ProtocolViolation, match="deadline"):
        f.FrameParser().feed(f.pack_open(1, "m", deadline, 0))


def test_a_methods_name_must_be_short_text():
    with pytest.raises(ProtocolViolation, match="characters"):
        f.FrameParser().feed(f.pack_open(1, "m" * 129, 1.0, 0))
    with pytest.raises(ProtocolViolation, match="UTF-8"):
        f.FrameParser().feed(f.pack_open(1, "m", 1.0, 0)[:-1] + b"\xff")


def test_data_is_handed_on_as_it_arrives_without_being_kept():
    parser = f.FrameParser()
    parser.feed(f.pack_data_header(1, 1 << 20, first=True, end=False))
    chunk = bytes(1000)
    (piece,) = parser.feed(chunk)
    assert piece.data.obj is chunk
    assert len(parser._body) == 0


@pytest.mark.parametrize(
    "refusal",
    [f.Refusal("x" * 500, "m" * 100_000, 1.0, {str(n): "v" * 1000 for n in range(100)}),
     f.Refusal("c", "\ud800", math.nan, {"\ud800": "\udfff"}), f.Refusal("c", "é" * 5000, math.inf)],
    ids=["long", "surrogates", "wide"],
)  # fmt: skip
def test_any_refusal_can_be_sent(refusal):
    (event,) = f.FrameParser().feed(f.pack_refuse(1, refusal))
    assert event.refusal.code
    assert event.refusal.retry_after_s in (1.0, None)
