"""A mesh as Petals runs it, to be compared with: re-implemented from its sources at commit 22afba6 (2024-08-25).

Copied: a joiner takes the window whose weakest layers are served least (server/block_selection.py); a server asks at
random intervals, a minute in the mean, whether the mesh's bottleneck would improve by more than a quarter if it moved
and others after it, and never cuts the mesh (server/server.py, cli/run_server.py); throughput is that of forward
passes over half its layers, bounded by its line (server/throughput.py); servers announce themselves and their cache
room every 120 s, for 240 s; clients read that every 60 s, take the path of least round trips and idle compute with
10 s for short cache, and ban who fails for 15 s and twice that each time (client/routing/sequence_manager.py). Every
token goes through the client, and a lost stage is fed again by it (client/inference_session.py).
Kinder than life: every round trip is known, batching and chunked prompts are ours (a Petals server runs one request at
a time, whole prompts), cache room is as large as ours, a dead server is noticed and a refusal answered as fast as with
us, a server that moves lets sessions end first, and the output projection is not left to the client. The fresh variant
is kinder yet: announcements and views are as fresh as ours, and nobody is banned.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scheduler.errors import NoChain
from scheduler.routing import Stage
from scheduler.seating import seat_of, shortage
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Machine, Span
from scheduler.sim.paths import Server, fastest_path
from scheduler.sim.policy import Orders
from scheduler.sim.request import Request

BALANCE_QUALITY = 0.75
CHECK_MEAN_S = 60.0
ANNOUNCE_S = 120.0
EXPIRES_S = 2 * ANNOUNCE_S
REFRESH_S = 60.0
BAN_S = 15.0
ALLOC_DELAY_S = 10.0
OVERHEAD_S = 0.018
EPSILON = 1e-3
CASCADE_NODES_MAX = 100


def window_size(machine: Machine) -> int:
    """Layers that a server takes wherever they lie: room for the end pieces is kept, as it cannot know."""
    seat = seat_of(machine.model, machine.shape)
    return max(0, min(seat.room, max(seat.room_first, 0), max(seat.room_last, 0)))


def weakest_window(throughputs: list[float], size: int) -> int:
    """The start whose sorted throughputs are least (Petals' _choose_best_start)."""
    return min(
        (sorted(throughputs[i : i + size]), i) for i in range(len(throughputs) - size + 1)
    )[1]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """What a server announced: its layers, their throughput, its cache room, and whether it serves yet."""

    span: Span
    speed: float
    layer_s: float
    kv_tokens_free: int
    online: bool
    said_s: float


@dataclass(slots=True)
class Table:
    """The servers that a client knows, when it reads the records again, and whom it bans until when, how often."""

    next_s: float
    servers: dict[str, Record] = field(default_factory=dict)
    bans: dict[str, tuple[float, int]] = field(default_factory=dict)


class Petals:
    """Greedy joiners, the rebalance rule, and the client's fastest path."""

    mends = True
    by_client = True
    gossips = False
    tick_s = 1.0

    def __init__(self, config: SimConfig, *, fresh: bool = False) -> None:
        self.replans = 0
        self._fresh = fresh
        self.announce_s = config.gossip_s if fresh else ANNOUNCE_S
        self._refresh_s = config.view_age_s if fresh else REFRESH_S
        self._expires_s = config.detect_s if fresh else EXPIRES_S
        self._rng = random.Random(f"{config.seed}/petals")
        self._layers = config.model.layers
        self._spans: dict[str, Span] = {}
        self._records: dict[str, Record] = {}
        self._announce_s: dict[str, float] = {}
        self._check_s: dict[str, float] = {}
        self._tables: dict[str, Table] = {}

    # -- servers

    def start(self, fleet: Fleet) -> Orders:
        for machine in fleet.up.values():
            self._join(fleet, machine)
            if machine.name in self._spans:
                self._announce(fleet, machine, online=True)
                self._announce_s[machine.name] = self._rng.random() * self.announce_s
        if min(self._throughputs(0.0)) <= 0:
            nodes = [m.shape for m in fleet.up.values()]
            raise shortage(fleet.model, nodes, [seat_of(fleet.model, node) for node in nodes])
        return dict(self._spans)

    def tick(self, fleet: Fleet) -> Orders:
        now_s = fleet.clock.now_s
        orders: dict[str, Span | None] = {}
        for gone in [name for name in self._spans if name not in fleet.up]:
            del self._spans[gone]
            if (
                gone not in fleet.members
            ):  # it said farewell; a record of one that crashed stands until it expires
                self._records.pop(gone, None)
        for name, machine in fleet.up.items():
            if name not in self._spans or machine.target is None:
                self._join(fleet, machine)
                if name in self._spans:
                    orders[name] = self._spans[name]
                continue
            online = machine.serving and machine.span == self._spans[name]
            if now_s >= self._announce_s[name] - 1e-9 or online != self._records[name].online:
                self._announce(fleet, machine, online=online)
            if now_s >= self._check_s[name]:
                self._check_s[name] = now_s + self._rng.random() * 2 * CHECK_MEAN_S
                start = self._better_start(name, now_s) if online else None
                if start is not None:
                    size = self._spans[name][1] - self._spans[name][0]
                    self._spans[name] = orders[name] = (start, start + size)
                    self._announce(fleet, machine, online=False)
                    self.replans += 1
        return orders

    def _join(self, fleet: Fleet, machine: Machine) -> None:
        size = min(window_size(machine), fleet.model.layers)
        self._spans.pop(machine.name, None)
        self._records.pop(machine.name, None)
        if size > 0:
            now_s = fleet.clock.now_s
            start = weakest_window(self._throughputs(now_s), size)
            self._spans[machine.name] = (start, start + size)
            self._check_s[machine.name] = now_s + self._rng.random() * 2 * CHECK_MEAN_S
            self._announce(fleet, machine, online=False)

    def _announce(self, fleet: Fleet, machine: Machine, *, online: bool) -> None:
        span, now_s = self._spans[machine.name], fleet.clock.now_s
        self._announce_s[machine.name] = now_s + self.announce_s
        by_compute = 1.0 / (machine.prompt_s * (span[1] - span[0] + 1) / 2)
        by_line = machine.line_bytes_per_s / fleet.model.hidden_bytes
        room = machine.kv_tokens_free() if machine.span is not None else 1 << 40
        self._records[machine.name] = Record(
            span, min(by_compute, by_line), machine.read_s, room, online, now_s
        )

    def _throughputs(self, now_s: float) -> list[float]:
        live = [r for r in self._records.values() if now_s < r.said_s + self._expires_s]
        total = [0.0] * self._layers
        for record in live:
            _add(total, record.span, record.speed)
        return total

    def _better_start(self, name: str, now_s: float) -> int | None:
        """Where to move, or None: should_choose_other_blocks, with the others' answers to the move played out."""
        throughputs = self._throughputs(now_s)
        initial = min(throughputs)
        live = {n: r for n, r in self._records.items() if now_s < r.said_s + self._expires_s}
        spans = {n: r.span for n, r in live.items()}
        span, speed = spans[name], live[name].speed
        size = span[1] - span[0]
        _add(throughputs, span, -speed * (1 + EPSILON))
        if initial > EPSILON and min(throughputs) <= 0:
            return None
        start = weakest_window(throughputs, size)
        if start == span[0]:
            return None
        _add(throughputs, span, speed * EPSILON)
        spans[name] = (start, start + size)
        _add(throughputs, spans[name], speed)
        if len(spans) <= CASCADE_NODES_MAX:
            self._play_out({n: r.speed for n, r in live.items()}, spans, throughputs)
        new = min(throughputs)
        if new < initial or new < EPSILON or initial / new >= BALANCE_QUALITY - EPSILON:
            return None
        return start

    def _play_out(
        self, speeds: Mapping[str, float], spans: dict[str, Span], throughputs: list[float]
    ) -> None:
        """Let every server answer in turn until none moves, or they have moved long enough."""
        for _ in range(len(spans)):
            moved = False
            names = list(spans)
            self._rng.shuffle(names)
            for name in names:
                span, speed = spans[name], speeds[name]
                _add(throughputs, span, -speed * (1 + EPSILON))
                start = weakest_window(throughputs, span[1] - span[0])
                _add(throughputs, span, speed * EPSILON)
                if start != span[0]:
                    spans[name] = (start, start + span[1] - span[0])
                    moved = True
                _add(throughputs, spans[name], speed)
            if not moved:
                return

    # -- clients

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        return self._path(fleet, request, (0, fleet.model.layers), request.excluded)

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        """The path is never thought over; a server that answers is forgiven what it failed before."""
        table = self._table(fleet, request.gateway)
        for stage in request.stages:
            table.bans.pop(stage.node, None)
        return True

    def served(self, request: Request, now_s: float) -> None:
        """Prefixes are reused where chance brings them together."""

    def ended(self, request: Request, now_s: float) -> None:
        """Nothing is kept of it."""

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        return self._path(fleet, request, lost, without)

    def _table(self, fleet: Fleet, gateway: str, *, again: bool = False) -> Table:
        """What the client knows, read anew when it is time, or when it knows nobody for some layer."""
        now_s = fleet.clock.now_s
        table = self._tables.get(gateway)
        if table is None:
            table = self._tables[gateway] = Table(now_s)
            again = True
        if again or now_s >= table.next_s:
            fresh = not table.servers
            table.next_s = now_s + self._refresh_s * (self._rng.random() if fresh else 1.0)
            known = {
                n: r for n, r in self._records.items() if r.online and now_s < r.said_s + self._expires_s
            }
            allowed = {n: r for n, r in known.items() if table.bans.get(n, (0.0, 0))[0] <= now_s}
            covered = _covers(allowed.values(), fleet.model.layers)
            table.servers = allowed if covered else known
        return table

    def _path(self, fleet: Fleet, request: Request, span: Span, without: Iterable[str]) -> list[Stage]:
        table = self._table(fleet, request.gateway)
        now_s, link = fleet.clock.now_s, fleet.world.link
        for name in request.excluded:
            if table.servers.pop(name, None) is not None:
                times = table.bans.get(name, (0.0, 0))[1]
                if not self._fresh:
                    table.bans[name] = (now_s + BAN_S * 2.0 ** min(times, 10), times + 1)
        if not _covers(table.servers.values(), fleet.model.layers):
            table = self._table(fleet, request.gateway, again=True)
        barred = set(without)
        servers = [
            Server(n, *r.span, r.layer_s, ALLOC_DELAY_S if r.kv_tokens_free < request.tokens else 0.0)
            for n, r in table.servers.items()
            if n not in barred
        ]

        def delay_s(a: str, b: str) -> float:
            return link(a, b).latency_s + (OVERHEAD_S if b != request.gateway else 0.0)

        path = fastest_path(servers, span, request.gateway, delay_s)
        if path is None:
            raise NoChain(range(*span))
        return path


def _covers(records: Iterable[Record], layers: int) -> bool:
    at = 0
    for start, end in sorted(r.span for r in records):
        if start > at:
            return False
        at = max(at, end)
    return at >= layers


def _add(total: list[float], span: Span, more: float) -> None:
    for layer in range(*span):
        total[layer] += more
