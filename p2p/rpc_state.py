"""One call at one end of a stream: what waits to be sent, what has come, and the credit in both directions.

Plain state with the two pieces of work that concern a single call: cutting its messages into frames, and gathering
pieces into messages within the method's limits. Which call is next, and what frames mean, is `rpc_core`'s.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from p2p.errors import P2pError, ProtocolViolation
from p2p.frames import PREFIX_BYTES, Piece, Refusal, pack_data_header, pack_prefix, parse_prefix

# What a callee may be sent before it has granted anything: a constant of the protocol.
REQUEST_WINDOW_BYTES = 256 << 10


class MessageLimits(NamedTuple):
    """The most that one message may measure, body and payload apart."""

    body_bytes_max: int
    payload_bytes_max: int


class Received(NamedTuple):
    """A whole message as it came; both are memory of its own. `wire_bytes` is what it counts against windows."""

    body: bytes
    payload: bytearray
    wire_bytes: int


class CallerLeft(Exception):
    """Why a served call is over: its caller wants no answer any more."""


@dataclass(eq=False, slots=True)
class _Outgoing:
    """A message on its way out; `parts` are what is left of it."""

    parts: deque[memoryview | bytes]
    left_bytes: int
    started: bool = False


@dataclass(eq=False, slots=True)
class _Incoming:
    """The message that is arriving. Its memory grows with what came, never with what was claimed."""

    prefix: bytearray = field(default_factory=bytearray)
    body: bytearray = field(default_factory=bytearray)
    payload: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0
    payload_bytes: int = 0

    @property
    def gathered_bytes(self) -> int:
        return len(self.prefix) + len(self.body) + len(self.payload)


@dataclass(eq=False, slots=True)
class CallState:
    """`begun`: the request has come (or was sent). `over`: nothing more will be sent or come; then `failure` or
    `refused` says why, unless it ended cleanly. `peer_ended`: what is in `inbox` is the last. The inbox outlives
    the call. `owner` is the shell's.
    """

    id: int
    method: str
    limits: MessageLimits
    deadline: float
    send_credit_bytes: int
    window_bytes: int
    allowance_bytes: int
    owner: Any = None
    begun: bool = False
    over: bool = False
    peer_ended: bool = False
    failure: P2pError | CallerLeft | None = None
    refused: Refusal | None = None
    outbox: deque[_Outgoing] = field(default_factory=deque)
    outbox_bytes: int = 0
    in_turn: bool = False
    end_wanted: bool = False
    end_sent: bool = False
    refusal: Refusal | None = None
    inbox: deque[Received] = field(default_factory=deque)
    incoming: _Incoming | None = None
    queued_bytes: int = 0
    held_bytes: int = 0

    @property
    def sendable(self) -> bool:
        """Whether a frame could go out now: data as far as there is credit, and the end after it."""
        if self.over or self.end_sent:
            return False
        return self.send_credit_bytes > 0 if self.outbox else self.end_wanted

    def queue(
        self, body: bytes, payload: list[bytes | memoryview], payload_bytes: int, copy_bytes_max: int
    ) -> bool:
        """Add a message to the outbox; whether it was copied."""
        left = PREFIX_BYTES + len(body) + payload_bytes
        parts: list[memoryview | bytes] = [pack_prefix(len(body), payload_bytes), body, *payload]
        copied = left <= copy_bytes_max
        self.outbox.append(_Outgoing(deque((b"".join(parts),) if copied else parts), left))
        self.outbox_bytes += left
        return copied

    def detach(self) -> None:
        """Copy what the outbox refers to, so that its owner may have it back before it is sent."""
        for message in self.outbox:
            message.parts = deque(bytes(part) for part in message.parts)

    def drop_outbox(self) -> None:
        self.outbox.clear()
        self.outbox_bytes = 0

    def cut_frame(self, piece_bytes_max: int, parts: list[bytes | memoryview]) -> tuple[int, bool]:
        """Append the next DATA frame to `parts`; returns the length of its data and whether it ends our direction."""
        message = self.outbox[0]
        length = min(message.left_bytes, piece_bytes_max, self.send_credit_bytes)
        done = length == message.left_bytes
        end = done and len(self.outbox) == 1 and self.end_wanted and self.refusal is None
        parts.append(pack_data_header(self.id, length, first=not message.started, end=end))
        left = length
        while left:
            part = message.parts.popleft()
            if len(part) > left:
                view = memoryview(part)
                message.parts.appendleft(view[left:])
                part = view[:left]
            parts.append(part)
            left -= len(part)
        message.started = True
        message.left_bytes -= length
        self.outbox_bytes -= length
        self.send_credit_bytes -= length
        if done:
            self.outbox.popleft()
        return length, end

    def gather(self, piece: Piece) -> Received | None:
        """Add a piece to the message that is arriving; the message, once it is whole. Raises ProtocolViolation."""
        data = piece.data
        if piece.first == (self.incoming is not None):
            raise ProtocolViolation("a message started within another, or went on after its end")
        if piece.first and len(data) >= PREFIX_BYTES:
            body_bytes, payload_bytes = self._sizes(data)
            body_end = PREFIX_BYTES + body_bytes
            if len(data) == body_end + payload_bytes:
                return Received(bytes(data[PREFIX_BYTES:body_end]), bytearray(data[body_end:]), len(data))
        incoming = self.incoming = self.incoming or _Incoming()
        if len(incoming.prefix) < PREFIX_BYTES:
            missing = PREFIX_BYTES - len(incoming.prefix)
            incoming.prefix += data[:missing]
            data = data[missing:]
            if len(incoming.prefix) < PREFIX_BYTES:
                return None
            incoming.body_bytes, incoming.payload_bytes = self._sizes(incoming.prefix)
        missing = incoming.body_bytes - len(incoming.body)
        if missing:
            incoming.body += data[:missing]
            data = data[missing:]
        if len(incoming.payload) + len(data) > incoming.payload_bytes:
            raise ProtocolViolation("a message is longer than it said")
        incoming.payload += data
        if len(incoming.body) < incoming.body_bytes or len(incoming.payload) < incoming.payload_bytes:
            return None
        self.incoming = None
        return Received(bytes(incoming.body), incoming.payload, incoming.gathered_bytes)

    def _sizes(self, prefix: memoryview | bytearray) -> tuple[int, int]:
        body_bytes, payload_bytes = parse_prefix(prefix)
        limits = self.limits
        if body_bytes > limits.body_bytes_max or payload_bytes > limits.payload_bytes_max:
            raise ProtocolViolation(
                f"{self.method}: a message of {body_bytes} and {payload_bytes} bytes, where at most "
                f"{limits.body_bytes_max} and {limits.payload_bytes_max} are allowed"
            )
        return body_bytes, payload_bytes

    def grant_due(self) -> int:
        """How much more the peer may be let send now: 0, or a large step.

        A message that is arriving does not fill the window, so that one larger than the window gets through; whole
        ones that wait to be taken do.
        """
        if self.over or self.peer_ended:
            return 0
        due = self.window_bytes - self.queued_bytes - self.allowance_bytes
        return due if due > 0 and due * 2 >= self.window_bytes else 0

    def imbalances(self) -> list[str]:
        """Names of the books that do not balance; for tests."""
        partial = 0 if self.incoming is None else self.incoming.gathered_bytes
        checks = {
            "queued": self.queued_bytes == sum(one.wire_bytes for one in self.inbox),
            "held": self.held_bytes == self.queued_bytes + partial,
            "outbox": self.outbox_bytes == sum(one.left_bytes for one in self.outbox),
            "parts": all(sum(map(len, one.parts)) == one.left_bytes for one in self.outbox),
            "allowance": self.allowance_bytes >= 0,
            "window": self.allowance_bytes <= max(self.window_bytes, REQUEST_WINDOW_BYTES),
            "turn": self.in_turn or not self.sendable,
            "over": not self.over,
        }
        return [name for name, holds in checks.items() if not holds]
