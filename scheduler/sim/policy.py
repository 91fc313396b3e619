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

from scheduler.errors import Rejected, Shortage
from scheduler.placement import make_plan, needs_replan
from scheduler.planner import adopt, planner_rank
from scheduler.routing import ChainRequest, Hosted, Stage, choose_chain
from scheduler.seating import seat_of
from scheduler.shapes import NodeShape, Plan
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.foresight import Foresight, State, Usual
from scheduler.sim.machine import Span
from scheduler.sim.request import Request
from scheduler.sim.trace import BLOCK_TOKENS

Orders = Mapping[str, Span | None]
MODEL = "simulated"
COPIES_MAX = 64
USUAL_S = 30.0
HURRY_WEIGHT = 64.0
PREFIXES_MAX = 100_000
MARGIN = 0.95
"""What is foreseen has to stay within this share of a target."""
TPOT_MARGIN = 0.95
TRIES_MAX = 3
"""Chains that are asked for one request because the queues of those before were longer than foreseen."""


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
    """Phase 1 by the first of the planners' rank, fenced by epoch; phase 2 at each gateway from what it was told
    and what has probably happened since."""

    mends = True
    gossips = True
    by_client = False

    def __init__(self, config: SimConfig) -> None:
        self.tick_s = config.plan_every_s
        self.announce_s = config.gossip_s
        self.replans = 0
        self.plan: Plan | None = None
        self._config = config
        self._rng = random.Random(f"{config.seed}/seeds")
        self._seen = -1
        self._copies = 1
        self._foresight: dict[str, tuple[tuple[float, int], Foresight]] = {}
        self._prefixes: dict[int, tuple[float, frozenset[str]]] = {}
        self._said: dict[str, dict[str, tuple[float, float]]] = {}
        self._asked: deque[tuple[float, int, int]] = deque()

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
        if not nodes or needs_replan(self.plan, fleet.model, nodes, copies=self._copies) is None:
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
            prefer="latency",
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
        """The least costly of a few chains that promise to keep both targets.

        A prompt that no chain would serve in time is refused at once where `early_rejection` says so, and served as
        well as can be where not.
        """
        asked = self._with_prefix(
            wish(fleet, request, frozenset(request.excluded), self._seed()), fleet, request
        )
        now_s = fleet.clock.now_s
        left_s = self._config.targets.ttft_s - (now_s - request.ask.at_s)
        urgent = self._config.early_rejection and request.first_s is None
        if urgent and left_s < 0:
            raise Rejected("its target passed while it waited")
        state = self._state(fleet, asked).told(self._heard(fleet, request.gateway))
        best: tuple[float, float, float, tuple[Stage, ...]] | None = None
        for weight in (self._config.wait_weight, HURRY_WEIGHT):
            found = state.choose(asked, weight, alternates=2)
            for chain in (found, *found.alternates):
                offer = self._weighed(state, chain.stages, asked, left_s)
                best = offer if best is None or offer[:2] < best[:2] else best
            if best is not None and best[0] <= 0:
                break
        if urgent and request.tries > TRIES_MAX:
            raise Rejected(f"{request.tries} chains were asked and none would answer in time")
        if best is None or (urgent and best[2] > left_s * self._config.rejection_slack):
            raise Rejected(f"its first token would come too late: {left_s:.1f} s are left")
        if not request.counted:
            request.counted = True
            self._asked.append((now_s, request.ask.prompt_tokens, request.tokens))
        request.asked_s = now_s
        return list(best[3])

    def _weighed(
        self, state: State, stages: tuple[Stage, ...], asked: ChainRequest, left_s: float
    ) -> tuple[float, float, float, tuple[Stage, ...]]:
        """By how much a chain misses the targets (0: not at all), its cost, its seconds to the first token."""
        first_s = state.first_token_s(stages, asked, self._config.chunk_tokens)
        token_s = state.token_s(stages, asked)
        late = max(0.0, first_s / max(1e-3, left_s * MARGIN) - 1.0)
        slow = max(0.0, token_s / (self._config.targets.tpot_s * TPOT_MARGIN) - 1.0)
        cost_s = self._config.wait_weight * first_s + asked.new_tokens * token_s
        return late + slow, cost_s, first_s, stages

    def confirm(self, fleet: Fleet, request: Request, queues: Mapping[str, float]) -> bool:
        """Stages say with their yes how much work they had. If the first token would come too late with that, another
        chain is asked, TRIES_MAX times at most; what was said is kept in mind."""
        now_s = fleet.clock.now_s
        heard = self._said.setdefault(request.gateway, {})
        heard.update({name: (request.asked_s, queue_s) for name, queue_s in queues.items()})
        if request.first_s is not None:
            return True
        asked = self._with_prefix(wish(fleet, request, frozenset()), fleet, request)
        state = self._state(fleet, asked).told(self._heard(fleet, request.gateway))
        if any(stage.node not in state.queues_s for stage in request.stages):
            return True
        left_s = self._config.targets.ttft_s - (now_s - request.ask.at_s)
        first_s = state.first_token_s(request.stages, asked, self._config.chunk_tokens)
        if first_s > left_s * MARGIN:
            request.tries += 1
            return request.tries > TRIES_MAX and not self._config.early_rejection
        for stage in request.stages:
            work_s = request.promises.get(request.stages.index(stage), 0.0)
            if stage.node in heard:
                heard[stage.node] = (heard[stage.node][0], heard[stage.node][1] + work_s)
        return True

    def served(self, request: Request, now_s: float) -> None:
        nodes = frozenset(stage.node for stage in request.stages)
        for block in request.ask.blocks:
            self._prefixes.pop(block, None)
            self._prefixes[block] = (now_s, nodes)
        while len(self._prefixes) > PREFIXES_MAX:
            del self._prefixes[next(iter(self._prefixes))]

    def _with_prefix(self, asked: ChainRequest, fleet: Fleet, request: Request) -> ChainRequest:
        """The request with the nodes that hold most of its prompt, as they announced with their loads."""
        ripe_s = fleet.clock.now_s - self._config.view_age_s
        blocks = request.ask.blocks
        for k in range(len(blocks), 0, -1):
            known = self._prefixes.get(blocks[k - 1])
            if known is not None and known[0] <= ripe_s:
                return replace(asked, prefix_nodes=known[1], prefix_tokens=k * BLOCK_TOKENS)
        return asked

    def _heard(self, fleet: Fleet, gateway: str) -> dict[str, float]:
        """Queues as their nodes told the gateway after what its view says of them, less the time since."""
        view_s, now_s = fleet.view(gateway)[0], fleet.clock.now_s
        said = self._said.get(gateway, {})
        for name in [name for name, (at_s, _) in said.items() if at_s <= view_s]:
            del said[name]
        return {name: max(0.0, queue_s - (now_s - at_s)) for name, (at_s, queue_s) in said.items()}

    def splice(self, fleet: Fleet, request: Request, lost: Span, without: frozenset[str]) -> list[Stage]:
        _, hosts = fleet.view(request.gateway)
        asked = wish(fleet, request, without, self._seed())
        asked = replace(asked, layers=lost[1] - lost[0], prompt_tokens=min(request.context, asked.tokens))
        chain = choose_chain(part_of(hosts, lost), fleet.world.link, asked, alternates=0)
        return [Stage(s.node, s.start + lost[0], s.end + lost[0]) for s in chain.stages]

    def _seed(self) -> int:
        return self._rng.getrandbits(32) | 1

    def _state(self, fleet: Fleet, asked: ChainRequest) -> State:
        """The mesh as this gateway foresees it. Gateways with one view foresee alike, so they share the work here."""
        at_s, hosts = fleet.view(asked.gateway)
        place = asked.gateway if fleet.partial else ""
        known = self._foresight.get(place)
        if known is None or known[0] != (at_s, fleet.version):
            usual = self._usual(at_s, min(1.0, len(hosts) / max(1, fleet.hosting)))
            made = Foresight(hosts, fleet.world.link, asked, usual, self._config.wait_weight)
            known = self._foresight[place] = ((at_s, fleet.version), made)
        return known[1].after(fleet.clock.now_s - at_s if self._config.foresight else 0.0)

    def _usual(self, at_s: float, share: float) -> Usual:
        """The load of the last seconds before the view, as gateways announce it with what they know."""
        asked = self._asked
        while asked and asked[0][0] < at_s - USUAL_S:
            asked.popleft()
        seen = [(prompt, tokens) for when_s, prompt, tokens in asked if when_s <= at_s]
        count = max(1, len(seen))
        return Usual(
            share * len(seen) / max(1.0, min(USUAL_S, at_s)),
            max(1, sum(prompt for prompt, _ in seen) // count),
            max(2, sum(tokens for _, tokens in seen) // count),
        )


def copies_that_fit(config: SimConfig, nodes: Sequence[NodeShape]) -> int:
    """More whole copies than the mesh's rooms hold by half: a plan that cannot be had whole is mended by additions
    and never made anew for the last copy."""
    rooms = sum(seat_of(config.model, node).room for node in nodes)
    return max(1, min(COPIES_MAX, int(1.5 * rooms / config.model.layers)))
