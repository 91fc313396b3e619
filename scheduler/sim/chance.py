"""No scheduler at all, to be compared with: windows of layers at random and chains at random.

A joiner covers a layer that nobody has if there is one, so that the mesh serves at all. Broken sessions are mended.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from scheduler.errors import NoChain
from scheduler.routing import Hosted, Stage
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Span
from scheduler.sim.petals import window_size
from scheduler.sim.policy import Orders
from scheduler.sim.request import Request


class AtRandom:
    """Windows at random (over a layer that nobody has, if there is one) and chains at random."""

    mends = True
    by_client = False
    gossips = False
    tick_s = 1.0

    def __init__(self, config: SimConfig) -> None:
        self.replans = 0
        self.announce_s = config.gossip_s
        self._rng = random.Random(f"{config.seed}/random")
        self._spans: dict[str, Span] = {}
        self._seen = -1

    def start(self, fleet: Fleet) -> Orders:
        return self.tick(fleet)

    def tick(self, fleet: Fleet) -> Orders:
        if fleet.version == self._seen:
            return {}
        self._seen = fleet.version
        self._spans = {name: span for name, span in self._spans.items() if name in fleet.members}
        counts = [0] * fleet.model.layers
        for span in self._spans.values():
            for layer in range(*span):
                counts[layer] += 1
        orders: dict[str, Span | None] = {}
        for name, machine in fleet.members.items():
            size = min(window_size(machine), fleet.model.layers)
            if size > 0 and (name not in self._spans or (machine.target is None and machine.up)):
                start = self._rng.randrange(fleet.model.layers - size + 1)
                if 0 in counts:
                    start = min(counts.index(0), fleet.model.layers - size)
                self._spans[name] = orders[name] = (start, start + size)
                for layer in range(start, start + size):
                    counts[layer] += 1
        return orders

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        hosts = list(fleet.view().hosts.values())
        return self._any(hosts, (0, fleet.model.layers), frozenset(request.excluded))

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        return True

    def served(self, request: Request, now_s: float) -> None:
        """Prefixes are reused where chance brings them together."""

    def ended(self, request: Request, now_s: float) -> None:
        """Nothing is kept of it."""

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        hosts = list(fleet.view().hosts.values())
        return self._any(hosts, lost, without)

    def _any(self, hosts: Sequence[Hosted], span: Span, without: frozenset[str]) -> list[Stage]:
        stages: list[Stage] = []
        at, used = span[0], set(without)
        while at < span[1]:
            able = [h for h in hosts if h.start <= at < h.end and h.node not in used]
            if not able:
                raise NoChain([at])
            host = self._rng.choice(able)
            end = min(host.end, span[1])
            stages.append(Stage(host.node, at, end))
            used.add(host.node)
            at = end
        return stages
