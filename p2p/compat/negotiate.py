"""Choosing a stream's protocol (/multistream/1.0.0), total over any bytes a peer may send.

Faults of py-libp2p 0.8.1: bytes that are not UTF-8 raise UnicodeDecodeError out of the swarm's
task and end the host; a name's length is not bounded; a client spends two round trips. Here a
message is at most 1 KiB, every fault is a NegotiationError, and the client asks in one round trip.
Spec: https://github.com/multiformats/multistream-select
It can go when MultiselectCommunicator.read raises MultiselectCommunicatorError for such bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

MULTISTREAM = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
MESSAGE_BYTES_MAX = 1024
ATTEMPTS_MAX = 32


class NegotiationError(Exception):
    """No protocol was agreed on; the message says why."""


class _Pipe(Protocol):
    async def read(self, n: int | None = None) -> bytes: ...

    async def write(self, data: bytes) -> None: ...


def encode_message(text: str) -> bytes:
    """Length as a varint, the text and a line feed."""
    body = text.encode("utf-8") + b"\n"
    if len(body) > MESSAGE_BYTES_MAX:
        raise NegotiationError(f"a protocol name of {len(body)} bytes")
    length = len(body)
    prefix = bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])
    return prefix + body


async def read_message(pipe: _Pipe) -> str:
    """One message. Raises NegotiationError for anything that is not one."""
    length = 0
    for shift in (0, 7):
        byte = (await _exactly(pipe, 1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise NegotiationError("a length of more than two bytes")
    if not 0 < length <= MESSAGE_BYTES_MAX:
        raise NegotiationError(f"a message of {length} bytes")
    body = await _exactly(pipe, length)
    if body[-1:] != b"\n":
        raise NegotiationError("a message without a line feed")
    try:
        return body[:-1].decode("utf-8")
    except UnicodeDecodeError:
        raise NegotiationError("a message that is not UTF-8") from None


async def ask(pipe: _Pipe, protocol: str) -> None:
    """Client side, one round trip. Raises NegotiationError when the peer does not speak it."""
    await pipe.write(encode_message(MULTISTREAM) + encode_message(protocol))
    answer = await read_message(pipe)
    if answer != MULTISTREAM:
        raise NegotiationError(f"the peer answered {answer[:80]!r} instead of {MULTISTREAM}")
    answer = await read_message(pipe)
    if answer == NOT_AVAILABLE:
        raise NegotiationError(f"the peer does not speak {protocol}")
    if answer != protocol:
        raise NegotiationError(f"the peer answered {answer[:80]!r} to {protocol}")


async def answer(pipe: _Pipe, known: Callable[[str], bool], names: Callable[[], Iterable[str]]) -> str:
    """Server side: the first name asked for that is `known`. Raises NegotiationError."""
    await pipe.write(encode_message(MULTISTREAM))
    greeting = await read_message(pipe)
    if greeting != MULTISTREAM:
        raise NegotiationError(f"the peer greeted with {greeting[:80]!r}")
    for _ in range(ATTEMPTS_MAX):
        wanted = await read_message(pipe)
        if wanted and known(wanted):
            await pipe.write(encode_message(wanted))
            return wanted
        if wanted == "ls":
            listing = "\n".join(names()).encode("utf-8")[: MESSAGE_BYTES_MAX - 1].decode("utf-8", "ignore")
            await pipe.write(encode_message(listing))
        else:
            await pipe.write(encode_message(NOT_AVAILABLE))
    raise NegotiationError(f"{ATTEMPTS_MAX} protocols asked for and none known")


async def _exactly(pipe: _Pipe, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await pipe.read(count - len(data))
        if not piece:
            raise NegotiationError("the stream ended")
        data += piece
    return data
