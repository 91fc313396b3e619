"""The state of all calls on one stream: bytes in, changed calls out, and frames to write. No I/O, no clock.

Knows call ids, messages and their limits, credit in both directions, fairness between calls, and which end did what.
One side opens calls (the caller), the other serves them. It does not know dataclasses, tasks or peers; what is wrong
with the peer's bytes is a ProtocolViolation, after which the stream must be reset.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from p2p import frames
from p2p.errors import LocalFault, P2pError, ProtocolViolation, ResourceLimit
from p2p.frames import HEADER_BYTES, FrameParser, Refusal
from p2p.rpc_state import REQUEST_WINDOW_BYTES, CallerLeft, CallState, MessageLimits, Received

_CREDIT_BYTES_MAX = 1 << 40


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
    frame_deadline_s: float = 30.0


@dataclass(slots=True)
class Fed:
    """What some bytes changed: `begun` calls have their request, `changed` ones are worth another look; `read_bytes`
    were acted on."""

    begun: list[CallState] = field(default_factory=list)
    changed: dict[CallState, None] = field(default_factory=dict)
    pongs: list[int] = field(default_factory=list)
    opened: list[CallState] = field(default_factory=list)
    read_bytes: int = 0


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
        self._frame_since = math.inf
        self._frame_number = 0

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
        copied = call.queue(body, payload, payload_bytes, self.limits.copy_bytes_max)
        self._schedule(call)
        return copied

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
            call.drop_outbox()
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
        if not call.in_turn and call.sendable:
            call.in_turn = True
            self._turns.append(call)

    def _take_frame(self, call: CallState, parts: list[bytes | memoryview]) -> int:
        """One frame of a call's; returns its size."""
        if not call.outbox:
            return self._take_end(call, parts)
        length, end = call.cut_frame(self.limits.piece_bytes_max, parts)
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

    def feed(self, data: bytes | memoryview, now: float, events_max: int = 1 << 30) -> Fed:
        """Act on what came, on no more than so many frames of it. Raises ProtocolViolation."""
        fed = Fed()
        events, fed.read_bytes = self._parser.feed_some(data, events_max)
        self._time_frame(now)
        for event in events:
            match event:
                case frames.Piece():
                    self._on_piece(event, fed)
                case frames.Open() if self._serves:
                    self._on_open(event, now, fed)
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
        for call in fed.opened:  # only now: a request that came whole needs no credit
            self._grant(call)
        if len(self._control) > self.limits.control_frames_max:
            raise ProtocolViolation("the peer asks for more answers than it reads")
        return fed

    def _time_frame(self, now: float) -> None:
        """Remember since when the frame that is arriving has been; its pieces do not count as progress."""
        if not self._parser.in_frame:
            self._frame_since = math.inf
        elif self._frame_since == math.inf or self._parser.begun != self._frame_number:
            self._frame_since = now
        self._frame_number = self._parser.begun

    def check_pace(self, now: float) -> None:
        """Raises ProtocolViolation where a frame takes too long to arrive: nothing waits for a slow sender."""
        if now - self._frame_since > self.limits.frame_deadline_s:
            raise ProtocolViolation(f"a frame was not whole after {self.limits.frame_deadline_s:g} s")

    def _find(self, call_id: int) -> CallState | None:
        """None for a call that is over here while the peer did not know it yet."""
        if call_id > self._last_id:
            raise ProtocolViolation(f"call {call_id} was never opened")
        return self.calls.get(call_id)

    def _on_open(self, event: frames.Open, now: float, fed: Fed) -> None:
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
        fed.opened.append(call)

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
            received = call.gather(piece)
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

    # ---- bookkeeping

    def _hold(self, call: CallState, change_bytes: int) -> None:
        call.held_bytes += change_bytes
        self._budget.used_bytes += change_bytes

    def _grant(self, call: CallState) -> None:
        due = call.grant_due()
        if due:
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
        call.drop_outbox()
        self.calls.pop(call.id, None)

    def validate(self) -> None:
        """Raises LocalFault where the books do not balance; for tests, after every event."""
        for call in self.calls.values():
            broken = call.imbalances()
            if call.in_turn != (call in self._turns):
                broken.append("turns")
            if broken:
                raise LocalFault(f"call {call.id}: {', '.join(broken)} out of balance")
        if self._budget.used_bytes < 0:
            raise LocalFault("a budget below zero")
