"""The state of all calls on one stream: bytes in, changed calls out, and frames to write. No I/O, no clock.

Knows call ids, messages and their limits, credit in both directions, fairness between calls, and which end did what.
One side opens calls (the caller), the other serves them. It does not know dataclasses, tasks or peers; what is wrong
with the peer's bytes is a ProtocolViolation, after which the stream must be reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from p2p import frames
from p2p.errors import LocalFault, P2pError, ProtocolViolation, ResourceLimit
from p2p.frames import HEADER_BYTES, PREFIX_BYTES, FrameParser, Refusal

# What a callee may be sent before it has granted anything: a constant of the protocol.
REQUEST_WINDOW_BYTES = 256 << 10
_CREDIT_BYTES_MAX = 1 << 40


class MessageLimits(NamedTuple):
    """The most that one message may measure, body and payload apart."""

    body_bytes_max: int
    payload_bytes_max: int


class Received(NamedTuple):
    """A whole message as it came; both are memory of its own. `wire_bytes` is what it counts against windows."""

    body: bytes
    payload: bytearray
    wire_bytes: int


@dataclass(slots=True)
class Budget:
    """What one peer makes this node hold unread, over all its streams."""

    bytes_max: int
    used_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """`calls_max` served at one time on a stream; `piece_bytes_max` a frame of ours; up to `copy_bytes_max` a message
    is copied when sent."""

    calls_max: int = 2048
    piece_bytes_max: int = 64 << 10
    copy_bytes_max: int = 64 << 10
    control_frames_max: int = 8192
    busy_retry_after_s: float = 0.5


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


@dataclass(eq=False, slots=True)
class CallState:
    """One call at one end.

    `begun`: its request has come (or was sent). `over`: nothing more will be sent or come; then `failure` or `refused`
    says why, unless it ended cleanly. `peer_ended`: what is in `inbox` is the last. The inbox outlives the call.
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


@dataclass(slots=True)
class Fed:
    """What some bytes changed: `begun` calls have their request, `changed` ones are worth another look."""

    begun: list[CallState] = field(default_factory=list)
    changed: dict[CallState, None] = field(default_factory=dict)
    pongs: list[int] = field(default_factory=list)


Lookup = Callable[[str], tuple[MessageLimits, int] | None]


class LaneCore:
    """One end of one stream: the callee's if `serves`. `lookup` gives a served method's limits for what callers send
    and the window (bytes) for it; None means that it is not served here."""

    def __init__(self, *, serves: bool, limits: CoreLimits, budget: Budget, lookup: Lookup) -> None:
        self.limits = limits
        self.calls: dict[int, CallState] = {}
        self.drained: list[CallState] = []
        self._serves = serves
        self._budget = budget
        self._lookup = lookup
        self._parser = FrameParser()
        self._last_id = 0
        self._control: deque[bytes] = deque()
        self._turns: deque[CallState] = deque()
        self._dead = False

    @property
    def wants_write(self) -> bool:
        return bool(self._control or self._turns)

    # ---- what this end does

    def open(
        self, method: str, deadline: float, deadline_s: float, limits: MessageLimits, window_bytes: int
    ) -> CallState:
        """A new call; its request is the first `send`. `deadline` is by this node's clock, `deadline_s` from now."""
        if self._serves or self._dead or self._last_id >= frames.CALL_ID_MAX:
            raise LocalFault("no call can be opened on this stream")
        self._last_id += 1
        call = CallState(
            id=self._last_id,
            method=method,
            limits=limits,
            deadline=deadline,
            send_credit_bytes=REQUEST_WINDOW_BYTES,
            window_bytes=window_bytes,
            allowance_bytes=window_bytes,
            begun=True,
        )
        self.calls[call.id] = call
        self._control.append(frames.pack_open(call.id, method, deadline_s, window_bytes))
        return call

    def send(
        self, call: CallState, body: bytes, payload: list[bytes | memoryview], payload_bytes: int
    ) -> bool:
        """Queue a message. False where `payload` is referred to, not copied, until `call.outbox` is empty."""
        if call.over or call.end_wanted:
            return True
        left = PREFIX_BYTES + len(body) + payload_bytes
        prefix = frames.pack_prefix(len(body), payload_bytes)
        copied = left <= self.limits.copy_bytes_max
        parts: list[memoryview | bytes] = [prefix, body, *payload]
        call.outbox.append(_Outgoing(deque((b"".join(parts),) if copied else parts), left))
        call.outbox_bytes += left
        self._schedule(call)
        return copied

    def detach(self, call: CallState) -> None:
        """Copy what `send` referred to, so that its owner may have it back before it is sent."""
        for message in call.outbox:
            message.parts = deque(bytes(part) for part in message.parts)

    def end(self, call: CallState) -> None:
        """Say that nothing more will be sent; at the callee that ends the call cleanly."""
        if not call.over and not call.end_wanted:
            call.end_wanted = True
            self._schedule(call)

    def refuse(self, call: CallState, refusal: Refusal, *, at_once: bool = False) -> None:
        """The callee's failure, after the messages queued before it, or `at_once` instead of them."""
        if call.over or call.refusal is not None:
            return
        if at_once:
            call.outbox.clear()
            call.outbox_bytes = 0
        call.refusal = refusal
        call.end_wanted = True
        self._schedule(call)

    def cancel(self, call: CallState) -> None:
        """The caller leaves: forget the call, and tell the callee unless it has ended already."""
        if not call.over:
            self._control.append(frames.pack_cancel(call.id))
            self._finish(call, None)
        self.release(call)

    def take(self, call: CallState) -> Received | None:
        """The next whole message, if there is one; makes room for more."""
        if not call.inbox:
            return None
        received = call.inbox.popleft()
        call.queued_bytes -= received.wire_bytes
        self._hold(call, -received.wire_bytes)
        self._grant(call)
        return received

    def release(self, call: CallState) -> None:
        """Drop what came for a call that is over and whose owner takes no more."""
        call.inbox.clear()
        call.incoming = None
        call.queued_bytes = 0
        self._hold(call, -call.held_bytes)

    def ping(self, token: int) -> None:
        self._control.append(frames.pack_ping(token))

    def expire(self, now: float) -> None:
        """End served calls past their deadline that have no handler: not begun yet, or waiting to be taken."""
        for call in [call for call in self.calls.values() if now >= call.deadline]:
            if self._serves and (not call.begun or call.end_wanted):
                self._refuse_now(call, Refusal("deadline", "the deadline passed"))

    def fail_all(self, failure: P2pError) -> list[CallState]:
        """The stream is gone: every call is over. Returns those that were not."""
        self._dead = True
        calls = list(self.calls.values())
        for call in calls:
            self._finish(call, failure)
            if self._serves:
                self.release(call)
        self._control.clear()
        self._turns.clear()
        return calls

    # ---- frames out

    def next_batch(self, bytes_max: int) -> list[bytes | memoryview]:
        """Frames to write now: control first, then each call in turn, about `bytes_max` in all."""
        parts: list[bytes | memoryview] = list(self._control)
        self._control.clear()
        size = 0
        while self._turns and size < bytes_max:
            call = self._turns.popleft()
            call.in_turn = False
            if not call.over:
                size += self._take_frame(call, parts)
                self._schedule(call)
        return parts

    def _schedule(self, call: CallState) -> None:
        if call.in_turn or call.over or call.end_sent:
            return
        if call.send_credit_bytes > 0 if call.outbox else call.end_wanted:
            call.in_turn = True
            self._turns.append(call)

    def _take_frame(self, call: CallState, parts: list[bytes | memoryview]) -> int:
        """One frame of a call's; returns its size."""
        if not call.outbox:
            return self._take_end(call, parts)
        message = call.outbox[0]
        length = min(message.left_bytes, self.limits.piece_bytes_max, call.send_credit_bytes)
        done = length == message.left_bytes
        end = done and len(call.outbox) == 1 and call.end_wanted and call.refusal is None
        parts.append(frames.pack_data_header(call.id, length, first=not message.started, end=end))
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
        call.outbox_bytes -= length
        call.send_credit_bytes -= length
        if done:
            call.outbox.popleft()
            if not call.outbox:
                self.drained.append(call)
        if end:
            self._ended(call)
        return HEADER_BYTES + length

    def _take_end(self, call: CallState, parts: list[bytes | memoryview]) -> int:
        if call.refusal is not None:
            frame = frames.pack_refuse(call.id, call.refusal)
        else:
            frame = frames.pack_data_header(call.id, 0, first=False, end=True)
        parts.append(frame)
        self._ended(call)
        return len(frame)

    def _ended(self, call: CallState) -> None:
        """Our last frame is on its way."""
        if self._serves:
            self._finish(call, None)
            self.release(call)
        else:
            call.end_sent = True

    # ---- frames in

    def feed(self, data: bytes | memoryview, now: float) -> Fed:
        """Act on what came. Raises ProtocolViolation."""
        fed = Fed()
        for event in self._parser.feed(data):
            match event:
                case frames.Piece():
                    self._on_piece(event, fed)
                case frames.Open() if self._serves:
                    self._on_open(event, now)
                case frames.Credit():
                    self._on_credit(event, fed)
                case frames.Cancel() if self._serves:
                    call = self._find(event.call)
                    if call is not None:
                        self._finish(call, CallerLeft())
                        self.release(call)
                        fed.changed[call] = None
                case frames.Refuse() if not self._serves:
                    call = self._find(event.call)
                    if call is not None:
                        call.refused = event.refusal
                        self._finish(call, None)
                        fed.changed[call] = None
                case frames.Ping() if self._serves:
                    self._control.append(frames.pack_pong(event.token))
                case frames.Pong() if not self._serves:
                    fed.pongs.append(event.token)
                case _:
                    raise ProtocolViolation(f"a {type(event).__name__} frame from the wrong end")
        if len(self._control) > self.limits.control_frames_max:
            raise ProtocolViolation("the peer asks for more answers than it reads")
        return fed

    def _find(self, call_id: int) -> CallState | None:
        """None for a call that is over here while the peer did not know it yet."""
        if call_id > self._last_id:
            raise ProtocolViolation(f"call {call_id} was never opened")
        return self.calls.get(call_id)

    def _on_open(self, event: frames.Open, now: float) -> None:
        if event.call <= self._last_id:
            raise ProtocolViolation(f"call {event.call} was opened after call {self._last_id}")
        self._last_id = event.call
        served = self._lookup(event.method)
        if served is None:
            refusal = Refusal("not_found", f"no method {event.method!r} is served here")
            self._control.append(frames.pack_refuse(event.call, refusal))
            return
        if len(self.calls) >= self.limits.calls_max:
            busy = f"{self.limits.calls_max} calls are in flight"
            self._control.append(
                frames.pack_refuse(event.call, Refusal("busy", busy, self.limits.busy_retry_after_s))
            )
            return
        limits, window_bytes = served
        call = CallState(
            id=event.call,
            method=event.method,
            limits=limits,
            deadline=now + event.deadline_s,
            send_credit_bytes=event.window_bytes,
            window_bytes=window_bytes,
            allowance_bytes=REQUEST_WINDOW_BYTES,
        )
        self.calls[call.id] = call
        self._grant(call)

    def _on_credit(self, event: frames.Credit, fed: Fed) -> None:
        call = self._find(event.call)
        if call is None:
            return
        call.send_credit_bytes += event.granted_bytes
        if call.send_credit_bytes > _CREDIT_BYTES_MAX or not event.granted_bytes:
            raise ProtocolViolation(f"credit of {event.granted_bytes} bytes")
        self._schedule(call)
        fed.changed[call] = None

    def _on_piece(self, piece: frames.Piece, fed: Fed) -> None:
        call = self._find(piece.call)
        if call is None:
            return
        size = len(piece.data)
        if call.peer_ended or size > call.allowance_bytes:
            raise ProtocolViolation(f"{size} bytes where {call.allowance_bytes} were granted")
        call.allowance_bytes -= size
        if size:
            self._hold(call, size)
            received = self._gather(call, piece)
            if received is not None:
                call.inbox.append(received)
                call.queued_bytes += received.wire_bytes
                if call.begun:
                    fed.changed[call] = None
                else:
                    call.begun = True
                    fed.begun.append(call)
        if piece.end:
            self._on_end(call, fed)
        elif self._budget.used_bytes > self._budget.bytes_max:
            self._overflow(call, fed)
        else:
            self._grant(call)

    def _on_end(self, call: CallState, fed: Fed) -> None:
        if call.incoming is not None or not call.begun:
            raise ProtocolViolation("a call ended within a message")
        call.peer_ended = True
        if not self._serves:
            self._finish(call, None)
        fed.changed[call] = None

    def _gather(self, call: CallState, piece: frames.Piece) -> Received | None:
        """Add a piece to the message that is arriving; the message, once it is whole."""
        data = piece.data
        if piece.first == (call.incoming is not None):
            raise ProtocolViolation("a message started within another, or went on after its end")
        if piece.first and len(data) >= PREFIX_BYTES:
            body_bytes, payload_bytes = self._sizes(call, data)
            body_end = PREFIX_BYTES + body_bytes
            if len(data) == body_end + payload_bytes:
                return Received(bytes(data[PREFIX_BYTES:body_end]), bytearray(data[body_end:]), len(data))
        incoming = call.incoming = call.incoming or _Incoming()
        if len(incoming.prefix) < PREFIX_BYTES:
            missing = PREFIX_BYTES - len(incoming.prefix)
            incoming.prefix += data[:missing]
            data = data[missing:]
            if len(incoming.prefix) < PREFIX_BYTES:
                return None
            incoming.body_bytes, incoming.payload_bytes = self._sizes(call, incoming.prefix)
        missing = incoming.body_bytes - len(incoming.body)
        if missing:
            incoming.body += data[:missing]
            data = data[missing:]
        incoming.payload += data
        if len(incoming.payload) > incoming.payload_bytes:
            raise ProtocolViolation("a message is longer than it said")
        if len(incoming.body) < incoming.body_bytes or len(incoming.payload) < incoming.payload_bytes:
            return None
        call.incoming = None
        wire_bytes = PREFIX_BYTES + incoming.body_bytes + incoming.payload_bytes
        return Received(bytes(incoming.body), incoming.payload, wire_bytes)

    def _sizes(self, call: CallState, prefix: memoryview | bytearray) -> tuple[int, int]:
        body_bytes, payload_bytes = frames.parse_prefix(prefix)
        limits = call.limits
        if body_bytes > limits.body_bytes_max or payload_bytes > limits.payload_bytes_max:
            raise ProtocolViolation(
                f"{call.method}: a message of {body_bytes} and {payload_bytes} bytes, where at most "
                f"{limits.body_bytes_max} and {limits.payload_bytes_max} are allowed"
            )
        return body_bytes, payload_bytes

    # ---- bookkeeping

    def _hold(self, call: CallState, change_bytes: int) -> None:
        call.held_bytes += change_bytes
        self._budget.used_bytes += change_bytes

    def _grant(self, call: CallState) -> None:
        """Top up what the peer may send, in large steps. A message that is arriving does not fill the window, so that
        one larger than the window gets through; whole ones that wait to be taken do."""
        if call.over or call.peer_ended:
            return
        due = call.window_bytes - call.queued_bytes - call.allowance_bytes
        if due > 0 and due * 2 >= call.window_bytes:
            call.allowance_bytes += due
            self._control.append(frames.pack_credit(call.id, due))

    def _overflow(self, call: CallState, fed: Fed) -> None:
        """The peer fills this node's memory: the call whose bytes came last has to go."""
        limit = ResourceLimit(
            "one peer's unread messages fill their share of memory", self.limits.busy_retry_after_s
        )
        if self._serves:
            self._refuse_now(call, Refusal("busy", str(limit), limit.retry_after_s))
        else:
            self._control.append(frames.pack_cancel(call.id))
            self._finish(call, limit)
            self.release(call)
        call.failure = limit
        fed.changed[call] = None

    def _refuse_now(self, call: CallState, refusal: Refusal) -> None:
        self._control.append(frames.pack_refuse(call.id, refusal))
        self._finish(call, None)
        self.release(call)

    def _finish(self, call: CallState, failure: P2pError | CallerLeft | None) -> None:
        call.over = True
        call.failure = call.failure or failure
        call.incoming = None
        call.outbox.clear()
        call.outbox_bytes = 0
        self.calls.pop(call.id, None)

    def validate(self) -> None:
        """Raises LocalFault where the books do not balance; for tests, after every event."""
        for call in self.calls.values():
            arriving = call.incoming
            partial = 0
            if arriving is not None:
                partial = len(arriving.prefix) + len(arriving.body) + len(arriving.payload)
            checks = {
                "queued": call.queued_bytes == sum(one.wire_bytes for one in call.inbox),
                "held": call.held_bytes == call.queued_bytes + partial,
                "outbox": call.outbox_bytes == sum(one.left_bytes for one in call.outbox),
                "parts": all(sum(map(len, one.parts)) == one.left_bytes for one in call.outbox),
                "allowance": call.allowance_bytes >= 0,
                "turn": call.in_turn == (call in self._turns),
                "over": not call.over,
            }
            broken = [name for name, holds in checks.items() if not holds]
            if broken:
                raise LocalFault(f"call {call.id}: {', '.join(broken)} out of balance")
        if self._budget.used_bytes < 0:
            raise LocalFault("a budget below zero")
