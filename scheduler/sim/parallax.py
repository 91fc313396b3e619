"""A mesh as Parallax runs it, to be compared with: re-implemented from its sources at commit 162354a (2026-07-01).

Copied: pipelines by its dynamic program (greedy beyond a dozen nodes, where the program takes minutes) with layers cut
by arithmetic speed (src/scheduling/layer_allocation.py); requests round robin over fixed pipelines that share no node
(request_routing.py, its default "rr"); a pipeline that loses a node is out with its requests, its other nodes stand by
(node_management.py); a joiner lets new pipelines be formed from the nodes that stand by (expand_pipelines), otherwise
nothing is rebalanced until no pipeline is left (should_global_rebalance, whose threshold is infinite).
Kinder than life: a dead node is noticed in seconds where its heartbeat takes 30, and the batching is ours. The mending
variant is kinder yet: pipelines are formed from idle nodes as soon as some suffice, and a broken request starts again
on another pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.errors import NoChain
from scheduler.pool import Pool
from scheduler.routing import Stage
from scheduler.seating import hops_between, seat_of, shortage
from scheduler.sim.baselines import parallax_program
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Machine, Span
from scheduler.sim.policy import Orders
from scheduler.sim.request import Request

Pipeline = tuple[Stage, ...]


class Parallax:
    """Pipelines and their turn."""

    by_client = False
    gossips = False
    tick_s = 2.0

    def __init__(self, config: SimConfig, *, mends: bool) -> None:
        self.mends = mends
        self.replans = 0
        self.announce_s = config.gossip_s
        self._pipelines: list[Pipeline] = []
        self._turn = 0
        self._seen = -1
        self._known: set[str] = set()

    def start(self, fleet: Fleet) -> Orders:
        self._seen = fleet.version
        self._known = set(fleet.members)
        orders = self._form(fleet, list(fleet.members.values()))
        if not self._pipelines:
            nodes = [m.shape for m in fleet.members.values()]
            raise shortage(fleet.model, nodes, [seat_of(fleet.model, node) for node in nodes])
        return orders

    def tick(self, fleet: Fleet) -> Orders:
        if fleet.version == self._seen:
            return {}
        self._seen = fleet.version
        self._pipelines = [p for p in self._pipelines if all(self._stands(fleet, s) for s in p)]
        busy = {stage.node for pipeline in self._pipelines for stage in pipeline}
        joined = set(fleet.members) - self._known
        self._known = set(fleet.members)
        if self._pipelines and not self.mends and not joined:
            return {}
        return self._form(fleet, [m for name, m in fleet.members.items() if name not in busy])

    def _stands(self, fleet: Fleet, stage: Stage) -> bool:
        machine = fleet.members.get(stage.node)
        return machine is not None and machine.target == (stage.start, stage.end)

    def _form(self, fleet: Fleet, machines: Sequence[Machine]) -> Orders:
        """New pipelines from idle machines."""
        usable = [m for m in machines if m.up]
        model = fleet.model
        seats = [seat_of(model, m.shape) for m in usable]
        hop = hops_between(model, [m.name for m in usable], fleet.world.link)
        orders: dict[str, Span | None] = {}
        power = [m.shape.flops_per_s for m in usable]
        for replica in parallax_program(Pool(seats, model.layers, hop), power):
            stages, start = [], 0
            for seat, count in zip(replica.seats, replica.counts, strict=True):
                stages.append(Stage(usable[seat].name, start, start + count))
                orders[usable[seat].name] = (start, start + count)
                start += count
            self._pipelines.append(tuple(stages))
        self.replans += bool(orders)
        return orders

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        for _ in range(len(self._pipelines)):
            pipeline = self._pipelines[self._turn % len(self._pipelines)]
            self._turn += 1
            machines = [fleet.members.get(stage.node) for stage in pipeline]
            ready = all(
                m is not None and m.span == (s.start, s.end) for m, s in zip(machines, pipeline, strict=True)
            )
            if ready and not any(stage.node in request.excluded for stage in pipeline):
                return list(pipeline)
        raise NoChain(range(fleet.model.layers))

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        return True

    def served(self, request: Request, now_s: float) -> None:
        """Prefixes are reused where chance brings them together."""

    def ended(self, request: Request, now_s: float) -> None:
        """Nothing is kept of it."""

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        raise NoChain(range(*lost))
