"""One stream of calls as tasks see it: a reader, a writer, and ports on which calls wait.

The trio shell around `rpc_core.LaneCore`. It knows how bytes get in and out, how waiting tasks wake and how a stream
ends; it does not know methods' handlers, heartbeats or which lanes a peer has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

import trio

from p2p.errors import (
    CallFailed,
    DeadlineExceeded,
    EndOfChannel,
    LocalFault,
    P2pError,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
)
from p2p.host import ByteStream
from p2p.identity import PeerId
from p2p.messages import Codec, Encoded
from p2p.rpc_core import Fed, LaneCore
from p2p.rpc_state import CallerLeft, CallState, MessageLimits, Received
from p2p.rpc_types import LaneName

logger = logging.getLogger(__name__)

R = TypeVar("R")
S = TypeVar("S")

# A sender goes on without waiting for the writer while its call has no more than this queued.
_QUEUE_BYTES_MAX = 128 << 10
_BATCH_BYTES = 64 << 10
_TURN_FRAMES = 6
_TURN_BYTES = 128 << 10


class Lane:
    """`on_begun` starts a served call, `on_heard` learns what came."""

    def __init__(
        self,
        peer: PeerId,
        name: LaneName,
        core: LaneCore,
        on_begun: Callable[[Lane, CallState], None],
        on_heard: Callable[[Lane, Fed, float], None],
        on_fault: Callable[[PeerId, ProtocolViolation], None],
        on_deadline: Callable[[float], None],
    ) -> None:
        self.peer = peer
        self.name = name
        self.core = core
        self.failure: P2pError | None = None
        self.room = trio.lowlevel.ParkingLot()
        self.nursery: trio.Nursery | None = None
        self.is_open = False
        self.idle: list[trio.lowlevel.Task] = []
        # No call's deadline is before this; of those that have ended in time it may be one.
        self.next_deadline = math.inf
        self._stream: ByteStream | None = None
        # Set while the writer has something to send: nobody else may write then.
        self._stuck: bytes | None = None
        self._work = trio.lowlevel.ParkingLot()
        self._on_begun = on_begun
        self._on_heard = on_heard
        self._on_fault = on_fault
        self._on_deadline = on_deadline

    async def run(self, stream: ByteStream) -> None:
        """Until the stream ends or `fail` is called. Never raises for what the peer does."""
        clean = False
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                if self.failure is None:
                    self._stream = stream
                    nursery.start_soon(self._write, stream)
                    self.flush()
                    await self._read(stream)
                clean = self.failure is None
                nursery.cancel_scope.cancel()
        finally:
            self.nursery = None
            self._stream = None
            self.fail(PeerLost(self.peer, f"the stream of calls with {self.peer} has ended"))
            if not clean:
                stream.reset()
        if clean:
            await stream.aclose()

    def fail(self, failure: P2pError) -> None:
        """End the lane: every call on it raises `failure`. The first failure counts."""
        if self.failure is None:
            self.failure = failure
            if isinstance(failure, ProtocolViolation):
                self._on_fault(self.peer, failure)
            for call in self.core.fail_all(failure):
                self._wake(call)
            self.room.unpark_all()
            if self.nursery is not None:
                self.nursery.cancel_scope.cancel()

    def flush(self) -> None:
        """Write what can be written at once, and leave the rest to the writer; to be called after whatever may have
        queued frames. Saves two turns of the scheduler on the way of every small message."""
        core = self.core
        while core.wants_write and self._stream is not None and self._stuck is None:
            data = self._next_batch()
            if not self._stream.send_nowait(data):
                self._stuck = data
                self._work.unpark_all()

    def _next_batch(self) -> bytes:
        core = self.core
        parts = core.next_batch(_BATCH_BYTES)
        for call in core.drained:
            self._wake(call)
        core.drained.clear()
        return b"".join(parts)

    def make_room(self) -> None:
        """Let as many waiting callers open calls as have ended."""
        if self.room:
            self.room.unpark(count=max(0, self.core.limits.calls_max - len(self.core.calls)))

    async def next_begun(self) -> CallState:
        """Be one of the idle tasks, of which the last one is given the next call to serve."""
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            if task in self.idle:
                self.idle.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED
            return trio.lowlevel.Abort.FAILED  # it has a call already

        self.idle.append(task)
        state: CallState = await trio.lowlevel.wait_task_rescheduled(abort)
        return state

    def await_deadline(self, deadline: float) -> None:
        """Have `pass_deadlines` called then."""
        if deadline < self.next_deadline:
            self.next_deadline = deadline
            self._on_deadline(deadline)

    def pass_deadlines(self, now: float) -> None:
        """Tell the ports whose calls have run out of time."""
        self.next_deadline = math.inf
        for call in list(self.core.calls.values()):
            if call.deadline > now:
                self.next_deadline = min(self.next_deadline, call.deadline)
            elif isinstance(call.owner, Port) and not call.owner.late:
                call.owner.late = True
                call.owner.lot.unpark_all()
                if call.owner.scope is not None:
                    call.owner.scope.cancel()

    def check_pace(self, now: float) -> None:
        """Give the stream up where its sender is slower than any path."""
        try:
            self.core.check_pace(now)
        except ProtocolViolation as violation:
            self.fail(violation)

    def _wake(self, call: CallState) -> None:
        port: Port | None = call.owner
        if port is not None:
            port.lot.unpark_all()
            if call.over and port.scope is not None:
                port.scope.cancel()

    async def _read(self, stream: ByteStream) -> None:
        """What comes is acted on where it arrives, as long as it is little. Of more, a few frames are taken in a turn:
        nobody shall wait for all that one peer has to say."""
        try:
            while self.failure is None:
                stream.feed_to(self._take)
                data = await stream.receive_some(_TURN_BYTES)
                if not data:
                    return
                view = memoryview(data)
                while view and self.failure is None:
                    view = view[self._take(view) :]
                    if view:
                        await trio.lowlevel.checkpoint()
        except RemoteFault as failure:
            self.fail(failure)

    def _take(self, data: bytes | memoryview) -> int:
        """Act on the first frames of what came; how many bytes they were."""
        if self.failure is not None:
            return len(data)
        core = self.core
        try:
            now = trio.current_time()
            fed = core.feed(data, now, _TURN_FRAMES)
        except RemoteFault as failure:
            self.fail(failure)
            return len(data)
        for call in fed.begun:
            self._on_begun(self, call)
        for call in fed.changed:
            self._wake(call)
        self._on_heard(self, fed, now)
        self.make_room()
        self.flush()
        return fed.read_bytes

    async def _write(self, stream: ByteStream) -> None:
        """What did not fit at once, and all that is queued meanwhile."""
        try:
            while True:
                if self._stuck is None:
                    await self._work.park()
                else:
                    await stream.send_all(self._stuck)
                    self._stuck = self._next_batch() or None
        except RemoteFault as failure:
            self.fail(failure)


class Port:
    """One call's end of a lane. Any of its waits raises DeadlineExceeded when the call's deadline passes."""

    __slots__ = ("lane", "late", "lot", "scope", "state")

    def __init__(self, lane: Lane, state: CallState) -> None:
        self.lane = lane
        self.state = state
        self.lot = trio.lowlevel.ParkingLot()
        self.scope: trio.CancelScope | None = None
        self.late = False
        state.owner = self
        lane.await_deadline(state.deadline)

    def close(self) -> None:
        """The caller leaves: the other side is told, unless it has ended."""
        self.lane.core.cancel(self.state)
        self.state.owner = None
        self.lane.make_room()
        self.lane.flush()

    def queue(self, encoded: Encoded, limits: MessageLimits) -> bool:
        """Queue a message without waiting; True once its memory is the caller's again."""
        if len(encoded.body) > limits.body_bytes_max or encoded.payload_bytes > limits.payload_bytes_max:
            raise LocalFault(
                f"{self.state.method}: a message of {len(encoded.body)} and {encoded.payload_bytes} bytes, where at "
                f"most {limits.body_bytes_max} and {limits.payload_bytes_max} are allowed"
            )
        return self.lane.core.send(self.state, encoded.body, encoded.payload, encoded.payload_bytes)

    async def put(self, encoded: Encoded, limits: MessageLimits) -> None:
        """Send a message; returns when it is queued, and for larger ones when it has been written."""
        state = self.state
        if state.over:
            raise self._why_over() or EndOfChannel(f"{state.method}: {self.lane.peer} has ended")
        if state.end_wanted:
            raise LocalFault(f"{state.method}: this side has ended already")
        copied = self.queue(encoded, limits)
        self.lane.flush()
        if copied and state.outbox_bytes <= _QUEUE_BYTES_MAX:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        try:
            while state.outbox:
                await self._wait()
        finally:
            if state.outbox:
                state.detach()
        failure = self._why_over()
        if failure is not None:
            raise failure

    async def get(self) -> Received | None:
        """The next message; None at the clean end."""
        state = self.state
        if state.inbox:
            await trio.lowlevel.checkpoint()
        while True:
            received = self.lane.core.take(state)
            if received is not None:
                self.lane.flush()
                return received
            if state.over or state.peer_ended:
                failure = self._why_over()
                if failure is not None:
                    raise failure
                return None
            await self._wait()

    async def _wait(self) -> None:
        if self.late:
            raise DeadlineExceeded(
                f"{self.state.method}: {self.lane.peer} did not answer before the deadline"
            )
        await self.lot.park()

    def _why_over(self) -> P2pError | None:
        """The error that ended the call, if one did."""
        state = self.state
        refused = state.refused
        if refused is not None:
            if refused.code == "deadline":
                return DeadlineExceeded(f"{state.method}: {self.lane.peer} gave up: {refused.message}")
            return CallFailed(
                refused.code, refused.message, self.lane.peer, refused.retry_after_s, refused.detail
            )
        if isinstance(state.failure, P2pError):
            return state.failure.with_traceback(None)
        if state.failure is not None:
            return PeerLost(self.lane.peer, f"{state.method}: the caller left")
        return None


class Channel(Generic[R, S]):
    """A call with many messages: `R` comes, `S` goes. One task may send while another receives."""

    __slots__ = ("_incoming", "_limits", "_outgoing", "_port", "peer")

    def __init__(
        self, port: Port, incoming: Codec[R] | None, outgoing: Codec[S] | None, limits: MessageLimits
    ) -> None:
        self.peer = port.lane.peer
        self._port = port
        self._incoming = incoming
        self._outgoing = outgoing
        self._limits = limits

    @property
    def left(self) -> bool:
        """Whether the caller left by itself, as against a connection that was lost."""
        return isinstance(self._port.state.failure, CallerLeft)

    @property
    def lost(self) -> bool:
        """Whether the connection below was lost."""
        return isinstance(self._port.state.failure, P2pError)

    async def send(self, message: S) -> None:
        """Send `message`, waiting while the other side does not take it.

        Small messages are copied; larger ones are written (or copied, if this is cancelled) when it returns, so their
        memory may be changed then. Raises what ended the call, EndOfChannel where it ended cleanly, LocalFault for a
        message beyond the method's limits.
        """
        if self._outgoing is None:
            raise LocalFault(f"{self._port.state.method} has no messages in this direction")
        await self._port.put(self._outgoing.encode(message), self._limits)

    async def receive(self) -> R:
        """The next message. Raises EndOfChannel at the clean end, else CallFailed, PeerLost, DeadlineExceeded or
        ProtocolViolation."""
        received = await self._port.get()
        if received is None or self._incoming is None:
            raise EndOfChannel(f"{self._port.state.method}: {self.peer} has ended")
        return decode_or_fail(self._port, self._incoming, received)

    async def end(self) -> None:
        """Say that nothing more will be sent; the other side's `receive` then raises EndOfChannel."""
        self._port.lane.core.end(self._port.state)
        self._port.lane.flush()
        await trio.lowlevel.checkpoint_if_cancelled()

    def __aiter__(self) -> AsyncIterator[R]:
        return self

    async def __anext__(self) -> R:
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None


def decode_or_fail(port: Port, codec: Codec[R], received: Received) -> R:
    """Bytes that are no message are garbage on the stream: the lane ends with them."""
    try:
        return codec.decode(received.body, received.payload)
    except ProtocolViolation as violation:
        port.lane.fail(violation)
        raise
