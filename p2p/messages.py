"""Messages: frozen dataclasses to and from bytes, decided by their type hints alone.

A message is a msgpack body (its fields in order, as an array) and a payload (the bytes of its tensors, each
starting at a multiple of 16). `decode` is pure and total: a message or a ProtocolViolation; nothing is allocated
for a length that is only claimed, there are no ext types, and depth is that of the type. Versions: a field with a
default may be appended to a message; older bytes then read as the default, and newer fields are skipped.
It knows nothing of calls, streams or limits on size.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgpack

from p2p.errors import P2pError, ProtocolViolation
from p2p.tensor import DIMS_MAX, Tensor, tensor_bytes

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

ALIGN_BYTES = 16
NEWER_FIELDS_MAX = 32
_PADDING = bytes(ALIGN_BYTES)
_EMPTY = memoryview(b"")


class Encoded(NamedTuple):
    """`payload` are pieces to be sent one after another, `payload_bytes` in total."""

    body: bytes
    payload: list[bytes | memoryview]
    payload_bytes: int


class _Reader:
    """A cursor over one body and its payload."""

    __slots__ = ("end", "newer", "payload", "payload_at", "unpacker")

    def __init__(self, body: Buffer, payload: memoryview) -> None:
        # Nested containers are read header by header, so a value that is one on its own is a violation.
        self.unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, len(body)), max_array_len=0, max_map_len=0, max_ext_len=0
        )
        self.unpacker.feed(body)
        self.end = len(body)
        self.payload = payload
        self.payload_at = 0
        self.newer = False

    def array(self) -> int:
        return self._bounded(self.unpacker.read_array_header())

    def map(self) -> int:
        return self._bounded(self.unpacker.read_map_header())

    def _bounded(self, count: int) -> int:
        """Every item takes a byte at least, so a count beyond what is left is a lie."""
        left = self.end - self.unpacker.tell()
        if count > left:
            raise ProtocolViolation(f"{count} items in {left} bytes")
        return count

    def tensor_data(self, nbytes: int) -> memoryview:
        start = -(-self.payload_at // ALIGN_BYTES) * ALIGN_BYTES
        if start + nbytes > len(self.payload):
            raise ProtocolViolation(f"a tensor of {nbytes} bytes in a payload of {len(self.payload)}")
        self.payload_at = start + nbytes
        return self.payload[start : start + nbytes]


_Encode = Callable[[Any, list[Tensor]], Any]
_Decode = Callable[[_Reader], Any]
_Check = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a type travels. `check` is set for scalars: one msgpack value, never nil, judged by itself."""

    encode: _Encode
    decode: _Decode
    check: _Check | None = None


class Codec(Generic[T]):
    """How one message type travels. `codec_of` makes and remembers them."""

    __slots__ = ("_decode", "_encode", "kind")

    def __init__(self, kind: type[T]) -> None:
        self.kind = kind
        compiled = _compile(kind, kind.__name__, ())
        self._encode = compiled.encode
        self._decode = compiled.decode

    def encode(self, message: T) -> Encoded:
        """TypeError or ValueError naming the field where a value does not fit its declared type."""
        tensors: list[Tensor] = []
        try:
            body: bytes = msgpack.packb(self._encode(message, tensors))
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"{self.kind.__name__} cannot be encoded: {error}") from error
        if not tensors:
            return Encoded(body, [], 0)
        payload: list[bytes | memoryview] = []
        at = 0
        for tensor in tensors:
            padding = -at % ALIGN_BYTES
            if padding:
                payload.append(_PADDING[:padding])
            payload.append(tensor.data)
            at += padding + len(tensor.data)
        return Encoded(body, payload, at)

    def decode(self, body: Buffer, payload: Buffer = b"") -> T:
        """The message, or ProtocolViolation. Tensors are views of `payload`."""
        reader = _Reader(body, memoryview(payload) if payload else _EMPTY)
        try:
            message: T = self._decode(reader)
        except ProtocolViolation:
            raise
        except (ValueError, TypeError, P2pError, msgpack.UnpackException) as error:
            raise ProtocolViolation(f"{self.kind.__name__}: {error or type(error).__name__}") from error
        if reader.unpacker.tell() != reader.end:
            raise ProtocolViolation(f"{self.kind.__name__}: bytes after the end of the message")
        if reader.payload_at != len(payload) and not reader.newer:
            raise ProtocolViolation(f"{self.kind.__name__}: bytes after the end of the payload")
        return message


_codecs: dict[type, Codec[Any]] = {}


def codec_of(kind: type[T]) -> Codec[T]:
    """TypeError where `kind` or a type inside it cannot be a message."""
    codec = _codecs.get(kind)
    if codec is None:
        codec = _codecs[kind] = Codec(kind)
    return codec


def pack_value(message: object) -> bytes:
    """A message without tensors as bytes, the same for equal messages. ValueError if it holds tensors."""
    encoded = codec_of(type(message)).encode(message)
    if encoded.payload:
        raise ValueError(f"{type(message).__name__} holds tensors, which have no place in a value")
    return encoded.body


def unpack_value(kind: type[T], data: Buffer) -> T:
    """The inverse of `pack_value`. Raises ProtocolViolation."""
    return codec_of(kind).decode(data)


# From type hints to plans. `inside` lists the dataclasses being compiled, to refuse recursion.


def _compile(hint: Any, where: str, inside: tuple[type, ...]) -> _Plan:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    if hint is Tensor:
        return _Plan(_encode_tensor, _decode_tensor)
    if hint is float:
        return _float(where)
    if hint in (int, bool, str, bytes):
        return _scalar(hint, where)
    if hint is types.NoneType or hint is None:
        return _literal((None,), where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, where, inside)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _literal(args, where)
    if origin in (typing.Union, types.UnionType):
        rest = [one for one in args if one is not types.NoneType]
        if len(rest) == 1 and len(args) == 2:
            return _optional(_compile(rest[0], where, inside))
    if origin is tuple and args:
        if len(args) == 2 and args[1] is Ellipsis:
            return _sequence(_compile(args[0], where, inside), where)
        return _fixed([_compile(one, where, inside) for one in args], where)
    if origin is dict and args[0] is str:
        return _mapping(_compile(args[1], where, inside), where)
    raise TypeError(f"{where}: {hint!r} cannot be part of a message")


def _of_value(encode: _Encode, check: _Check) -> _Plan:
    return _Plan(encode, lambda reader: check(reader.unpacker.unpack()), check)


def _wrong(where: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"{where} must be {wanted}, got {type(value).__name__}")


def _scalar(kind: type, where: str) -> _Plan:
    name = kind.__name__

    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if type(value) is kind:
            return value
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
        raise _wrong(where, name, value)

    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _wrong(where, name, value)
        return value

    return _of_value(encode, check)


def _float(where: str) -> _Plan:
    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise _wrong(where, "float", value)
        return check(float(value))

    def check(value: Any) -> Any:
        if type(value) is not float:
            raise _wrong(where, "float", value)
        if math.isnan(value):
            raise ValueError(f"{where} must be a number, got nan")
        return value

    return _of_value(encode, check)


def _literal(choices: Sequence[Any], where: str) -> _Plan:
    kinds = (str, int, bool, types.NoneType)
    if not all(type(one) in kinds for one in choices):
        raise TypeError(f"{where}: Literal may hold str, int, bool and None only, got {choices!r}")
    allowed = {(type(one), one) for one in choices}
    wanted = f"one of {', '.join(map(repr, choices))}"

    def check(value: Any) -> Any:
        if type(value) not in kinds or (type(value), value) not in allowed:
            raise ValueError(f"{where} must be {wanted}")
        return value

    # A nil may be a value here, so an optional one is wrapped like a container.
    plan = _of_value(lambda value, tensors: check(value), check)
    return _Plan(plan.encode, plan.decode) if None in choices else plan


def _optional(inner: _Plan) -> _Plan:
    """A scalar gives way to nil; anything else travels as an array of none or one."""
    encode_inner, decode_inner, check = inner.encode, inner.decode, inner.check
    if check is not None:

        def encode_scalar(value: Any, tensors: list[Tensor]) -> Any:
            return None if value is None else encode_inner(value, tensors)

        def decode_scalar(reader: _Reader) -> Any:
            value = reader.unpacker.unpack()
            return None if value is None else check(value)

        return _Plan(encode_scalar, decode_scalar)

    def encode(value: Any, tensors: list[Tensor]) -> Any:
        return [] if value is None else [encode_inner(value, tensors)]

    def decode(reader: _Reader) -> Any:
        count = reader.array()
        if count > 1:
            raise ProtocolViolation(f"an optional value came {count} times")
        return decode_inner(reader) if count else None

    return _Plan(encode, decode)


def _sequence(inner: _Plan, where: str) -> _Plan:
    encode_inner, decode_inner, check = inner.encode, inner.decode, inner.check

    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if not isinstance(value, tuple):
            raise _wrong(where, "tuple", value)
        return [encode_inner(one, tensors) for one in value]

    def decode(reader: _Reader) -> Any:
        count = reader.array()
        if check is None:
            return tuple([decode_inner(reader) for _ in range(count)])
        unpack = reader.unpacker.unpack
        return tuple([check(unpack()) for _ in range(count)])

    return _Plan(encode, decode)


def _fixed(plans: Sequence[_Plan], where: str) -> _Plan:
    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if not isinstance(value, tuple) or len(value) != len(plans):
            raise _wrong(where, f"a tuple of {len(plans)}", value)
        return [plan.encode(one, tensors) for plan, one in zip(plans, value, strict=True)]

    def decode(reader: _Reader) -> Any:
        count = reader.array()
        if count != len(plans):
            raise ProtocolViolation(f"{where} must have {len(plans)} items, got {count}")
        return tuple([plan.decode(reader) for plan in plans])

    return _Plan(encode, decode)


def _mapping(inner: _Plan, where: str) -> _Plan:
    """Sorted by key, so that equal messages have equal bytes; the order of a decoded dict is that of the wire."""

    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wrong(where, "dict[str, ...]", value)
        return {str(key): inner.encode(value[key], tensors) for key in sorted(value)}

    def decode(reader: _Reader) -> Any:
        found: dict[str, Any] = {}
        for _ in range(reader.map()):
            key = reader.unpacker.unpack()
            if type(key) is not str or key in found:
                raise ProtocolViolation(f"{where} has a key that is no string or comes twice")
            found[key] = inner.decode(reader)
        return found

    return _Plan(encode, decode)


def _dataclass(kind: type, where: str, inside: tuple[type, ...]) -> _Plan:
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(f"{where}: {kind.__name__} must be a frozen dataclass")
    if kind in inside:
        raise TypeError(f"{where}: {kind.__name__} contains itself")
    fields = dataclasses.fields(kind)
    if not all(one.init and not one.kw_only for one in fields):
        raise TypeError(f"{where}: fields of {kind.__name__} must be plain positional ones")
    hints = typing.get_type_hints(kind)
    name = kind.__name__
    plans = [_compile(hints[one.name], f"{name}.{one.name}", (*inside, kind)) for one in fields]
    encoders = [(one.name, plan.encode) for one, plan in zip(fields, plans, strict=True)]
    decoders = [plan.decode for plan in plans]
    none = dataclasses.MISSING
    required = sum(1 for one in fields if one.default is none and one.default_factory is none)

    def encode(value: Any, tensors: list[Tensor]) -> Any:
        if type(value) is not kind:
            raise _wrong(where, name, value)
        return [encode_field(getattr(value, field), tensors) for field, encode_field in encoders]

    def decode(reader: _Reader) -> Any:
        count = reader.array()
        newer = count - len(decoders)
        if newer > NEWER_FIELDS_MAX or count < required:
            raise ProtocolViolation(f"{name} has {len(decoders)} fields, got {count}")
        if newer <= 0:
            return kind(*[decode_field(reader) for decode_field in decoders[:count]])
        values = [decode_field(reader) for decode_field in decoders]
        reader.newer = True
        for _ in range(newer):
            reader.unpacker.skip()
        return kind(*values)

    return _Plan(encode, decode)


def _encode_tensor(value: Any, tensors: list[Tensor]) -> Any:
    if type(value) is not Tensor:
        raise _wrong("a tensor field", "Tensor", value)
    tensors.append(value)
    return [value.dtype, *value.shape]


def _decode_tensor(reader: _Reader) -> Tensor:
    count = reader.array()
    if not 1 <= count <= 1 + DIMS_MAX:
        raise ProtocolViolation(f"a tensor header of {count} items")
    unpack = reader.unpacker.unpack
    dtype = unpack()
    shape = tuple([unpack() for _ in range(count - 1)])
    if type(dtype) is not str:
        raise ProtocolViolation("a tensor's dtype must be a string")
    return Tensor(dtype, shape, reader.tensor_data(tensor_bytes(dtype, shape)))
