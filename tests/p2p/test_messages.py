"""Messages: golden bytes, whole round trips, and nothing but messages or ProtocolViolation out of any bytes."""

import tracemalloc
from dataclasses import dataclass, make_dataclass
from typing import Literal, NewType, Optional

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2p import PeerId, ProtocolViolation, Tensor, pack_value, unpack_value
from p2p.messages import codec_of

Name = NewType("Name", str)


@dataclass(frozen=True, slots=True)
class Inner:
    flag: bool
    text: str


@dataclass(frozen=True, slots=True)
class Everything:
    integer: int
    real: float
    raw: bytes
    peer: PeerId
    word: Literal["a", "b", 3]
    maybe: int | None
    perhaps: Inner | None
    many: tuple[int, ...]
    nested: tuple[Inner, ...]
    pair: tuple[int, str]
    table: dict[str, float]
    inners: dict[str, Inner]
    deep: tuple[tuple[bytes, ...], ...]
    old_style: Optional[str] = None  # noqa: UP045 - both spellings are supported


@dataclass(frozen=True, slots=True)
class WithTensors:
    position: int
    first: Tensor
    second: Tensor | None = None


EXAMPLE = Everything(
    integer=-5,
    real=1.5,
    raw=b"\x00\xff",
    peer=PeerId("12D3"),
    word="b",
    maybe=None,
    perhaps=Inner(True, "é"),
    many=(1, 2, 300),
    nested=(Inner(False, ""),),
    pair=(7, "x"),
    table={"b": 2.0, "a": 1.0},
    inners={"k": Inner(True, "v")},
    deep=((b"x", b""), ()),
    old_style="s",
)

texts = st.text(max_size=8)
inners = st.builds(Inner, st.booleans(), texts)
everythings = st.builds(
    Everything,
    integer=st.integers(-(2**63), 2**64 - 1),
    real=st.floats(allow_nan=False),
    raw=st.binary(max_size=8),
    peer=texts,
    word=st.sampled_from(["a", "b", 3]),
    maybe=st.none() | st.integers(0, 9),
    perhaps=st.none() | inners,
    many=st.lists(st.integers(0, 2**40), max_size=5).map(tuple),
    nested=st.lists(inners, max_size=3).map(tuple),
    pair=st.tuples(st.integers(0, 9), texts),
    table=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    inners=st.dictionaries(texts, inners, max_size=2),
    deep=st.lists(st.lists(st.binary(max_size=3), max_size=3).map(tuple), max_size=3).map(tuple),
    old_style=st.none() | texts,
)


def test_the_golden_bytes_of_a_message():
    assert pack_value(EXAMPLE).hex() == (
        "9efbcb3ff8000000000000c40200ffa431324433a162c09192c3a2c3a9930102cd012c"
        "9192c2a09207a17882a161cb3ff0000000000000a162cb400000000000000081a16b92c3a1769292c40178c40090a173"
    )
    assert unpack_value(Everything, pack_value(EXAMPLE)) == EXAMPLE


def test_the_golden_bytes_of_tensors():
    message = WithTensors(3, Tensor("float16", (1, 3), b"abcdef"), Tensor("uint8", (), b"z"))
    encoded = codec_of(WithTensors).encode(message)
    assert encoded.body.hex() == "930393a7666c6f61743136010391" + "91a575696e7438"
    payload = b"".join(encoded.payload)
    assert payload == b"abcdef" + bytes(10) + b"z"
    assert encoded.payload_bytes == len(payload)
    assert codec_of(WithTensors).decode(encoded.body, payload) == message


@given(everythings)
def test_every_message_comes_back(message):
    assert unpack_value(Everything, pack_value(message)) == message


def test_equal_messages_have_equal_bytes():
    @dataclass(frozen=True)
    class Table:
        items: dict[str, int]

    assert pack_value(Table({"a": 1, "b": 2})) == pack_value(Table({"b": 2, "a": 1}))


@given(st.binary(max_size=200))
@example(b"\xdd\x7f\xff\xff\xff")
@example(b"\x9e" + b"\xdd\xff\xff\xff\xff" * 30)
@example(b"\xc1")
@example(b"\xd4\x01\x01")
def test_any_bytes_are_a_message_or_a_violation(data):
    for kind in (Everything, WithTensors, Inner):
        try:
            assert type(codec_of(kind).decode(data, data)) is kind
        except ProtocolViolation:
            pass


@given(everythings, st.data())
def test_damaged_bytes_are_a_message_or_a_violation(message, data):
    raw = bytearray(pack_value(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            assert type(unpack_value(Everything, damaged)) is Everything
        except ProtocolViolation:
            pass


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(anything, max_size=16))
def test_well_formed_msgpack_of_other_shapes_is_a_violation(values):
    body = msgpack.packb(values)
    try:
        message = codec_of(Everything).decode(body)
    except ProtocolViolation:
        return
    assert unpack_value(Everything, pack_value(message)) == message


CLAIMS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "bin": b"\xc6\xff\xff\xff\xff",
    "str": b"\xdb\xff\xff\xff\xff",
    "ext": b"\xc9\x7f\xff\xff\xff\x01",
    "nested short arrays": b"\xdc\xea\x60" * 500 + bytes(62_000),
    "nested long arrays": b"\xdd\x00\xff\xff\xff" * 2000,
    "deep arrays": b"\x91" * 5000,
    "deep maps": b"\x81\xa1a" * 5000,
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_claimed_lengths_never_reach_an_allocator(claim):
    @dataclass(frozen=True)
    class Lists:
        values: tuple[tuple[int, ...], ...]

    @dataclass(frozen=True)
    class Maps:
        values: dict[str, dict[str, int]]

    tracemalloc.start()
    try:
        for kind in (Lists, Maps, Inner):
            codec = codec_of(kind)
            for body in (claim, b"\x91" + claim, b"\x92\x01" + claim, b"\x98" + b"\x90" * 6 + claim):
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                with pytest.raises(ProtocolViolation):
                    codec.decode(body)
                assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_that_claims_more_than_its_payload_is_a_violation():
    codec = codec_of(WithTensors)
    for shape in ((2**62, 4), (2**63,), (5,), (2**64 - 1,) * 8):
        body = msgpack.packb([1, ["uint8", *shape], []])
        with pytest.raises(ProtocolViolation):
            codec.decode(body, b"abcd")
    for header in ([], ["uint8"] + [1] * 9, ["int4", 4], ["uint8", -1], ["uint8", True], [4], ["uint8", [4]]):
        with pytest.raises(ProtocolViolation):
            codec.decode(msgpack.packb([1, header, []]), b"abcd")
    with pytest.raises(ProtocolViolation, match="after the end of the payload"):
        codec.decode(msgpack.packb([1, ["uint8", 3], []]), b"abcd")


def test_a_key_that_comes_twice_is_a_violation():
    kind = make_dataclass("M", [("table", dict[str, int])], frozen=True)
    assert unpack_value(kind, b"\x91\x81\xa1a\x01") == kind({"a": 1})
    with pytest.raises(ProtocolViolation, match="twice"):
        unpack_value(kind, b"\x91\x82\xa1a\x01\xa1a\x02")
    with pytest.raises(ProtocolViolation, match="no string"):
        unpack_value(kind, b"\x91\x81\x01\x01")


def test_newer_fields_are_skipped_and_older_messages_get_defaults():
    old = make_dataclass("M", [("a", int)], frozen=True)
    new = make_dataclass("M", [("a", int), ("b", str, "x"), ("c", tuple[int, ...], ())], frozen=True)
    assert unpack_value(new, pack_value(old(1))) == new(1, "x", ())
    assert unpack_value(old, pack_value(new(1, "y", (1, 2)))) == old(1)
    with pytest.raises(ProtocolViolation, match="fields"):
        unpack_value(old, msgpack.packb([1] * 40))
    with pytest.raises(ProtocolViolation, match="fields"):
        unpack_value(new, msgpack.packb([]))
    newer = make_dataclass("M", [("a", int), ("t", Tensor)], frozen=True)
    encoded = codec_of(newer).encode(newer(1, Tensor("uint8", (2,), b"ab")))
    assert codec_of(old).decode(encoded.body, b"".join(encoded.payload)) == old(1)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, "1"), (int, True), (int, 1.0), (float, "x"), (float, True), (str, b"x"), (bytes, "x"), (bool, 1),
     (tuple[int, ...], [1]), (tuple[int, ...], (1, "x")), (tuple[int, str], (1,)), (dict[str, int], {1: 1}),
     (Inner, None), (Inner, "x"), (Literal["a"], "b"), (float, float("nan")), (int, 2**64), (Tensor, b"x"),
     (str, "\ud800"), (Inner | None, 5)],
    ids=str,
)  # fmt: skip
def test_a_value_that_does_not_fit_its_field_is_our_own_error(kind, value):
    message = make_dataclass("M", [("field", kind)], frozen=True)
    with pytest.raises((TypeError, ValueError)):
        pack_value(message(value))


@pytest.mark.parametrize(
    "kind", [list[int], set, object, int | str, dict[int, str], complex, tuple, Literal[1.5]], ids=str
)
def test_types_that_cannot_travel_are_refused_at_once(kind):
    with pytest.raises(TypeError, match=r"cannot be part|Literal"):
        codec_of(make_dataclass("M", [("field", kind)], frozen=True))
    with pytest.raises(TypeError, match="frozen"):
        codec_of(make_dataclass("M", [("field", int)]))


@dataclass(frozen=True)
class Loop:
    again: "Loop | None" = None


def test_a_type_that_contains_itself_is_refused():
    with pytest.raises(TypeError, match="contains itself"):
        codec_of(Loop)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [("float32", (2,), bytes(7)), ("int4", (2,), bytes(1)), ("uint8", (-1,), b""), ("uint8", [1], b"a"),
     ("uint8", (True,), b"a"), ("uint8", (1,) * 9, b"a"), ("uint8", (1,), "a"), ("uint8", (1.0,), b"a"),
     ("uint8", (2,), memoryview(b"abcd")[::2])],
    ids=str,
)  # fmt: skip
def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(dtype, shape, data):
    with pytest.raises(ValueError, match=r"Tensor|tensor"):
        Tensor(dtype, shape, data)


def test_a_tensor_takes_any_contiguous_buffer():
    assert Tensor("int32", (2,), memoryview(bytearray(8)).cast("i")).data.format == "B"
    assert Tensor("uint8", (2, 2), bytearray(4)).nbytes == 4
    assert Tensor("bfloat16", (), b"ab").nbytes == 2
    assert Tensor("int64", (0, 5), b"").nbytes == 0
