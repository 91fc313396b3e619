"""Calls between peers: unary ones and channels, over a few long-lived streams a peer.

Knows methods and their handlers, which lanes a peer has (one a direction and kind of traffic), heartbeats, and what
becomes of a handler's exception. It does not know frames or credit (`rpc_core`), nor how streams are made (`host`).
Calls to our own peer id go through a pipe in this process, with the same rules.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import outcome
import trio

from p2p.errors import (
    DeadlineExceeded,
    LocalFault,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
    ResourceLimit,
)
from p2p.frames import DEADLINE_S_MAX, Refusal
from p2p.host import ByteStream, PeerEvent
from p2p.identity import PeerId
from p2p.messages import codec_of
from p2p.pipe import PipeStream, stream_pair
from p2p.rpc_core import Budget, CoreLimits, Fed, LaneCore
from p2p.rpc_lane import Channel, Lane, Port, decode_or_fail
from p2p.rpc_serve import Served, answer
from p2p.rpc_state import REQUEST_WINDOW_BYTES, CallState, MessageLimits
from p2p.rpc_types import LANES, Call, LaneName, Method, RpcConfig

logger = logging.getLogger(__name__)

Q = TypeVar("Q")
A = TypeVar("A")

_PROTOCOL = {lane: f"rpc/1/{lane}" for lane in LANES}
_STALL_S = 0.25
_RTT_WEIGHT = 0.125
_RATE_WEIGHT = 0.3
_RATE_SAMPLE_BYTES = 1 << 20
_RATE_IDLE_S = 0.1
_ALARM_EVERY_S = 0.005
_IDLE_TASKS_MAX = 16


class RpcHost(Protocol):
    """What Rpc needs of a host; `p2p.Host` and `p2p.testing.MemoryHost` both are one."""

    @property
    def peer_id(self) -> PeerId: ...
    def peers(self) -> tuple[PeerId, ...]: ...
    def is_connected(self, peer: str) -> bool: ...
    async def disconnect(self, peer: str) -> None: ...
    async def open_stream(
        self, peer: str, protocol: str, *, deadline_s: float | None = None
    ) -> ByteStream: ...
    def handle(self, protocol: str, handler: Callable[[Any], Awaitable[None]]) -> None: ...
    def watch(self) -> AbstractContextManager[trio.MemoryReceiveChannel[PeerEvent]]: ...


@dataclass(eq=False, slots=True)
class _Rate:
    """Bytes a second of the transfers that came without a pause."""

    bytes_per_s: float | None = None
    sampled_bytes: int = 0
    began_s: float = -math.inf
    last_s: float = -math.inf

    def add(self, count: int, now: float) -> None:
        if now - self.last_s > _RATE_IDLE_S:
            self.began_s, self.sampled_bytes = now, -count
        self.last_s = now
        self.sampled_bytes += count
        took_s = now - self.began_s
        if self.sampled_bytes >= _RATE_SAMPLE_BYTES and took_s > 0:
            rate = self.sampled_bytes / took_s
            old = self.bytes_per_s
            self.bytes_per_s = rate if old is None else old + _RATE_WEIGHT * (rate - old)
            self.began_s, self.sampled_bytes = now, 0


@dataclass(eq=False, slots=True)
class _Link:
    """What Rpc keeps of one connected peer."""

    peer: PeerId
    budget: Budget
    heard_s: float
    out: dict[LaneName, Lane] = field(default_factory=dict)
    inbound: set[Lane] = field(default_factory=set)
    retiring: set[Lane] = field(default_factory=set)
    rtt_s: float | None = None
    rate: _Rate = field(default_factory=_Rate)
    pings: dict[int, float] = field(default_factory=dict)

    def lanes(self) -> Iterator[Lane]:
        yield from self.out.values()
        yield from self.inbound
        yield from self.retiring


class Rpc:
    """One a host. `serve` and `serve_channel` before or after `run`; calls only while `run` runs."""

    def __init__(self, host: RpcHost, config: RpcConfig | None = None) -> None:
        self.host = host
        self.config = config or RpcConfig()
        self.faults: Counter[PeerId] = Counter()
        self._served: dict[str, Served] = {}
        self._links: dict[PeerId, _Link] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._next_token = 1
        self._alarm = trio.CancelScope()
        for lane in LANES:
            host.handle(_PROTOCOL[lane], self._acceptor(lane))

    # ---- serving

    def serve(self, method: Method[Q, A], handler: Callable[[Call, Q], Awaitable[A]]) -> None:
        """Answer calls of `method` with what `handler` returns.

        A RpcRefusal goes to the caller with its code, a RemoteFault as `unavailable`, a ResourceLimit as `busy`;
        anything else is logged and goes as `internal`. The handler is cancelled when its caller leaves, is lost, or
        the deadline passes.
        """
        self._serve(method, handler, channel=False)

    def serve_channel(
        self, method: Method[Q, A], handler: Callable[[Call, Q, Channel[Any, A]], Awaitable[None]]
    ) -> None:
        """As `serve`, with many messages each way; the handler's return is the clean end."""
        self._serve(method, handler, channel=True)

    def _serve(
        self, method: Method[Any, Any], handler: Callable[..., Awaitable[Any]], *, channel: bool
    ) -> None:
        if method.name in self._served:
            raise LocalFault(f"method {method.name!r} is served already")
        self._served[method.name] = Served(method, handler, channel)

    # ---- calling

    async def call(
        self, peer: str, method: Method[Q, A], request: Q, *, deadline_s: float | None = None
    ) -> A:
        """The answer of `peer`. Raises PeerLost, CallFailed, DeadlineExceeded, ProtocolViolation (all RemoteFault),
        or LocalFault for a request beyond the method's limits."""
        lane = self._lane(PeerId(peer), method.lane)
        encoded = codec_of(method.request).encode(request)
        within_s = min(method.deadline_s if deadline_s is None else deadline_s, DEADLINE_S_MAX)
        deadline = trio.current_time() + within_s
        if len(lane.core.calls) >= self.config.calls_per_lane_max:
            lane = await self._room_on(lane, method, deadline)
        port = self._open(lane, method, deadline)
        try:
            port.queue(encoded, method.limits)
            lane.core.end(port.state)
            lane.flush()
            received = await port.get()
            if received is None:
                raise ProtocolViolation(f"{method.name}: {peer} ended the call without an answer")
            return decode_or_fail(port, codec_of(method.reply), received)
        finally:
            port.close()

    async def _room_on(self, lane: Lane, method: Method[Any, Any], deadline: float) -> Lane:
        """Wait for one of our own calls to end, rather than be told `busy`."""
        with trio.CancelScope(deadline=deadline):
            while len(lane.core.calls) >= self.config.calls_per_lane_max:
                await lane.room.park()
                if lane.failure is not None:
                    raise lane.failure.with_traceback(None)
            return lane
        raise DeadlineExceeded(f"{method.name}: too many calls to {lane.peer} are in flight")

    @asynccontextmanager
    async def open(
        self, peer: str, method: Method[Q, A], request: Q, *, deadline_s: float | None = None
    ) -> AsyncIterator[Channel[A, Any]]:
        """A channel to `peer`. Leaving the block cancels the remote handler. Raises as `call`, and ResourceLimit
        where too many channels are open; the remote's answers are raised by the channel's methods."""
        lane = self._lane(PeerId(peer), method.lane)
        if len(lane.core.calls) >= self.config.channels_per_lane_max:
            raise ResourceLimit(f"{len(lane.core.calls)} calls to {peer} are open")
        encoded = codec_of(method.request).encode(request)
        within_s = min(method.deadline_s if deadline_s is None else deadline_s, DEADLINE_S_MAX)
        port = self._open(lane, method, trio.current_time() + within_s)
        try:
            await port.put(encoded, method.limits)
            if method.upstream is None:
                lane.core.end(port.state)
                lane.flush()
            upstream = None if method.upstream is None else codec_of(method.upstream)
            yield Channel(port, codec_of(method.reply), upstream, method.limits)
        finally:
            port.close()

    def _open(self, lane: Lane, method: Method[Any, Any], deadline: float) -> Port:
        if lane.failure is not None:
            # It ended, and the connection's own end has not been noticed yet.
            raise lane.failure.with_traceback(None)
        within_s = max(deadline - trio.current_time(), 1e-3)
        window_bytes = self.config.lane_window_bytes(method.lane)
        return Port(lane, lane.core.open(method.name, deadline, within_s, method.limits, window_bytes))

    # ---- what is known of peers

    def rtt_s(self, peer: str) -> float | None:
        """Smoothed round trip of heartbeats, in seconds."""
        link = self._links.get(PeerId(peer))
        return None if link is None else link.rtt_s

    def bandwidth_bps(self, peer: str) -> float | None:
        """Smoothed bits per second of what came from `peer` in large transfers; None until there was one."""
        link = self._links.get(PeerId(peer))
        rate = None if link is None else link.rate.bytes_per_s
        return None if rate is None else rate * 8

    def calls_in_flight(self) -> int:
        """Calls that this node makes or serves now."""
        return sum(len(lane.core.calls) for link in self._links.values() for lane in link.lanes())

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the streams and heartbeats until cancelled; then every call raises PeerLost."""
        if self._nursery is not None:
            raise LocalFault("this Rpc is running already")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._watch)
                nursery.start_soon(self._heartbeats)
                nursery.start_soon(self._deadlines)
                self._running.set()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._running = trio.Event()
            for link in list(self._links.values()):
                self._drop(link, PeerLost(link.peer, "this node ends its calls"))

    async def _watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Links come and go with connections. A watch that fell behind starts anew from what is connected."""
        started = False
        while True:
            with self.host.watch() as events:
                self._reconcile()
                if not started:
                    started = True
                    task_status.started()
                async for event in events:
                    if event.kind == "up":
                        self._link(event.peer)
                    elif event.kind == "moved":
                        self._move(event.peer)
                    elif not self.host.is_connected(event.peer):
                        self._lost(event.peer, f"the connection to {event.peer} is gone")

    def _reconcile(self) -> None:
        connected = set(self.host.peers())
        for peer in [peer for peer in self._links if peer not in connected and peer != self.host.peer_id]:
            self._lost(peer, f"the connection to {peer} is gone")
        for peer in connected:
            self._link(peer)

    def _move(self, peer: PeerId) -> None:
        """Calls from now on take the better way; those that are under way end where they began."""
        link = self._links.get(peer)
        if link is not None:
            link.retiring |= set(link.out.values())
            link.out.clear()
            link.pings.clear()
            link.rtt_s = None
            self._out_lane(link, "small")

    def _lost(self, peer: PeerId, message: str) -> None:
        link = self._links.get(peer)
        if link is not None:
            self._drop(link, PeerLost(peer, message))

    def _drop(self, link: _Link, failure: PeerLost) -> None:
        self._links.pop(link.peer, None)
        for lane in list(link.lanes()):
            lane.fail(failure)

    # ---- deadlines: one alarm for all calls, since a timer of its own costs a call more than its frames

    def _on_deadline(self, deadline: float) -> None:
        if deadline < self._alarm.deadline:
            self._alarm.deadline = deadline

    async def _deadlines(self) -> None:
        while True:
            with self._alarm:
                await trio.sleep_forever()
            now = trio.current_time()
            lanes = [lane for link in self._links.values() for lane in link.lanes()]
            for lane in [lane for lane in lanes if lane.next_deadline <= now]:
                lane.pass_deadlines(now)
            due = min((lane.next_deadline for lane in lanes), default=math.inf)
            self._alarm = trio.CancelScope(deadline=max(due, now + _ALARM_EVERY_S))

    # ---- heartbeats

    async def _heartbeats(self) -> None:
        """Ask every peer each `ping_s`, and give up on one that has been silent for `silence_s`.

        Time during which this very loop did not run is nobody's silence.
        """
        while True:
            slept_from_s = trio.current_time()
            await trio.sleep(self.config.ping_s)
            now = trio.current_time()
            stalled_s = now - slept_from_s - self.config.ping_s
            for link in list(self._links.values()):
                if stalled_s > _STALL_S:
                    link.heard_s = min(now, link.heard_s + stalled_s)
                self._beat(link, now)

    def _beat(self, link: _Link, now: float) -> None:
        for lane in link.inbound:
            lane.core.expire(now)
            lane.flush()
        for lane in list(link.lanes()):
            lane.check_pace(now)
        if link.peer == self.host.peer_id:
            return
        for lane in [lane for lane in link.retiring if not lane.core.calls]:
            lane.fail(PeerLost(link.peer, "a better way took its place"))
        silent_s = now - link.heard_s
        if silent_s >= self.config.silence_s:
            logger.info("nothing came from %s for %.1f s; disconnecting", link.peer, silent_s)
            self._drop(link, PeerLost(link.peer, f"nothing came from {link.peer} for {silent_s:.1f} s"))
            self._started().start_soon(self.host.disconnect, link.peer)
        else:
            self._ping(link, now)

    def _ping(self, link: _Link, now: float) -> None:
        lane = self._out_lane(link, "small")
        if not lane.is_open:
            return
        token = self._next_token
        self._next_token += 1
        link.pings[token] = now
        for old in [old for old in link.pings if old <= token - 8 * max(1, len(self._links))]:
            del link.pings[old]
        lane.core.ping(token)
        lane.flush()

    def _on_heard(self, lane: Lane, fed: Fed, now: float) -> None:
        link = self._links.get(lane.peer)
        if link is None:
            return
        link.heard_s = now
        link.rate.add(fed.read_bytes, now)
        for token in fed.pongs:
            sent_s = link.pings.pop(token, None)
            if sent_s is not None:
                took_s = now - sent_s
                link.rtt_s = (
                    took_s if link.rtt_s is None else link.rtt_s + _RTT_WEIGHT * (took_s - link.rtt_s)
                )

    # ---- lanes

    def _started(self) -> trio.Nursery:
        if self._nursery is None:
            raise LocalFault("Rpc.run is not running")
        return self._nursery

    def _link(self, peer: PeerId) -> _Link:
        link = self._links.get(peer)
        if link is None:
            budget = Budget(self.config.unread_per_peer_bytes_max)
            link = self._links[peer] = _Link(peer, budget, trio.current_time())
            if peer != self.host.peer_id:
                self._out_lane(link, "small")
        return link

    def _lane(self, peer: PeerId, name: LaneName) -> Lane:
        """The lane for our calls to `peer`. Raises PeerLost where it is not connected."""
        self._started()
        if peer not in self._links and peer != self.host.peer_id and not self.host.is_connected(peer):
            raise PeerLost(peer, f"not connected to {peer}")
        return self._out_lane(self._link(peer), name)

    def _out_lane(self, link: _Link, name: LaneName) -> Lane:
        lane = link.out.get(name)
        if lane is None or lane.failure is not None:
            lane = link.out[name] = self._new_lane(link, name, serves=False)
            self._started().start_soon(self._run_out, link, lane)
        return lane

    def _new_lane(self, link: _Link, name: LaneName, *, serves: bool) -> Lane:
        limits = CoreLimits(
            calls_max=self.config.calls_per_lane_max,
            piece_bytes_max=self.config.lane_piece_bytes(name),
            frame_deadline_s=self.config.frame_deadline_s,
        )
        core = LaneCore(serves=serves, limits=limits, budget=link.budget, lookup=self._lookup)
        return Lane(
            link.peer, name, core, self._on_begun, self._on_heard, self._on_fault, self._on_deadline,
        )  # fmt: skip

    async def _run_out(self, link: _Link, lane: Lane) -> None:
        try:
            stream = await self._stream_to(link, lane)
            lane.is_open = True
            if lane.failure is None and lane.name == "small" and link.peer != self.host.peer_id:
                link.heard_s = trio.current_time()
                self._ping(link, link.heard_s)
            await lane.run(stream)
        except ProtocolViolation as failure:
            # It answered, though it serves no calls (yet): alive, and asked again with the next ping.
            link.heard_s = trio.current_time()
            lane.fail(PeerLost(link.peer, f"{link.peer} serves no calls: {failure}"))
        except RemoteFault as failure:
            lane.fail(failure)
        except Exception:  # what a peer sends must never end more than its stream
            logger.exception("the stream of calls to %s failed here", link.peer)
        finally:
            lane.fail(PeerLost(link.peer, f"the stream of calls to {link.peer} has ended"))
            link.retiring.discard(lane)
            if link.out.get(lane.name) is lane:
                del link.out[lane.name]

    async def _stream_to(self, link: _Link, lane: Lane) -> ByteStream:
        if link.peer != self.host.peer_id:
            return await self.host.open_stream(link.peer, _PROTOCOL[lane.name])
        near, far = stream_pair(link.peer)
        self._started().start_soon(self._serve_ourselves, lane.name, far)
        return near

    async def _serve_ourselves(self, name: LaneName, stream: PipeStream) -> None:
        try:
            await self._run_in(name, stream)
        except RemoteFault as fault:
            logger.warning("a stream of our own calls was refused: %s", fault)
            stream.reset()

    def _acceptor(self, name: LaneName) -> Callable[[ByteStream], Awaitable[None]]:
        async def accept(stream: ByteStream) -> None:
            await self._run_in(name, stream)

        return accept

    async def _run_in(self, name: LaneName, stream: ByteStream) -> None:
        """Serve one stream of a peer's calls, from the moment that `run` runs."""
        await self._running.wait()
        link = self._link(stream.peer)
        if len(link.inbound) >= self.config.inbound_lanes_per_peer_max:
            raise ProtocolViolation(f"{stream.peer} opens more than {len(link.inbound)} streams of calls")
        lane = self._new_lane(link, name, serves=True)
        link.inbound.add(lane)
        try:
            await lane.run(stream)
        finally:
            link.inbound.discard(lane)

    def _on_fault(self, peer: PeerId, violation: ProtocolViolation) -> None:
        logger.warning("a stream of calls with %s was reset: %s", peer, violation)
        self.faults[peer] += 1
        if len(self.faults) > self.config.peers_remembered_max:
            del self.faults[min(self.faults, key=self.faults.__getitem__)]

    # ---- handlers

    def _lookup(self, name: str) -> tuple[MessageLimits, int] | None:
        served = self._served.get(name)
        if served is None:
            return None
        method = served.method
        large = method.upstream is not None or method.payload_bytes_max > REQUEST_WINDOW_BYTES
        window_bytes = self.config.lane_window_bytes(method.lane) if large else REQUEST_WINDOW_BYTES
        return method.limits, window_bytes

    def _on_begun(self, lane: Lane, state: CallState) -> None:
        if lane.idle:
            trio.lowlevel.reschedule(lane.idle.pop(), outcome.Value(state))
        elif lane.nursery is not None:
            lane.nursery.start_soon(self._serve_calls, lane, state)

    async def _serve_calls(self, lane: Lane, first: CallState) -> None:
        """One call, and then others that come while few such tasks are idle: a new one a call costs more than that.

        A call is cancelled at its deadline and when its caller leaves; then the scope is another one.
        """
        state: CallState | None = first
        while True:
            with trio.CancelScope() as scope:
                while not scope.cancel_called:
                    if state is None:
                        if len(lane.idle) >= _IDLE_TASKS_MAX:
                            return
                        state = await lane.next_begun()
                    port = Port(lane, state)
                    refusal: Refusal | None = None
                    if not state.over:
                        port.scope = scope
                        refusal = await answer(self._served[state.method], port)
                        port.scope = None
                    self._answered(lane, state, refusal)
                    state = None
            if state is not None:
                self._answered(lane, state, Refusal("deadline", "the handler took too long"), at_once=True)
                state = None

    def _answered(
        self, lane: Lane, state: CallState, refusal: Refusal | None, *, at_once: bool = False
    ) -> None:
        state.owner = None
        if refusal is None:
            lane.core.end(state)
        else:
            lane.core.refuse(state, refusal, at_once=at_once)
        lane.flush()


__all__ = ["Rpc", "RpcHost"]
