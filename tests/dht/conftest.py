"""Cheap identities and records for dht's tests. Everything is seeded; nothing here reads a clock."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable

import pytest

from dht import Record, View, sign_record
from dht.replica import Changed, Event, PeerDown, PeerUp, Received, Replica, ReplicaConfig, Send, Tick
from p2p import Identity


@pytest.fixture(scope="session")
def identity() -> Callable[[int], Identity]:
    """The n-th identity, always the same."""
    made: dict[int, Identity] = {}

    def make(n: int) -> Identity:
        if n not in made:
            made[n] = Identity(hashlib.sha256(f"identity {n}".encode()).digest())
        return made[n]

    return make


@pytest.fixture
def record(identity: Callable[[int], Identity]) -> Callable[..., Record]:
    """A record by the n-th identity with sensible defaults, issued at second 1000."""

    def make(
        n: int = 0,
        *,
        kind: str = "node",
        name: str = "self",
        seq: int = 1,
        value: bytes = b"v",
        now_s: float = 1000.0,
        ttl_s: float = 20.0,
    ) -> Record:
        return sign_record(identity(n), kind, name, seq, value, now_s, ttl_s)

    return make


class World:
    """Replicas joined by links that lose, repeat, delay and reorder messages, or are cut. Seeded; no clock."""

    def __init__(
        self, seed: int, members: list[Identity], verify, config: ReplicaConfig | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.now_s = 10_000.0
        self.loss = self.repeat = 0.0
        self.delay_max_s = 0.2
        self.group: dict[str, int] = {}
        self.members = {member.peer_id: member for member in members}
        self.replicas: dict[str, Replica] = {}
        self.clock_error_s: dict[str, float] = {}
        self.changes: dict[str, list[Record]] = {}
        self.sent = 0
        self._verify = verify
        self._config = config
        self._queue: list[tuple[float, int, str, Received]] = []
        self._count = 0
        for member in members:
            self.start(member.peer_id)

    def start(self, peer: str) -> Replica:
        """A node with an empty view, connected to all others (again, if it ran before)."""
        replica = Replica(
            View(verify=self._verify),
            self.members[peer],
            random.Random(self.rng.getrandbits(64)),
            self._config,
        )
        self.replicas[peer] = replica
        self.changes[peer] = []
        for other in [other for other in self.replicas if other != peer]:
            self.do(other, PeerUp(peer))
            self.do(peer, PeerUp(other))
        return replica

    def kill(self, peer: str) -> None:
        del self.replicas[peer]
        for other in self.replicas:
            self.do(other, PeerDown(peer))

    def do(self, peer: str, event: Event) -> None:
        """Give `peer` an event, at its own clock, and put what it sends on the links."""
        replica = self.replicas[peer]
        clock_s = self.now_s + self.clock_error_s.get(peer, 0.0)
        for instruction in replica.handle(event, clock_s):
            if isinstance(instruction, Changed):
                self.changes[peer].append(instruction.record)
            else:
                self._post(peer, instruction, clock_s)

    def _post(self, peer: str, send: Send, clock_s: float) -> None:
        self.sent += 1
        copies = 0 if self.rng.random() < self.loss else 1 + (self.rng.random() < self.repeat)
        for _ in range(copies):
            self._count += 1
            at_s = self.now_s + self.rng.uniform(0.001, self.delay_max_s)
            received = Received(peer, send.message, clock_s)
            heapq.heappush(self._queue, (at_s, self._count, send.peer, received))

    def deliver_until(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, peer, received = heapq.heappop(self._queue)
            cut = self.group.get(peer, 0) != self.group.get(received.peer, 0)
            if peer in self.replicas and not cut:
                self.do(peer, received)
        self.now_s = until_s

    def rounds(self, count: int, between: Callable[[], None] = lambda: None) -> None:
        """Each round is a second in which every replica ticks once, at its own moment."""
        for _ in range(count):
            start_s = self.now_s
            phases = sorted((self.rng.random(), peer) for peer in self.replicas)
            for phase, peer in phases:
                self.deliver_until(start_s + phase)
                if peer in self.replicas:
                    self.do(peer, Tick())
                between()
            self.deliver_until(start_s + 1.0)

    def settle(self) -> None:
        """Deliver what is on the links, without any tick."""
        while self._queue:
            self.deliver_until(self._queue[0][0])

    def states(self) -> list[dict]:
        """What each replica would answer now, tombstones included."""
        return [
            {
                record.key: record
                for member in self.members
                for record in replica.view.of_signer(member)
                if record.expires_at_s > self.now_s
            }
            for replica in self.replicas.values()
        ]

    def converged(self) -> bool:
        states = self.states()
        return all(state == states[0] for state in states)


@pytest.fixture(scope="session")
def make_world(identity) -> Callable[..., World]:
    """World(seed, count): signatures are really checked, but each record only once for all replicas."""
    checked: dict[Record, bool] = {}

    def verify(record: Record) -> bool:
        if record not in checked:
            if len(checked) > 20_000:
                checked.clear()
            checked[record] = record.verify()
        return checked[record]

    def make(seed: int, count: int, config: ReplicaConfig | None = None) -> World:
        return World(seed, [identity(n) for n in range(count)], verify, config)

    return make
