"""One node's part in the replicated view, as a synchronous core: events and time in, instructions out.

Knows when to push, relay, compare, refresh, withdraw and expire, and that this node's sequence
numbers only grow. It has no clock, no network and no randomness of its own (a `random.Random` comes
in), so that the daemon, a simulation and a fault schedule all run this same code.

Spreading is rumour mongering plus anti-entropy: Demers et al., "Epidemic Algorithms for Replicated
Database Maintenance" (1987).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dht.errors import OwnRecordsFull, RecordInvalid, RecordRefused
from dht.meshclock import MeshClock
from dht.messages import Exchange, Inventory, Message, Push, Summary, batches, encoded
from dht.records import Record, sign_record, sign_tombstone
from dht.view import Merged, View
from p2p import Identity, PeerId


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """How widely and how often a replica speaks.

    `push_fanout` is how many connected peers an author tells of a change at once, `relay_fanout` how
    many others each of those tells, `exchange_fanout` with how many at most this one compares at each tick.
    A record is renewed when `refresh_fraction` of its life has passed.
    """

    push_fanout: int = 32
    relay_fanout: int = 3
    exchange_fanout: int = 3
    refresh_fraction: float = 0.25
    answers_per_tick_max: int = 32

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be above zero")
        if self.refresh_fraction >= 1:
            raise ValueError(f"refresh_fraction is {self.refresh_fraction!r}: it must be below one")


@dataclass(frozen=True, slots=True)
class Tick:
    """About once a second."""


@dataclass(frozen=True, slots=True)
class PeerUp:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class PeerDown:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class Received:
    """`sent_at_s` is the sender's clock; None where it is unknown."""

    peer: PeerId
    message: Message
    sent_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    kind: str
    name: str
    value: bytes
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Withdraw:
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class WithdrawAll:
    """Nothing of this node shall remain; told to every connected peer."""


Event = Tick | PeerUp | PeerDown | Received | Publish | Withdraw | WithdrawAll


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Changed:
    """The value under this record's key is new, withdrawn, or gone (`record` is then the last one held)."""

    record: Record


Instruction = Send | Changed


@dataclass(slots=True)
class _Own:
    value: bytes
    ttl_s: float
    record: Record


class Replica:
    """`handle(event, now_s)` with `now_s` this node's own clock, Unix seconds; it may jump."""

    def __init__(
        self, view: View, identity: Identity, rng: random.Random, config: ReplicaConfig | None = None
    ) -> None:
        self.view = view
        self.config = config or ReplicaConfig()
        self.clock = MeshClock()
        self.counts: Counter[str] = Counter()
        view.owner = identity.peer_id
        self._identity = identity
        self._rng = rng
        self._own: dict[tuple[str, str], _Own] = {}
        self._seq = -1
        self._peers: dict[PeerId, None] = {}
        self._suspects: dict[PeerId, None] = {}
        self._answers: Counter[PeerId] = Counter()

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Connected peers."""
        return tuple(self._peers)

    @property
    def suspects(self) -> frozenset[PeerId]:
        """Signers still in the view whose connection to this node broke and has not come back."""
        return frozenset(self._suspects)

    def now_s(self, clock_s: float) -> float:
        """The mesh's time when this node's clock shows `clock_s`."""
        return max(0.0, clock_s + self.clock.offset_s)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """What to do about `event`.

        Publish raises OwnRecordsFull or RecordInvalid, before anything is changed.
        """
        if isinstance(event, Received):
            if event.sent_at_s is not None and event.peer in self._peers:
                self.clock.heard(event.peer, event.sent_at_s, now_s)
            return self._received(event, self.now_s(now_s))
        now_s = self.now_s(now_s)
        if isinstance(event, Tick):
            return self._tick(now_s)
        if isinstance(event, Publish):
            return self._publish(event, now_s)
        if isinstance(event, Withdraw):
            self._own.pop((event.kind, event.name), None)
            return self._retract([(event.kind, event.name)], now_s)
        if isinstance(event, WithdrawAll):
            self._own.clear()
            return self._retract(self._published(), now_s, everyone=True)
        if isinstance(event, PeerUp):
            self._peers[event.peer] = None
            self._suspects.pop(event.peer, None)
            return [Send(event.peer, Summary(self.view.digest(now_s)))]
        return self._down(event.peer)

    def validate(self) -> None:
        """Raise RuntimeError if an invariant is broken. For tests."""
        self.view.validate()
        for (kind, name), own in self._own.items():
            if own.record.key != (kind, name, self._identity.peer_id) or own.record.seq > self._seq:
                raise RuntimeError(f"broken replica: {kind} {name} is filed wrongly")
        if any(peer in self._peers for peer in self._suspects):
            raise RuntimeError("broken replica: a connected peer is suspect")

    # What this node says

    def _publish(self, event: Publish, now_s: float) -> list[Instruction]:
        key = (event.kind, event.name)
        own = self._own.get(key)
        if own and own.value == event.value and own.ttl_s == event.ttl_s and self._is_held(own.record, now_s):
            return []
        self._check_limits(key, event)
        return self._assert_own(key, event.value, event.ttl_s, now_s)

    def _assert_own(
        self, key: tuple[str, str], value: bytes, ttl_s: float, now_s: float
    ) -> list[Instruction]:
        """Sign the next version, take it in and tell others."""
        seq = self._next_seq(now_s)
        record = sign_record(self._identity, *key, seq, value, now_s, ttl_s)
        self._seq = seq
        self._own[key] = _Own(value, ttl_s, record)
        return self._take_own((record,), now_s)

    def _check_limits(self, key: tuple[str, str], event: Publish) -> None:
        others = [own.record for other, own in self._own.items() if other != key]
        limits = self.view.config
        if not 0 < event.ttl_s <= limits.ttl_max_s:
            raise RecordInvalid(f"ttl_s is {event.ttl_s!r}: it must be above 0, at most {limits.ttl_max_s}")
        size = len(event.value) + 512 + sum(len(record.value) + 512 for record in others)
        if len(others) >= limits.records_per_signer_max or size > limits.bytes_per_signer_max:
            raise OwnRecordsFull(f"this node already publishes {len(others)} records with {size} bytes")

    def _retract(
        self, keys: Iterable[tuple[str, str]], now_s: float, *, everyone: bool = False
    ) -> list[Instruction]:
        """Tombstones for those of `keys` that are held and live."""
        tombstones = []
        for kind, name in keys:
            held = self.view.get(kind, name, self._identity.peer_id)
            if held is None:
                continue
            self._seq = self._next_seq(now_s)
            # Others may see the withdrawn version live until then, their clocks being a little behind.
            limits = self.view.config
            expires_at_s = min(max(held.expires_at_s, now_s), now_s + limits.ttl_max_s) + limits.skew_max_s
            tombstones.append(sign_tombstone(self._identity, kind, name, self._seq, now_s, expires_at_s))
        return self._take_own(tombstones, now_s, everyone=everyone)

    def _take_own(
        self, records: Sequence[Record], now_s: float, *, everyone: bool = False
    ) -> list[Instruction]:
        merged = self.view.merge_many(records, now_s)
        self.counts["own_refused"] += len(merged.refused)
        news = [record for record in merged.changed if record not in merged.refreshed]
        fanout = len(self._peers) if everyone else self.config.push_fanout
        return [
            *self._changes(merged),
            *self._push(news, self._some_peers(fanout)),
            *self._push(merged.refreshed, self._some_peers(self.config.relay_fanout)),
        ]

    def _next_seq(self, now_s: float) -> int:
        """Above all this node used in this life, all that others hand back from earlier ones, and the time."""
        return max(self._seq + 1, self.view.seq_max(self._identity.peer_id) + 1, int(now_s * 1000))

    def _published(self) -> list[tuple[str, str]]:
        own = self.view.of_signer(self._identity.peer_id)
        return [(record.kind, record.name) for record in own if not record.withdrawn]

    def _is_held(self, record: Record, now_s: float) -> bool:
        return self.view.held(record.key) == record and record.expires_at_s > now_s

    def _maintain_own(self, now_s: float) -> list[Instruction]:
        """Renew what is due or was displaced, and withdraw what an earlier life of this node left behind."""
        out: list[Instruction] = []
        for key, own in list(self._own.items()):
            due_s = own.record.issued_at_s + self.config.refresh_fraction * own.ttl_s
            back_s = own.record.issued_at_s - self.view.config.skew_max_s
            if not back_s <= now_s < due_s or not self._is_held(own.record, now_s):
                out += self._assert_own(key, own.value, own.ttl_s, now_s)
        leftover = [key for key in self._published() if key not in self._own]
        self.counts["leftovers_withdrawn"] += len(leftover)
        return out + self._retract(leftover, now_s)

    # What others say

    def _received(self, event: Received, now_s: float) -> list[Instruction]:
        message = event.message
        out: list[Instruction] = []
        if isinstance(message, Push | Exchange):
            out += self._take(event.peer, message.records, now_s)
        self._answers[event.peer] += 1
        if self._answers[event.peer] > self.config.answers_per_tick_max:
            self.counts["answers_withheld"] += 1
            return out
        pivot = self._rng.getrandbits(64)
        if isinstance(message, Summary):
            scope = self.view.differing(message.digest, now_s)
            if scope:
                out.append(Send(event.peer, Inventory(self.view.detail(scope, now_s, pivot))))
        elif isinstance(message, Inventory):
            lacking = encoded(self.view.missing(message.detail, now_s, pivot))
            mine = self.view.detail(message.detail.scope, now_s, pivot)
            out.append(Send(event.peer, Exchange(lacking, mine)))
        elif isinstance(message, Exchange):
            out += self._push(self.view.missing(message.detail, now_s, pivot), [event.peer])
        return out

    def _take(self, peer: PeerId, data: Sequence[bytes], now_s: float) -> list[Instruction]:
        records = []
        for item in data:
            try:
                records.append(Record.decode(item))
            except RecordRefused as error:
                self.view.counts[error.reason] += 1
        merged = self.view.merge_many(records, now_s)
        refreshed = set(merged.refreshed)
        news = [record for record in merged.changed if record not in refreshed]
        newer = [
            held
            for record in merged.stale
            if (held := self.view.held(record.key)) and held != record and held.expires_at_s > now_s
        ]
        others = [other for other in self._some_peers(self.config.relay_fanout + 1) if other != peer]
        return [
            *self._changes(merged),
            *self._push(news, others[: self.config.relay_fanout]),
            *self._push(newer, [peer]),
        ]

    def _changes(self, merged: Merged) -> list[Instruction]:
        refreshed = set(merged.refreshed)
        news = (record for record in merged.changed if record not in refreshed)
        return [Changed(record) for record in (*news, *merged.evicted)]

    def _push(self, records: Sequence[Record], peers: Sequence[PeerId]) -> list[Instruction]:
        messages = batches(encoded(records)) if peers else ()
        return [Send(peer, message) for peer in peers for message in messages]

    def _tick(self, now_s: float) -> list[Instruction]:
        self._answers.clear()
        expired = self.view.expire(now_s)
        out: list[Instruction] = [Changed(record) for record in expired if not record.withdrawn]
        out += self._maintain_own(now_s)
        for peer in [peer for peer in self._suspects if not self.view.of_signer(peer)]:
            del self._suspects[peer]
        # One partner is enough in a small mesh; in a large one a few make three rounds suffice.
        partners = min(self.config.exchange_fanout, 1 + len(self._peers) // 8)
        for peer in self._some_peers(partners):
            out.append(Send(peer, Summary(self.view.digest(now_s))))
        return out

    def _down(self, peer: PeerId) -> list[Instruction]:
        self._peers.pop(peer, None)
        self._answers.pop(peer, None)
        self.clock.lost(peer)
        if self.view.of_signer(peer):
            self._suspects[peer] = None
        return []

    def _some_peers(self, count: int) -> list[PeerId]:
        peers = list(self._peers)
        return peers if len(peers) <= count else self._rng.sample(peers, count)
