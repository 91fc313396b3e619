"""The replicated view at work: a trio shell that carries a Replica's messages over p2p's calls.

Knows connections, ticks, outboxes and watchers. What to say to whom is the Replica's decision, what
enters the view is the View's; it does not know what records mean.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from dht.errors import RecordRefused
from dht.messages import MESSAGE_BYTES_MAX, Parcel
from dht.outbox import Outbox
from dht.records import Key, Record
from dht.replica import (
    Changed,
    Event,
    Instruction,
    PeerDown,
    PeerUp,
    Publish,
    Received,
    Replica,
    ReplicaConfig,
    Tick,
    Withdraw,
    WithdrawAll,
)
from dht.view import View
from p2p import Call, Identity, Method, PeerId, RemoteFault, ResourceLimit, Rpc

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GossipConfig:
    """Rhythms and limits of the shell; those of the core are in `replica`."""

    tick_s: float = 1.0
    send_deadline_s: float = 5.0
    sends_per_peer_max: int = 2
    outbox_messages_max: int = 64
    outbox_push_bytes_max: int = 1024 * 1024
    watch_records_max: int = 1024
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "replica" and getattr(self, name) <= 0:
                raise ValueError(f"GossipConfig.{name} is {getattr(self, name)!r}: it must be above zero")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parcel's bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """The parcel was taken in."""


GOSSIP = Method("dht.gossip", Envelope, Ack, body_bytes_max=MESSAGE_BYTES_MAX + 64, deadline_s=5.0)


class _Watcher:
    """A channel, and what did not fit, newest per key. A reader that is behind sees fewer, newer records."""

    def __init__(self, send: trio.MemorySendChannel[Record], records_max: int) -> None:
        self._send = send
        self._records_max = records_max
        self._behind: dict[Key, Record] = {}

    def put(self, record: Record) -> None:
        self._behind.pop(record.key, None)
        self._behind[record.key] = record
        if len(self._behind) > self._records_max:
            del self._behind[next(iter(self._behind))]
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
            while self._behind:
                key = next(iter(self._behind))
                self._send.send_nowait(self._behind[key])
                del self._behind[key]


class Gossip:
    """This node's voice in the mesh's view. `publish` and `withdraw` act at once and need no `run` yet.

    `clock_s` is this node's wall clock, Unix seconds. Read the view at `now_s()`, the mesh's time.
    """

    def __init__(
        self,
        rpc: Rpc,
        view: View,
        identity: Identity,
        config: GossipConfig | None = None,
        clock_s: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config or GossipConfig()
        self.view = view
        self.counts: Counter[str] = Counter()
        self._rpc = rpc
        self._clock_s = clock_s
        self._replica = Replica(view, identity, rng or random.Random(), self.config.replica)
        self._outboxes: dict[PeerId, tuple[Outbox, trio.CancelScope]] = {}
        self._watchers: set[_Watcher] = set()
        self._progress = trio.lowlevel.ParkingLot()
        self._running = False
        self._silent = False
        rpc.serve(GOSSIP, self._serve)

    def now_s(self) -> float:
        """The mesh's time: this node's clock, corrected towards the median of its peers' clocks."""
        return self._replica.now_s(self._clock_s())

    def skew_s(self, peer: PeerId) -> float | None:
        """How far the clock of a connected peer is ahead of this node's, or None if it was not heard yet."""
        return self._replica.clock.peer_offset_s(peer)

    @property
    def suspects(self) -> frozenset[PeerId]:
        """Members still in the view whose connection to this node broke and has not come back."""
        return self._replica.suspects

    def publish(self, kind: str, name: str, value: bytes, ttl_s: float) -> None:
        """Say (kind, name) -> value until withdrawn, renewed before each `ttl_s` is over.

        Connected peers are told at once. Saying the same again costs nothing. Raises RecordInvalid
        (a field is out of its limits) or OwnRecordsFull. Ignored after `withdraw_all`.
        """
        if self._silent:
            logger.debug("not published after the end: %s %s", kind, name)
            return
        self._do(Publish(kind, name, value, ttl_s))

    def withdraw(self, kind: str, name: str) -> None:
        """Take back what was published; nothing happens where nothing was."""
        self._do(Withdraw(kind, name))

    def forget(self, peer: PeerId) -> None:
        """`peer` is no member any more: its entries go, and no new ones come in until `readmit`.

        Raises RecordRefused (`forgotten_full`) when too many are forgotten.
        """
        self._perform(Changed(record) for record in self.view.forget(peer) if not record.withdrawn)

    def readmit(self, peer: PeerId) -> None:
        """Undo `forget`."""
        self.view.readmit(peer)

    async def withdraw_all(self, deadline_s: float) -> None:
        """Take everything back, for good, and wait until connected peers know: at most `deadline_s` seconds."""
        self._silent = True
        self._do(WithdrawAll())
        with trio.move_on_after(deadline_s):
            while self._running and not all(outbox.idle for outbox, _ in self._outboxes.values()):
                await self._progress.park()

    @contextlib.contextmanager
    def watch(self) -> Iterator[trio.MemoryReceiveChannel[Record]]:
        """Every change from now on: new values, withdrawals (tombstones) and expiries (the last record).

        Renewals of an unchanged value are not told. A slow reader never blocks anyone: it gets the
        newest record of each key, late.
        """
        send, receive = trio.open_memory_channel[Record](self.config.watch_records_max)
        watcher = _Watcher(send, self.config.watch_records_max)
        self._watchers.add(watcher)
        try:
            with receive:
                yield receive
        finally:
            self._watchers.discard(watcher)
            send.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange records with connected peers until cancelled. `rpc.run` must be running."""
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._follow_peers, nursery)
                nursery.start_soon(self._tick)
                task_status.started()
        finally:
            self._running = False
            self._outboxes.clear()
            self._progress.unpark_all()

    async def _tick(self) -> None:
        while True:
            await trio.sleep(self.config.tick_s)
            self._do(Tick())
            for watcher in self._watchers:
                watcher.flush()

    async def _follow_peers(
        self, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """A watch that fell behind starts anew from what is connected."""
        started = False
        while True:
            with self._rpc.host.watch() as events:
                self._reconcile(nursery)
                if not started:
                    started = True
                    task_status.started()
                async for event in events:
                    known = event.peer in self._outboxes
                    self._reconcile(nursery)
                    if known and event.kind == "up" and event.peer in self._outboxes:
                        self._do(PeerUp(event.peer))

    def _reconcile(self, nursery: trio.Nursery) -> None:
        """Bring outboxes in line with what is connected now."""
        connected = self._rpc.host.peers()
        for peer in [peer for peer in self._outboxes if peer not in connected]:
            _, scope = self._outboxes.pop(peer)
            scope.cancel()
            self._progress.unpark_all()
            self._do(PeerDown(peer))
        for peer in connected:
            if peer not in self._outboxes:
                outbox = Outbox(self.config.outbox_messages_max, self.config.outbox_push_bytes_max)
                scope = trio.CancelScope()
                self._outboxes[peer] = (outbox, scope)
                nursery.start_soon(self._send_all, peer, outbox, scope)
                self._do(PeerUp(peer))

    async def _send_all(self, peer: PeerId, outbox: Outbox, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for _ in range(self.config.sends_per_peer_max):
                    nursery.start_soon(self._send, peer, outbox)

    async def _send(self, peer: PeerId, outbox: Outbox) -> None:
        while True:
            message = await outbox.take()
            outbox.in_flight += 1
            try:
                parcel = Parcel(max(0.0, self._clock_s()), message)
                envelope = Envelope(parcel.encode())
                await self._rpc.call(peer, GOSSIP, envelope, deadline_s=self.config.send_deadline_s)
                self.counts["sent"] += 1
            except (RemoteFault, ResourceLimit) as error:
                self.counts["sends_failed"] += 1
                logger.debug("gossip to %s failed: %s", peer, error)
            finally:
                outbox.in_flight -= 1
                self._progress.unpark_all()

    async def _serve(self, call: Call, request: Envelope) -> Ack:
        try:
            parcel = Parcel.decode(request.data)
        except RecordRefused as error:
            self.view.counts[error.reason] += 1
            logger.info("unreadable gossip from %s: %s", call.peer, error)
            raise
        self.counts["received"] += 1
        self._do(Received(call.peer, parcel.message, parcel.sent_at_s))
        return Ack()

    def _do(self, event: Event) -> None:
        self._perform(self._replica.handle(event, self._clock_s()))

    def _perform(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Changed):
                for watcher in self._watchers:
                    watcher.put(instruction.record)
            else:
                known = self._outboxes.get(instruction.peer)
                if known is not None:
                    known[0].put(instruction.message)
