"""What a policy is to the simulator, and ours: the cores that the daemon runs, fed with what its nodes would know.

A policy says who hosts what and which chain a request takes; everything it may know is in the fleet's members and in
a gateway's view. It never looks at what the others have not been told. Ours plans by `scheduler.online` and chooses by
`ledger` and `outlook`, as the daemon does. What differs: figures of nodes are exact from the start, so health and
corrections have nothing to do; every client names its times, as the daemon's may with a first token and a deadline;
the prompt waits until the stages have spoken, where the daemon sends it along; of very many hosts a gateway weighs
some (`scheduler.vicinity`), where the daemon weighs all; and a stage that is lost after the first token is replaced,
which the daemon does not do yet: there such a stream ends with an error.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from scheduler.board import Facts
from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.ledger import Ledger
from scheduler.online import Event, Joined, Left, MeshPlanner, ModelAdded, Observed, PlanSeen, Tick
from scheduler.outlook import Aims, Outlook, Surveyor
from scheduler.planner import MESH, planner_rank
from scheduler.routing import ChainRequest, Hosted, Stage, choose_chain
from scheduler.seating import seat_of, shortage
from scheduler.shapes import NodeShape, Plan
from scheduler.sharing import Wanted
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Span
from scheduler.sim.request import Request
from scheduler.sim.trace import BLOCK_TOKENS
from scheduler.vicinity import Vicinity

Orders = Mapping[str, Span | None]
MODEL = "simulated"
WIDER = 4
"""Before a request is refused so many times the hosts are weighed."""
PREFIXES_MAX = 100_000


class Policy(Protocol):
    """`mends`: whether a request that loses a stage goes on elsewhere; `gossips`: whether loads are announced;
    `by_client`: whether every token goes by way of the client on its way from the last stage to the first. Loads are
    announced every `announce_s`."""

    mends: bool
    gossips: bool
    by_client: bool
    announce_s: float
    tick_s: float
    replans: int

    def start(self, fleet: Fleet) -> Orders:
        """Who hosts what at the beginning. Raises Shortage."""

    def tick(self, fleet: Fleet) -> Orders:
        """What shall change now."""

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        """A chain. Raises NoChain or NoRoom; Rejected when it is not worth waiting for."""

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        """Whether to go on, now that every stage of the chain has said how much work it had when it was asked."""

    def served(self, request: Request, now_s: float) -> None:
        """The stages of the request have read its prompt and keep its cache."""

    def ended(self, request: Request, now_s: float) -> None:
        """The request is over, or gives up its chain."""

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


class _Gateway:
    """What one gateway keeps between requests: its sessions, the hosts it weighs, and what they are like."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.ledger = Ledger()
        self.surveyors = (Surveyor(), Surveyor())
        link = fleet.world.link
        self._vicinity = Vicinity(name, lambda node: link(name, node).latency_s)

    def weighed(self, fleet: Fleet, *, wide: bool = False) -> list[Hosted]:
        """The hosts to choose among."""
        view = fleet.view()
        if len(view.hosts) <= fleet.config.view_nodes_max:
            return list(view.hosts.values())
        depth = self._vicinity.depth(self.ledger.running()) * (WIDER if wide else 1)
        names = self._vicinity.pick(view.hosts, fleet.model.layers, depth, view.version)
        return [view.hosts[name] for name in names]


class Shoal:
    """Phase 1 by the first of the planners' rank, fenced by epoch; phase 2 at each gateway from its view, its own
    sessions, and what stages said to it."""

    mends = True
    gossips = True
    by_client = False

    def __init__(self, config: SimConfig) -> None:
        self.tick_s = config.plan_every_s
        self.announce_s = config.gossip_s
        self.replans = 0
        self._config = config
        self._rng = random.Random(f"{config.seed}/seeds")
        self._seen = -1
        self._copies = 1
        self._planner: MeshPlanner | None = None
        self._plan: Plan | None = None
        self._gateways: dict[str, _Gateway] = {}
        self._prefixes: dict[int, tuple[float, frozenset[str]]] = {}

    def start(self, fleet: Fleet) -> Orders:
        nodes = [machine.shape for machine in fleet.members.values()]
        self._copies = self._config.copies or copies_that_fit(self._config, nodes)
        orders = self.tick(fleet)
        if self._planner is None or MODEL not in self._planner.plans:
            raise shortage(fleet.model, nodes, [seat_of(fleet.model, node) for node in nodes])
        return orders

    def tick(self, fleet: Fleet) -> Orders:
        now_s = fleet.clock.now_s
        planner = self._planner_of(fleet)
        events: list[Event] = [Left(name) for name in planner.nodes if name not in fleet.members]
        events += [Joined(machine.shape) for machine in fleet.members.values()]
        facts = Facts(
            held={name: tuple(machine.disk) for name, machine in fleet.members.items() if machine.disk},
            sessions={name: len(machine.sessions) for name, machine in fleet.members.items()},
        )
        planner.handle_all([*events, Observed(MODEL, facts), Tick()], now_s)
        plan = planner.held.get(MODEL)
        if plan == self._plan and fleet.version == self._seen:
            return {}
        self.replans += plan != self._plan
        self._plan, self._seen = plan, fleet.version
        spans = {a.node: (a.start, a.end) for a in plan.assignments} if plan else {}
        return {name: spans.get(name) for name in fleet.members}

    def _planner_of(self, fleet: Fleet) -> MeshPlanner:
        """The planner of the member that ranks first. Who takes over knows the members, the model and the last plan."""
        first = planner_rank(MESH, fleet.members)[0] if fleet.members else ""
        if self._planner is None or self._planner.first != first or first not in self._planner.nodes:
            wanted = Wanted(fleet.model, copies=self._copies, copies_max=self._copies)
            events: list[Event] = [Joined(machine.shape) for machine in fleet.members.values()]
            events.append(ModelAdded(MODEL, wanted))
            if self._plan is not None:
                events.append(PlanSeen(self._plan))
            self._planner = MeshPlanner(
                first, fleet.world.link, second_thoughts_s=self._config.second_thoughts_s
            )
            self._planner.handle_all(events, fleet.clock.now_s)
        return self._planner

    def choose(self, fleet: Fleet, request: Request) -> list[Stage]:
        session, asked = _session(request), self._asked(fleet, request)
        aims = self._aims(fleet, request)
        try:
            offer = self._outlook(fleet, request, session).offer(asked, aims)
        except (NoChain, NoRoom, Rejected):
            if len(fleet.view().hosts) <= self._config.view_nodes_max:
                raise
            offer = self._outlook(fleet, request, session, wide=True).offer(asked, aims)
        stages = list(offer.stages)
        self._gateways[request.gateway].ledger.opened(
            session, MODEL, stages, tokens=request.tokens,
            prompt_tokens=request.ask.prompt_tokens, priority=0, now_s=fleet.clock.now_s,
        )  # fmt: skip
        return stages

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        session, ledger = _session(request), self._gateways[request.gateway].ledger
        for k, stage in enumerate(request.stages):
            ledger.heard(session, k, (queues[stage.node],))
        if request.first_s is not None:
            return True
        outlook, aims = self._outlook(fleet, request, session), self._aims(fleet, request)
        better = outlook.instead(request.stages, self._asked(fleet, request), aims, tries=request.tries)
        if better is not None:
            ledger.closed(session, fleet.clock.now_s)
            request.tries += 1
        return better is None

    def ended(self, request: Request, now_s: float) -> None:
        if request.gateway in self._gateways:
            self._gateways[request.gateway].ledger.closed(_session(request), now_s)

    def _aims(self, fleet: Fleet, request: Request) -> Aims:
        """What the client asks for; until its first token it counts from the arrival."""
        targets = self._config.targets
        if request.first_s is not None:
            return Aims(token_s=targets.tpot_s)
        left_s = targets.ttft_s - (fleet.clock.now_s - request.ask.at_s)
        return Aims(left_s, targets.tpot_s, strict=self._config.early_rejection)

    def _outlook(self, fleet: Fleet, request: Request, session: str, *, wide: bool = False) -> Outlook:
        """All hosts as this gateway believes them to be, or where there are very many those that it weighs; `wide`:
        WIDER times as many."""
        gateway = self._gateway(fleet, request.gateway)
        hosts = gateway.weighed(fleet, wide=True) if wide else self.weighed(fleet, request.gateway)
        known = gateway.ledger.adjusted(MODEL, hosts, hosts, fleet.clock.now_s, without=session)
        return Outlook(
            known,
            fleet.world.link,
            chunk_tokens=self._config.chunk_tokens,
            surveyor=gateway.surveyors[wide],
            now_s=fleet.clock.now_s,
        )

    def weighed(self, fleet: Fleet, gateway: str) -> list[Hosted]:
        """The hosts that a gateway looks at first: all, or where there are very many some for every layer."""
        return self._gateway(fleet, gateway).weighed(fleet)

    def _gateway(self, fleet: Fleet, name: str) -> _Gateway:
        if name not in self._gateways:
            self._gateways[name] = _Gateway(fleet, name)
        return self._gateways[name]

    def _asked(self, fleet: Fleet, request: Request) -> ChainRequest:
        """The request, with the nodes that hold most of its prompt as they announced with their loads."""
        asked = wish(fleet, request, frozenset(request.excluded), self._seed())
        ripe_s = fleet.clock.now_s - self._config.view_age_s
        blocks = request.ask.blocks
        for k in range(len(blocks), 0, -1):
            known = self._prefixes.get(blocks[k - 1])
            if known is not None and known[0] <= ripe_s:
                return replace(asked, prefix_nodes=known[1], prefix_tokens=k * BLOCK_TOKENS)
        return asked

    def served(self, request: Request, now_s: float) -> None:
        nodes = frozenset(stage.node for stage in request.stages)
        for block in request.ask.blocks:
            self._prefixes.pop(block, None)
            self._prefixes[block] = (now_s, nodes)
        while len(self._prefixes) > PREFIXES_MAX:
            del self._prefixes[next(iter(self._prefixes))]

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        asked = wish(fleet, request, without, self._seed())
        asked = replace(asked, layers=lost[1] - lost[0], prompt_tokens=min(request.context, asked.tokens))
        try:
            near = part_of(self.weighed(fleet, request.gateway), lost)
            chain = choose_chain(near, fleet.world.link, asked, alternates=0)
        except (NoChain, NoRoom):
            every = part_of(list(fleet.view().hosts.values()), lost)
            chain = choose_chain(every, fleet.world.link, asked, alternates=0)
        return [Stage(s.node, s.start + lost[0], s.end + lost[0]) for s in chain.stages]

    def _seed(self) -> int:
        return self._rng.getrandbits(32) | 1


def _session(request: Request) -> str:
    """A chain that is left for a better one was a session of its own."""
    return f"{request.number}/{request.tries}"


def copies_that_fit(config: SimConfig, nodes: Sequence[NodeShape]) -> int:
    """More whole copies than the mesh's rooms hold by half: a plan that cannot be had whole is mended by additions
    and never made anew for the last copy."""
    rooms = sum(seat_of(config.model, node).room for node in nodes)
    return max(1, int(1.5 * rooms / config.model.layers))
