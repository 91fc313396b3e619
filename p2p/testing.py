"""An in-memory network with the face of `p2p.Host`, for tests without sockets and under a virtual clock.

Knows hosts, connections and byte streams between them, latency, backpressure, death and partition; what a
real connection does (half-close, reset, bytes held back while a link is silent, `down` for both ends) it does.
It knows neither encryption nor proof of membership beyond equal mesh ids, and nothing of what streams carry.
Public: users of `p2p.Rpc` may import it for tests of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from p2p.errors import DeadlineExceeded, LocalFault, PeerLost, ProtocolViolation, Unreachable
from p2p.host import PeerEvent
from p2p.identity import Identity, PeerId

__all__ = ["MemoryHost", "MemoryNetwork", "MemoryStream"]

logger = logging.getLogger(__name__)

Handler = Callable[["MemoryStream"], Awaitable[None]]


class MemoryNetwork:
    """Hosts that can reach one another. One trio run; methods without `async` act at once.

    `latency_s` is the one-way delay of every link (change it, or set single links with `set_latency`);
    `window_bytes` is how much a stream holds unread before its writer waits.
    """

    def __init__(self, *, latency_s: float = 0.0, window_bytes: int = 256 << 10) -> None:
        self.latency_s = latency_s
        self.window_bytes = window_bytes
        self.hosts: dict[PeerId, MemoryHost] = {}
        self._links: list[_Link] = []
        self._latencies: dict[frozenset[str], float] = {}
        self._cuts: set[frozenset[str]] = set()
        self._hosts_made = 0

    def host(self, name: str, *, identity: Identity | None = None, mesh_id: str = "memory") -> MemoryHost:
        """A running host. Without `identity`, its key is a function of `name`, so that peer ids repeat.

        A name (or identity) may come back after `kill`. Raises LocalFault while it is running.
        """
        identity = identity or Identity(hashlib.sha256(b"memory host " + name.encode()).digest())
        if identity.peer_id in self.hosts:
            raise LocalFault(f"host {name!r} is already running in this network")
        self._hosts_made += 1
        host = MemoryHost(self, name, identity, mesh_id, self._hosts_made)
        self.hosts[host.peer_id] = host
        return host

    async def connect_all(self, *hosts: MemoryHost) -> None:
        """Connect every pair of `hosts` (of all hosts when none are given)."""
        chosen = list(hosts or self.hosts.values())
        for index, one in enumerate(chosen):
            for other in chosen[index + 1 :]:
                await one.connect(other.addrs())

    def kill(self, peer: str) -> None:
        """End a host as a killed process ends: its tasks stop; peers it can reach see `down` at once."""
        host = self.hosts.pop(PeerId(peer), None)
        if host is not None:
            host._stop()
            for link in [link for link in self._links if peer in link.ends]:
                link.close(peer)

    def partition(self, *groups: Iterable[str]) -> None:
        """Silence every link between peers of different groups. Nobody is told, as with a pulled cable.

        Bytes wait, dials run into their deadline. Peers in no group keep all their links.
        """
        split = [set(group) for group in groups]
        for index, group in enumerate(split):
            for other in split[index + 1 :]:
                self._cuts.update(frozenset((a, b)) for a in group for b in other if a != b)

    def freeze(self, peer: str) -> None:
        """Silence all links of one peer, as for a stopped process or a sleeping laptop."""
        self.partition([peer], [other for other in self.hosts if other != peer])

    def heal(self) -> None:
        """End all silence: what waited arrives, and ends of closed connections are told."""
        self._cuts.clear()
        for link in list(self._links):
            link.healed()

    def set_latency(self, one: str, other: str, latency_s: float) -> None:
        """One-way delay of a single link, both ways."""
        self._latencies[frozenset((one, other))] = latency_s

    def is_cut(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self._cuts

    def link_latency_s(self, one: str, other: str) -> float:
        return self._latencies.get(frozenset((one, other)), self.latency_s)

    def streams_open(self) -> int:
        """Stream ends that are neither closed nor reset; for tests of leaks."""
        return sum(len(end.streams) for link in self._links for end in link.ends.values())

    def handlers_running(self) -> int:
        """Tasks of stream handlers, over all hosts; for tests of leaks."""
        return sum(len(host._scopes) for host in self.hosts.values())

    def _link(self, one: str, other: str) -> _Link | None:
        """The connection that `one` still believes in."""
        for link in self._links:
            end = link.ends.get(PeerId(one))
            if end is not None and end.peer == other and end.alive:
                return link
        return None


class MemoryHost:
    """`p2p.Host` without sockets; made by `MemoryNetwork.host`."""

    def __init__(
        self, network: MemoryNetwork, name: str, identity: Identity, mesh_id: str, number: int
    ) -> None:
        self.network = network
        self.name = name
        self.identity = identity
        self.peer_id = identity.peer_id
        self.mesh_id = mesh_id
        self._number = number
        self._handlers: dict[str, Handler] = {}
        self._watchers: set[trio.MemorySendChannel[PeerEvent]] = set()
        self._scopes: set[trio.CancelScope] = set()

    def __repr__(self) -> str:
        return f"MemoryHost({self.name!r})"

    def addrs(self) -> tuple[str, ...]:
        return (f"/memory/{self._number}/p2p/{self.peer_id}",)

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(sorted(other for other in self._ends()))

    def is_connected(self, peer: str) -> bool:
        return self.network._link(self.peer_id, peer) is not None

    def _ends(self) -> Iterator[PeerId]:
        for link in self.network._links:
            end = link.ends.get(self.peer_id)
            if end is not None and end.alive:
                yield end.peer

    @contextlib.contextmanager
    def watch(self) -> Iterator[trio.MemoryReceiveChannel[PeerEvent]]:
        """Events from now on, in order."""
        send, receive = trio.open_memory_channel[PeerEvent](math.inf)
        self._watchers.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._watchers.discard(send)
            send.close()

    def _emit(self, event: PeerEvent) -> None:
        for watcher in list(self._watchers):
            watcher.send_nowait(event)

    async def connect(self, addrs: Sequence[str], *, deadline_s: float | None = None) -> PeerId:
        """As Host.connect: Unreachable names every address; a silent link takes the whole deadline."""
        await trio.lowlevel.checkpoint()
        attempts: dict[str, str] = {}
        silent = False
        for address in addrs:
            peer = PeerId(address.rpartition("/p2p/")[2])
            other = self.network.hosts.get(peer)
            if peer == self.peer_id:
                attempts[address] = "it is this node's own address"
            elif self.is_connected(peer):
                return peer
            elif self.network.is_cut(self.peer_id, peer):
                attempts[address] = "no answer"
                silent = True
            elif other is None or address not in other.addrs():
                attempts[address] = "connection refused"
            elif other.mesh_id != self.mesh_id:
                attempts[address] = f"it is not a member of mesh {self.mesh_id}"
            else:
                await trio.sleep(2 * self.network.link_latency_s(self.peer_id, peer))
                if (
                    self.network.hosts.get(peer) is not other
                    or self.network.hosts.get(self.peer_id) is not self
                ):
                    attempts[address] = "connection reset"
                    continue
                if not self.is_connected(peer):
                    self.network._links.append(_Link(self.network, self, other))
                return peer
        if silent:
            await trio.sleep(5.0 if deadline_s is None else deadline_s)
        raise Unreachable(attempts)

    async def disconnect(self, peer: str) -> None:
        link = self.network._link(self.peer_id, peer)
        if link is not None:
            link.close(self.peer_id)
        await trio.lowlevel.checkpoint()

    def handle(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler

    async def open_stream(self, peer: str, protocol: str, *, deadline_s: float | None = None) -> MemoryStream:
        """As Host.open_stream: PeerLost, ProtocolViolation (not served there) or DeadlineExceeded."""
        await trio.lowlevel.checkpoint()
        link = self.network._link(self.peer_id, peer)
        if link is None:
            raise PeerLost(peer, f"not connected to {peer}")
        mine = link.ends[self.peer_id]
        within_s = 10.0 if deadline_s is None else deadline_s
        with trio.move_on_after(within_s):
            await trio.sleep(2 * self.network.link_latency_s(self.peer_id, peer))
            while link.cut and mine.alive:
                await link.changed.park()
            other = self.network.hosts.get(PeerId(peer))
            if not mine.alive or other is None:
                raise PeerLost(peer)
            handler = other._handlers.get(protocol)
            if handler is None:
                raise ProtocolViolation(f"{peer} does not serve {protocol}")
            near, far = link.new_streams(self.peer_id)
            trio.lowlevel.spawn_system_task(other._run_handler, handler, far)
            return near
        raise DeadlineExceeded(f"{peer} did not answer for {protocol} within {within_s:g} s")

    async def _run_handler(self, handler: Handler, stream: MemoryStream) -> None:
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                await handler(stream)
                await stream.aclose()
        except Exception:  # a handler's failure resets its stream, as in the real host
            logger.exception("a handler failed; its stream from %s is reset", stream.peer)
        finally:
            self._scopes.discard(scope)
            stream.reset()

    async def aclose(self) -> None:
        """Stop this host; peers see `down`."""
        self.network.kill(self.peer_id)
        await trio.lowlevel.checkpoint()

    def _stop(self) -> None:
        for scope in self._scopes:
            scope.cancel()


@dataclass(eq=False, slots=True)
class _End:
    """One host's view of a connection."""

    host: MemoryHost
    peer: PeerId
    alive: bool = True
    streams: set[MemoryStream] = field(default_factory=set)


class _Link:
    """A connection between two hosts."""

    def __init__(self, network: MemoryNetwork, one: MemoryHost, other: MemoryHost) -> None:
        self.network = network
        self.ends = {one.peer_id: _End(one, other.peer_id), other.peer_id: _End(other, one.peer_id)}
        self.changed = trio.lowlevel.ParkingLot()
        for end in self.ends.values():
            end.host._emit(PeerEvent(end.peer, "up"))

    @property
    def cut(self) -> bool:
        one, other = self.ends
        return self.network.is_cut(one, other)

    @property
    def latency_s(self) -> float:
        one, other = self.ends
        return self.network.link_latency_s(one, other)

    def new_streams(self, opener: str) -> tuple[MemoryStream, MemoryStream]:
        mine = self.ends[PeerId(opener)]
        theirs = self.ends[mine.peer]
        there, back = _Flow(self), _Flow(self)
        near = MemoryStream(mine, back, there)
        far = MemoryStream(theirs, there, back)
        return near, far

    def close(self, by: str) -> None:
        """One end leaves; the other is told at once, or once the link is heard again."""
        self._end(self.ends[PeerId(by)])
        if not self.cut:
            for end in self.ends.values():
                self._end(end)
            if self in self.network._links:
                self.network._links.remove(self)

    def healed(self) -> None:
        self.changed.unpark_all()
        for end in self.ends.values():
            for stream in end.streams:
                stream.wake()
        gone = next((end for end in self.ends.values() if not end.alive), None)
        if gone is not None:
            self.close(gone.host.peer_id)

    def _end(self, end: _End) -> None:
        if not end.alive:
            return
        end.alive = False
        for stream in list(end.streams):
            stream.fail()
        self.changed.unpark_all()
        end.host._emit(PeerEvent(end.peer, "down"))


class _Flow:
    """One direction of a stream: pieces with the time at which they arrive."""

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.pieces: deque[tuple[float, memoryview]] = deque()
        self.unread_bytes = 0
        self.eof = False
        self.reset = False
        self.discarding = False
        self.lot = trio.lowlevel.ParkingLot()


class MemoryStream:
    """A ByteStream between two memory hosts."""

    def __init__(self, end: _End, inward: _Flow, outward: _Flow) -> None:
        self.peer = end.peer
        self._end = end
        self._in = inward
        self._out = outward
        end.streams.add(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        rest = memoryview(bytes(data))
        flow = self._out
        while True:
            self._check_lost(flow)
            if flow.eof:
                raise PeerLost(self.peer, f"the stream to {self.peer} is closed for writing")
            room = flow.link.network.window_bytes - flow.unread_bytes
            if flow.discarding:
                return
            if room > 0 and rest:
                arrives = trio.current_time() + flow.link.latency_s
                flow.pieces.append((arrives, rest[:room]))
                flow.unread_bytes += len(rest[:room])
                rest = rest[room:]
                flow.lot.unpark_all()
            if not rest:
                return
            await flow.lot.park()

    def send_nowait(self, data: bytes) -> bool:
        flow = self._out
        room = flow.link.network.window_bytes - flow.unread_bytes
        if flow.reset or flow.eof or not self._end.alive or len(data) > room:
            return False
        if not flow.discarding:
            flow.pieces.append((trio.current_time() + flow.link.latency_s, memoryview(data)))
            flow.unread_bytes += len(data)
            flow.lot.unpark_all()
        return True

    def feed_to(self, sink: Callable[[bytes | memoryview], int]) -> None:
        pass

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        await trio.lowlevel.checkpoint()
        flow = self._in
        while True:
            self._check_lost(flow)
            if flow.link.cut:
                await flow.lot.park()
                continue
            wait_s = flow.pieces[0][0] - trio.current_time() if flow.pieces else 0.0
            if wait_s > 0:
                with trio.move_on_after(wait_s):
                    await flow.lot.park()
                continue
            if flow.pieces:
                return self._take(flow, max_bytes)
            if flow.eof:
                return b""
            await flow.lot.park()

    def _take(self, flow: _Flow, max_bytes: int) -> bytes:
        taken: list[memoryview] = []
        now = trio.current_time()
        while max_bytes and flow.pieces and flow.pieces[0][0] <= now:
            arrives, piece = flow.pieces.popleft()
            if len(piece) > max_bytes:
                flow.pieces.appendleft((arrives, piece[max_bytes:]))
                piece = piece[:max_bytes]
            taken.append(piece)
            max_bytes -= len(piece)
        data = b"".join(taken)
        flow.unread_bytes -= len(data)
        flow.lot.unpark_all()
        return data

    async def send_eof(self) -> None:
        """End our side and go on reading."""
        self._out.eof = True
        self._out.lot.unpark_all()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def aclose(self) -> None:
        """End our side after what is queued, and stop reading."""
        self._out.eof = True
        self._in.discarding = True
        self._in.pieces.clear()
        self._in.unread_bytes = 0
        self._end.streams.discard(self)
        self.wake()
        await trio.lowlevel.checkpoint_if_cancelled()

    def reset(self) -> None:
        """Abandon both directions; the other end raises PeerLost. Nothing after a clean close."""
        if self not in self._end.streams:
            return
        self.fail()
        self._in.reset = self._out.reset = True
        self.wake()

    def fail(self) -> None:
        """This end's connection is gone."""
        self._end.streams.discard(self)
        for flow in (self._in, self._out):
            flow.reset = flow.reset or not flow.link.cut
        self.wake()

    def wake(self) -> None:
        self._in.lot.unpark_all()
        self._out.lot.unpark_all()

    def _check_lost(self, flow: _Flow) -> None:
        if flow.reset or not self._end.alive:
            raise PeerLost(self.peer, f"lost the stream to {self.peer}")
