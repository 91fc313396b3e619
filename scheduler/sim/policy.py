"""What a policy is to the simulator, and ours: the cores that the daemon runs, fed as the daemon feeds them.

A policy says who hosts what and which chain a request takes; everything it may know is in the fleet's members and in
a gateway's view. It never looks at what the others have not been told.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from scheduler.errors import Shortage
from scheduler.placement import make_plan, needs_replan
from scheduler.planner import adopt, planner_rank
from scheduler.routing import ChainRequest, Hosted, Stage, choose_chain
from scheduler.seating import seat_of
from scheduler.shapes import NodeShape, Plan
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Span
from scheduler.sim.request import Request

Orders = Mapping[str, Span | None]
MODEL = "simulated"
COPIES_MAX = 64


class Policy(Protocol):
    """`mends`: whether a request that loses a stage goes on elsewhere; `gossips`: whether loads are announced."""

    mends: bool
    gossips: bool
    tick_s: float
    replans: int

    def start(self, fleet: Fleet) -> Orders:
        """Who hosts what at the beginning. Raises Shortage."""

    def tick(self, fleet: Fleet) -> Orders:
        """What shall change now."""

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        """A chain. Raises NoChain or NoRoom."""

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        """Stages for the lost layers alone. Raises NoChain or NoRoom."""


def wish(fleet: Fleet, request: Request, exclude: frozenset[str], seed: int = 0) -> ChainRequest:
    """The request as phase 2 takes it."""
    return ChainRequest(
        layers=fleet.model.layers,
        tokens=request.tokens,
        prompt_tokens=request.ask.prompt_tokens,
        hidden_bytes=fleet.model.hidden_bytes,
        gateway=request.gateway,
        exclude=exclude,
        seed=seed,
    )


def part_of(hosts: Sequence[Hosted], lost: Span) -> list[Hosted]:
    """The hosts as a mesh that has only the lost layers, numbered from 0."""
    start, end = lost
    return [
        replace(h, start=max(h.start, start) - start, end=min(h.end, end) - start)
        for h in hosts
        if h.start < end and start < h.end
    ]


class Shoal:
    """Phase 1 by the first of the planners' rank, fenced by epoch; phase 2 at each gateway from what it was told,
    and from what it has itself sent since."""

    mends = True
    gossips = True

    def __init__(self, config: SimConfig) -> None:
        self.tick_s = config.plan_every_s
        self.replans = 0
        self.plan: Plan | None = None
        self._config = config
        self._rng = random.Random(f"{config.seed}/seeds")
        self._seen = -1
        self._copies = 1
        self._sent: dict[str, deque[tuple[float, str, float, int]]] = {g: deque() for g in _gateways(config)}

    def start(self, fleet: Fleet) -> Orders:
        nodes = self._nodes(fleet)
        self._copies = self._config.copies or copies_that_fit(self._config, nodes)
        self._replan(fleet, nodes)
        self._seen = fleet.version
        return self._orders(fleet)

    def tick(self, fleet: Fleet) -> Orders:
        if fleet.version == self._seen:
            return {}
        self._seen = fleet.version
        nodes = self._nodes(fleet)
        if needs_replan(self.plan, fleet.model, nodes, copies=self._copies) is None:
            return {}
        try:
            changed = self._replan(fleet, nodes)
        except Shortage:
            return {}
        return self._orders(fleet) if changed else {}

    def _nodes(self, fleet: Fleet) -> list[NodeShape]:
        return [machine.shape for machine in fleet.members.values()]

    def _replan(self, fleet: Fleet, nodes: Sequence[NodeShape]) -> bool:
        members = {node.id for node in nodes}
        plan = make_plan(
            MODEL, fleet.model, nodes, fleet.world.link,
            copies=self._copies,
            previous=self.plan,
            epoch=self.plan.epoch + 1 if self.plan else 1,
            planner=planner_rank(MODEL, members)[0],
            held={name: machine.disk for name, machine in fleet.members.items() if machine.disk},
        )  # fmt: skip
        if not adopt(self.plan, plan, members):
            return False
        self.plan = plan
        self.replans += 1
        return True

    def _orders(self, fleet: Fleet) -> Orders:
        spans = {a.node: (a.start, a.end) for a in self.plan.assignments} if self.plan else {}
        return {name: spans.get(name) for name in fleet.members}

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        hosts = self._known(fleet, request.gateway)
        exclude = frozenset(request.excluded)
        chain = choose_chain(hosts, fleet.world.link, wish(fleet, request, exclude, self._seed()))
        self._note(fleet, request, chain.stages, request.ask.prompt_tokens)
        return list(chain.stages)

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        hosts = part_of(self._known(fleet, request.gateway), lost)
        asked = wish(fleet, request, without, self._seed())
        asked = replace(asked, layers=lost[1] - lost[0], prompt_tokens=min(request.context, asked.tokens))
        chain = choose_chain(hosts, fleet.world.link, asked)
        stages = [Stage(s.node, s.start + lost[0], s.end + lost[0]) for s in chain.stages]
        self._note(fleet, request, stages, request.context)
        return stages

    def _seed(self) -> int:
        return self._rng.getrandbits(32) | 1

    def _note(self, fleet: Fleet, request: Request, stages: Sequence[Stage], tokens: int) -> None:
        now_s = fleet.clock.now_s
        for stage in stages:
            machine = fleet.members.get(stage.node)
            if machine is not None:
                seconds = tokens * (stage.end - stage.start) * machine.prompt_s
                self._sent[request.gateway].append((now_s, stage.node, seconds, request.tokens))

    def _known(self, fleet: Fleet, gateway: str) -> list[Hosted]:
        """The view, with what this gateway has sent since it was announced."""
        at_s, hosts = fleet.view(gateway)
        sent = self._sent[gateway]
        while sent and sent[0][0] <= at_s:
            sent.popleft()
        if not sent:
            return hosts
        more: dict[str, tuple[float, int]] = {}
        for _, name, seconds, tokens in sent:
            queue_s, kv_tokens = more.get(name, (0.0, 0))
            more[name] = (queue_s + seconds, kv_tokens + tokens)
        return [
            replace(
                h,
                queue_s=h.queue_s + more[h.node][0],
                kv_tokens_free=max(0, h.kv_tokens_free - more[h.node][1]),
            )
            if h.node in more
            else h
            for h in hosts
        ]


def _gateways(config: SimConfig) -> list[str]:
    return [f"g{k:03d}" for k in range(config.gateways)]


def copies_that_fit(config: SimConfig, nodes: Sequence[NodeShape]) -> int:
    """Whole copies that `memory_fill` of the mesh's rooms hold."""
    rooms = sum(seat_of(config.model, node).room for node in nodes)
    return max(1, min(COPIES_MAX, int(config.memory_fill * rooms / config.model.layers)))
