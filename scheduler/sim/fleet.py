"""The nodes of a simulated mesh: who is up, what each hosts or fetches, and what the gateways know of it.

Nodes leave and come by a seeded Poisson process whose rates swing over the day. It carries out orders (host this span)
with the bytes and the time they take; it gives no orders and knows requests only as sessions to be told of.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scheduler.mend import fetch_bytes
from scheduler.routing import Hosted
from scheduler.sim.clock import Clock
from scheduler.sim.config import SimConfig
from scheduler.sim.machine import Machine, Span
from scheduler.sim.request import Request
from scheduler.sim.world import World

DRAIN_S = 30.0
DAY_S = 86_400.0
Broken = Callable[[list[Request], Machine, float], None]
Hosts = dict[str, Hosted]


@dataclass(frozen=True, slots=True)
class View:
    """The hosts that gateways know of, by name; `version` is another one where some came, went or changed span."""

    hosts: Hosts
    version: tuple[int, int]


class Fleet:
    """`up` are the nodes that are up, `members` those the others think are. `on_broken` hears of lost sessions."""

    def __init__(self, config: SimConfig, world: World, clock: Clock, on_broken: Broken) -> None:
        self.config, self.world, self.clock = config, world, clock
        self.model = config.model
        self.up: dict[str, Machine] = {}
        self.members: dict[str, Machine] = {}
        self.version = 0
        self.bytes_moved = 0
        self.left = self.joined = 0
        self.hosts_of_layer = [0] * config.model.layers
        self._on_broken = on_broken
        self._rng = random.Random(f"{config.seed}/churn")
        self._away: list[Machine] = []
        self._hosts: Hosts = {}
        self._calm: set[str] = set()
        self._snapshots: deque[tuple[float, int, Hosts]] = deque()
        self._topology = 0
        self._view: tuple[float, int, View] | None = None
        for _ in range(config.nodes):
            self._enter(self._new())

    # -- who is up

    def _new(self, shape_of: Machine | None = None) -> Machine:
        shape = self.world.draw() if shape_of is None else shape_of.shape
        machine = Machine(shape, self.model, self.world.line_bytes_per_s(shape.id), self.config.slice_s)
        if shape_of is not None:
            machine.disk = list(shape_of.disk)
        return machine

    def _enter(self, machine: Machine) -> None:
        self.up[machine.name] = self.members[machine.name] = machine
        self.version += 1

    def start_churn(self, until_s: float) -> None:
        """Let nodes leave and come until then."""
        each_s = self.config.churn_per_hour * self.config.nodes / 3600.0
        if each_s > 0:
            top = each_s * (1 + self.config.diurnal)
            self.clock.at(self._rng.expovariate(top), self._maybe, self._leave, 1.0, top, until_s)
            self.clock.at(self._rng.expovariate(top), self._maybe, self._join, -1.0, top, until_s)

    def _maybe(self, what: Callable[[], None], sign: float, top: float, until_s: float) -> None:
        """One candidate of a Poisson process at its highest rate, kept with the rate of this time of day."""
        swing = self.config.diurnal * sign * math.sin(2 * math.pi * self.clock.now_s / DAY_S)
        if self._rng.random() * (1 + self.config.diurnal) < 1 + swing:
            what()
        next_s = self.clock.now_s + self._rng.expovariate(top)
        if next_s <= until_s:
            self.clock.at(next_s, self._maybe, what, sign, top, until_s)

    def _join(self) -> None:
        if self._away and self._rng.random() < self.config.return_share:
            old = self._away.pop(self._rng.randrange(len(self._away)))
            self._enter(self._new(old))
        else:
            self._enter(self._new())
        self.joined += 1

    def _leave(self) -> None:
        if self.up:
            self.remove(self._rng.choice(list(self.up)), crash=self._rng.random() < self.config.crash_share)

    def remove(self, name: str, *, crash: bool) -> None:
        """A node goes; the others notice a crash after `detect_s`, a farewell at once."""
        machine = self.up.pop(name)
        self._count(machine, -1)
        machine.up, machine.died_s = False, self.clock.now_s
        machine.change += 1
        self._away.append(machine)
        self.left += 1
        notice_s = self.clock.now_s + (self.config.detect_s if crash else 0.0)
        broken = list(machine.sessions.values())
        machine.sessions.clear()
        self.clock.at(notice_s, self._noticed, machine)
        self._on_broken(broken, machine, notice_s)

    def _noticed(self, machine: Machine) -> None:
        if self.members.get(machine.name) is machine:
            del self.members[machine.name]
        self.version += 1

    # -- what they host

    def order(self, spans: Mapping[str, Span | None], *, at_once: bool = False) -> None:
        """Have nodes host these spans, None for nothing; `at_once` skips fetching, for the state at the start."""
        for name, span in spans.items():
            machine = self.up.get(name)
            if machine is None or machine.target == span:
                continue
            machine.target = span
            machine.change += 1
            machine.kv_free_bytes += machine.set_aside_bytes
            machine.set_aside_bytes = 0
            if at_once:
                self._settle(machine, span)
            elif span is not None and _inside(machine.span, span) and not machine.draining:
                self._grow(machine, span, machine.change)
            else:
                self._drain(machine, machine.change, self.clock.now_s + DRAIN_S)

    def _drain(self, machine: Machine, change: int, end_s: float) -> None:
        if machine.change != change or not machine.up:
            return
        if not machine.draining:
            self._count(machine, -1)
            machine.draining = True
            self._calm.discard(machine.name)
        if machine.sessions and self.clock.now_s < end_s:
            self.clock.at(self.clock.now_s + 1.0, self._drain, machine, change, end_s)
            return
        broken = list(machine.sessions.values())
        machine.sessions.clear()
        self._settle(machine, None)
        if broken:
            self._on_broken(broken, machine, self.clock.now_s)
        self._fetch(machine, None, machine.target, change)

    def _grow(self, machine: Machine, span: Span, change: int) -> None:
        """Set cache room aside for the weights to come, as soon as there is some, and go on serving meanwhile."""
        if machine.change != change or not machine.up:
            return
        old = machine.span or span
        extra = self.model.weight_bytes(*span) - self.model.weight_bytes(*old)
        if machine.kv_free_bytes < extra:
            self.clock.at(self.clock.now_s + 5.0, self._grow, machine, span, change)
            return
        machine.kv_free_bytes -= extra
        machine.set_aside_bytes = extra
        self._fetch(machine, old, span, change)

    def _fetch(self, machine: Machine, old: Span | None, span: Span | None, change: int) -> None:
        if span is None:
            return
        moved = fetch_bytes(self.model, old, span, machine.disk)
        weights = self.model.weight_bytes(*span) - (self.model.weight_bytes(*old) if old else 0)
        self.bytes_moved += moved
        seconds = moved / machine.line_bytes_per_s + weights / self.config.load_read_bytes_per_s
        self.clock.at(self.clock.now_s + seconds, self._ready, machine, old, span, change)

    def _ready(self, machine: Machine, old: Span | None, span: Span, change: int) -> None:
        if machine.change != change or not machine.up:
            return
        if old is None:
            self._settle(machine, span)
            return
        self._count(machine, -1)
        machine.span, machine.set_aside_bytes = span, 0
        machine.disk.append(span)
        self._count(machine, 1)
        self._calm.discard(machine.name)

    def _settle(self, machine: Machine, span: Span | None) -> None:
        self._count(machine, -1)
        machine.settle(span)
        machine.target = span if span is not None else machine.target
        self._count(machine, 1)
        self._calm.discard(machine.name)

    def _count(self, machine: Machine, step: int) -> None:
        if machine.span is not None and not machine.draining:
            for layer in range(*machine.span):
                self.hosts_of_layer[layer] += step

    def covered(self) -> bool:
        """Whether every layer has a host that is really up."""
        return min(self.hosts_of_layer) > 0

    # -- what gateways know

    def announce(self) -> None:
        """Every node's load goes out; gateways work with it once it is `view_age_s` old."""
        hosts: Hosts = {}
        moved = False
        for name, machine in self.members.items():
            known = self._hosts.get(name)
            calm = not machine.sessions and machine.free_at_s <= self.clock.now_s
            if known is not None and (not machine.up or (calm and name in self._calm)):
                hosts[name] = known
            elif machine.serving:
                hosts[name] = new = self._hosted(machine)
                moved |= known is None or (known.start, known.end) != (new.start, new.end)
                (self._calm.add if calm else self._calm.discard)(name)
        self._topology += moved or len(hosts) != len(self._hosts)
        self._hosts = hosts
        self._snapshots.append((self.clock.now_s, self._topology, hosts))
        ripe_s = self.clock.now_s - self.config.view_age_s
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= ripe_s + 1e-9:
            self._snapshots.popleft()

    def _hosted(self, machine: Machine) -> Hosted:
        start, end = machine.span or (0, 0)
        now_s, last = self.clock.now_s, end == self.model.layers
        return Hosted(
            node=machine.name,
            start=start,
            end=end,
            s_per_layer=machine.visit_s(end - start, last, now_s) / (end - start),
            queue_s=machine.backlog_s(now_s),
            kv_tokens_free=machine.kv_tokens_free(),
            prefill_s_per_token_per_layer=machine.prompt_s / machine.prompt_share(),
        )

    def view(self) -> View:
        """What gateways know of the hosts: those announced a while ago, without who was noticed to be gone since."""
        at_s, topology, hosts = self._snapshots[0]
        known = self._view
        if known is None or known[:2] != (at_s, self.version):
            found = {name: h for name, h in hosts.items() if name in self.members}
            known = self._view = at_s, self.version, View(found, (topology, self.version))
        return known[2]


def _inside(old: Span | None, new: Span) -> bool:
    return old is not None and new[0] <= old[0] and old[1] <= new[1]
