"""How a new socket or stream shows which link it belongs to.

    listener -> dialler   challenge     magic, 32 random bytes
    dialler -> listener   hello         magic, session, generation, index, count, position, proof
    listener -> dialler   welcome       position, proof

A proof is a MAC by a key that only the link's two ends have, over the challenge and what is said; the challenge is used
once, so a recorded hello is worth nothing. `position` is the first record that its sender lacks. Sizes are fixed:
nothing is allocated for what a stranger claims. It does not know sockets' lives or what becomes of a link.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from p2p.errors import ProtocolViolation
from p2p.links.carriers import Carrier
from p2p.links.keys import CHALLENGE_BYTES, PROOF_BYTES, SESSION_BYTES, LinkKeys
from p2p.links.records import SEQ_MAX
from p2p.links.types import SOCKETS_MAX

MAGIC = b"SHL1"
CHALLENGE_SIZE = len(MAGIC) + CHALLENGE_BYTES
_SAID = struct.Struct(f"!4s{SESSION_BYTES}sIBBQ")
HELLO_SIZE = _SAID.size + PROOF_BYTES
_POSITION = struct.Struct("!Q")
WELCOME_SIZE = _POSITION.size + PROOF_BYTES
GENERATION_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Hello:
    """What a dialler says: this is socket `index` of `count` of the link's path `generation`."""

    session: bytes
    generation: int
    index: int
    count: int
    position: int

    def said(self) -> bytes:
        return _SAID.pack(MAGIC, self.session, self.generation, self.index, self.count, self.position)


def read_hello(data: bytes) -> tuple[Hello, bytes]:
    """(hello, its proof, not checked yet). Raises ProtocolViolation."""
    magic, session, generation, index, count, position = _SAID.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolViolation("this is not the hello of a link")
    if not 0 < count <= SOCKETS_MAX or index >= count or position > SEQ_MAX:
        raise ProtocolViolation(f"socket {index} of {count} at record {position}")
    return Hello(session, generation, index, count, position), data[_SAID.size :]


def challenge_of(data: bytes) -> bytes:
    """The challenge of a listener. Raises ProtocolViolation where something else listens."""
    if data[: len(MAGIC)] != MAGIC:
        raise ProtocolViolation("something else than links listens there")
    return data[len(MAGIC) :]


async def introduce(carrier: Carrier, keys: LinkKeys, hello: Hello, challenge: bytes) -> int:
    """Prove ourselves to a listener and check its proof; the position at which the peer is."""
    said = hello.said()
    await carrier.send([said + keys.proof(b"hello", challenge, said)])
    welcome = await carrier.receive_exactly(WELCOME_SIZE)
    if not keys.proves(b"welcome", challenge, said + welcome[: _POSITION.size], welcome[_POSITION.size :]):
        raise ProtocolViolation("the listener does not belong to this link")
    position: int = _POSITION.unpack_from(welcome)[0]
    return position


def welcome(keys: LinkKeys, hello: Hello, challenge: bytes, position: int) -> bytes:
    """The listener's answer to a hello that was proven."""
    at = _POSITION.pack(position)
    return at + keys.proof(b"welcome", challenge, hello.said() + at)
