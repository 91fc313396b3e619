"""A mesh as Petals runs it, to be compared with (its block_selection.py and sequence_manager.py, re-implemented).

A joiner takes the window whose weakest layers are served least; at random intervals a server asks whether the
mesh's bottleneck would improve by more than a quarter if it moved (and others after it), and never cuts the mesh. A
client takes the path of least latency: round trips and idle compute, with a penalty where cache is short, and no
regard to queues. Kinder than life: its loads are as fresh as ours, and a broken session is mended.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from scheduler.errors import NoChain
from scheduler.routing import Hosted, Stage
from scheduler.seating import seat_of, shortage
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Machine, Span
from scheduler.sim.policy import Orders, part_of
from scheduler.sim.request import Request
from scheduler.walk import Ground, shortest_walk

BALANCE_QUALITY = 0.75
CHECK_MEAN_S = 120.0
ALLOC_DELAY_S = 10.0
EPSILON = 1e-3
CASCADE_NODES_MAX = 100
WIDTH = 32


def window_size(machine: Machine) -> int:
    """Layers that a server takes wherever they lie: room for the end pieces is kept, as it cannot know."""
    seat = seat_of(machine.model, machine.shape)
    return max(0, min(seat.room, max(seat.room_first, 0), max(seat.room_last, 0)))


def weakest_window(throughputs: Sequence[float], size: int) -> int:
    """The start whose sorted throughputs are least (Petals' _choose_best_start)."""
    return min(
        (sorted(throughputs[i : i + size]), i) for i in range(len(throughputs) - size + 1)
    )[1]  # fmt: skip


class Petals:
    """Greedy joiners, the rebalance rule, and the client's fastest path."""

    mends = True
    by_client = True
    gossips = True
    tick_s = 1.0

    def __init__(self, config: SimConfig) -> None:
        self.replans = 0
        self._rng = random.Random(f"{config.seed}/petals")
        self._spans: dict[str, Span] = {}
        self._check_s: dict[str, float] = {}
        self._seen = -1

    def start(self, fleet: Fleet) -> Orders:
        for machine in fleet.members.values():
            self._join(fleet, machine)
        if min(self._throughputs(fleet)) <= 0:
            nodes = [m.shape for m in fleet.members.values()]
            raise shortage(fleet.model, nodes, [seat_of(fleet.model, node) for node in nodes])
        self._seen = fleet.version
        return dict(self._spans)

    def tick(self, fleet: Fleet) -> Orders:
        orders: dict[str, Span | None] = {}
        if fleet.version != self._seen:
            self._seen = fleet.version
            for gone in [name for name in self._spans if name not in fleet.members]:
                del self._spans[gone]
            for name, machine in fleet.members.items():
                # One that came back before it was missed hosts nothing yet.
                if name not in self._spans or (machine.target is None and machine.up):
                    self._join(fleet, machine)
                    orders[name] = self._spans.get(name)
        now_s = fleet.clock.now_s
        for name in [n for n, due_s in self._check_s.items() if due_s <= now_s and n in self._spans]:
            self._check_s[name] = now_s + self._rng.random() * 2 * CHECK_MEAN_S
            start = self._better_start(fleet, name)
            if start is not None:
                size = self._spans[name][1] - self._spans[name][0]
                self._spans[name] = orders[name] = (start, start + size)
                self.replans += 1
        return orders

    def _join(self, fleet: Fleet, machine: Machine) -> None:
        size = min(window_size(machine), fleet.model.layers)
        self._spans.pop(machine.name, None)
        if size > 0:
            start = weakest_window(self._throughputs(fleet), size)
            self._spans[machine.name] = (start, start + size)
            self._check_s[machine.name] = fleet.clock.now_s + self._rng.random() * 2 * CHECK_MEAN_S

    def _throughputs(self, fleet: Fleet) -> list[float]:
        total = [0.0] * fleet.model.layers
        for name, span in self._spans.items():
            if name in fleet.members:
                _add(total, span, _speed(fleet, name, span))
        return total

    def _better_start(self, fleet: Fleet, name: str) -> int | None:
        """Where to move, or None: should_choose_other_blocks, with the others' answers to the move played out."""
        throughputs = self._throughputs(fleet)
        initial = min(throughputs)
        spans = dict(self._spans)
        span = spans[name]
        size, speed = span[1] - span[0], _speed(fleet, name, span)
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
            self._play_out(fleet, spans, throughputs)
        new = min(throughputs)
        if new < initial or new < EPSILON or initial / new >= BALANCE_QUALITY - EPSILON:
            return None
        return start

    def _play_out(self, fleet: Fleet, spans: dict[str, Span], throughputs: list[float]) -> None:
        for _ in range(8):
            moved = False
            names = list(spans)
            self._rng.shuffle(names)
            for name in names:
                span, speed = spans[name], _speed(fleet, name, spans[name])
                _add(throughputs, span, -speed * (1 + EPSILON))
                start = weakest_window(throughputs, span[1] - span[0])
                _add(throughputs, span, speed * EPSILON)
                if start != span[0]:
                    spans[name] = (start, start + span[1] - span[0])
                    moved = True
                _add(throughputs, spans[name], speed)
            if not moved:
                return

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        _, hosts = fleet.view(request.gateway)
        return self._path(fleet, request, hosts, (0, fleet.model.layers), frozenset(request.excluded))

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        return True

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        _, hosts = fleet.view(request.gateway)
        return self._path(fleet, request, part_of(hosts, lost), lost, without)

    def _path(
        self, fleet: Fleet, request: Request, hosts: Sequence[Hosted], span: Span, without: frozenset[str]
    ) -> list[Stage]:
        able = [h for h in hosts if h.node not in without and h.node in fleet.members]
        names = [h.node for h in able]
        layers = span[1] - span[0]
        link = fleet.world.link
        ground = Ground(
            layers=layers,
            starts=[h.start for h in able],
            ends=[h.end for h in able],
            layer_s=[fleet.members[h.node].read_s for h in able],
            enter_s=[ALLOC_DELAY_S if h.kv_tokens_free < request.tokens else 0.0 for h in able],
            first_s=lambda v: link(request.gateway, names[v]).latency_s,
            hop_s=lambda u, v: link(names[u], names[v]).latency_s,
            back_s=lambda u, _v: link(names[u], request.gateway).latency_s,
            width=WIDTH,
            firsts_max=0,
        )
        walk = shortest_walk(ground, range(len(able)))
        if walk is None:
            raise NoChain(range(*span))
        return [Stage(names[v], start + span[0], end + span[0]) for v, start, end in walk.stages]


def _speed(fleet: Fleet, name: str, span: Span) -> float:
    """Requests a second that a server announces for its layers."""
    return 1.0 / (fleet.members[name].read_s * (span[1] - span[0]))


def _add(total: list[float], span: Span, more: float) -> None:
    for layer in range(*span):
        total[layer] += more
