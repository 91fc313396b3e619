"""What chains would take for a request, as one gateway sees it now: which to take, and whether to go on with it.

Gateways choose by loads that are a second or two old, so many may choose alike. Each stage therefore says how much
work it has when a session is opened on it, and the gateway thinks again while nothing has come back yet: where the
first token would be late, another chain is asked that promises a sooner one. The daemon's gateways and the
simulator's decide by these functions. Pure; it sends nothing and probes nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.routing import RELIABILITY_LEAST, ChainRequest, Hosted, Router, Stage, prefill_s, queue_s
from scheduler.shapes import Links
from scheduler.terrain import Terrain

WAIT_WEIGHT = 4.0
"""Seconds of decoding that a second until the first token is worth."""
HURRY_WEIGHT = 64.0
"""The same where no chain found with WAIT_WEIGHT keeps the aims."""
MARGIN = 0.95
"""What is reckoned has to stay within this share of an aim."""
TRIES_MAX = 3
"""Chains that are left for better ones for one request."""
ALTERNATES = 2
TERRAIN_AGE_S_MAX = 10.0
"""After so long distances are asked for again, and the places of a large mesh where good chains are."""


@dataclass(frozen=True, slots=True)
class Aims:
    """What a request should keep, in seconds: `first_s` from now until its first token, `token_s` for each further one.

    A `strict` one is not worth serving when it would miss them.
    """

    first_s: float = float("inf")
    token_s: float = float("inf")
    strict: bool = False

    def missed(self, first_s: float, token_s: float) -> float:
        """By how much a chain that takes so long misses them (0: not at all, 1: takes twice as long)."""
        late = first_s / max(1e-3, self.first_s * MARGIN) - 1.0
        slow = token_s / (self.token_s * MARGIN) - 1.0
        return max(0.0, late) + max(0.0, slow)

    def refuse(self, first_s: float, token_s: float) -> bool:
        """Whether a request is not worth serving by a chain that takes so long."""
        return self.strict and (first_s > self.first_s or token_s > self.token_s)


@dataclass(frozen=True, slots=True)
class Offer:
    """A chain and what it should take: seconds until the first token and for each further one, its cost (waiting
    weighted, doubtful nodes dearer), and by how much it misses the aims (0: not at all, 1: takes twice as long)."""

    stages: tuple[Stage, ...]
    first_s: float
    token_s: float
    cost_s: float
    missed: float
    alternates: tuple[Offer, ...] = field(default=())

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better: the aims first, then the cost."""
        return self.missed, self.cost_s


class Surveyor:
    """Keeps the terrain that one gateway last found for a model, and gives it to the next router while the same spans
    are hosted; for TERRAIN_AGE_S_MAX at most, for distances are measured anew all the time."""

    def __init__(self) -> None:
        self._terrain: Terrain | None = None
        self._made_s = 0.0

    def router(self, hosted: Sequence[Hosted], links: Links, now_s: float) -> Router:
        """Over these hosts, with their loads of now."""
        ripe = now_s - self._made_s > TERRAIN_AGE_S_MAX
        router = Router(hosted, links, None if ripe else self._terrain)
        if router.terrain is not self._terrain:
            self._terrain, self._made_s = router.terrain, now_s
        return router


class Outlook:
    """Hosts as one gateway believes them to be. `chunk_tokens` of a prompt at a time go from stage to stage.

    A gateway that asks often gives its `surveyor` and the time, so that what loads do not change is worked out once.
    """

    def __init__(
        self,
        hosted: Sequence[Hosted],
        links: Links,
        *,
        chunk_tokens: int,
        surveyor: Surveyor | None = None,
        now_s: float = 0.0,
    ) -> None:
        self._hosted, self._links = hosted, links
        self._surveyor, self._now_s = surveyor or Surveyor(), now_s
        self._chunk_tokens = chunk_tokens
        self._router: Router | None = None
        self._hosts: dict[str, list[Hosted]] = {}
        for h in hosted:
            self._hosts.setdefault(h.node, []).append(h)

    @property
    def router(self) -> Router:
        """Over these hosts; made when it is first asked for, for whoever only weighs needs none."""
        if self._router is None:
            self._router = self._surveyor.router(self._hosted, self._links, self._now_s)
        return self._router

    def offer(self, request: ChainRequest, aims: Aims) -> Offer:
        """The chain to take, and others to fall back on.

        Of a few good chains the one drawn by the request's seed where it keeps the aims, else the one that misses them
        least. Raises NoChain and NoRoom, and Rejected where the aims are strict and no chain would keep them.
        """
        offers: list[Offer] = []
        for weight in (WAIT_WEIGHT, HURRY_WEIGHT):
            found = self.router.choose(replace(request, wait_weight=weight), alternates=ALTERNATES)
            for chain in (found, *found.alternates):
                offer = self.weigh(chain.stages, request, aims)
                if offer is not None and all(offer.stages != known.stages for known in offers):
                    offers.append(offer)
            if any(offer.missed <= 0 for offer in offers):
                break
        if not offers:
            raise NoChain(range(request.layers))
        best = offers[0] if offers[0].missed <= 0 else min(offers, key=lambda offer: offer.rank)
        if aims.refuse(best.first_s, best.token_s):
            raise Rejected(
                f"its first token would come after {best.first_s:.2f} s, each further one after {best.token_s:.3f} s",
                max(0.0, best.first_s - aims.first_s),
            )
        others = sorted((offer for offer in offers if offer is not best), key=lambda offer: offer.rank)
        return replace(best, alternates=tuple(others[:ALTERNATES]))

    def instead(
        self, stages: Sequence[Stage], request: ChainRequest, aims: Aims, *, tries: int
    ) -> Offer | None:
        """Another chain to take, now that the stages of this one have said how much work they have; None to go on.

        One goes on where the first token will be in time, where no other chain promises better, or after so many
        `tries`. Raises Rejected where the aims are strict and no first token will be in time.
        """
        mine = self.weigh(stages, request, aims)
        if mine is None or mine.first_s <= aims.first_s * MARGIN:
            return None
        if tries < TRIES_MAX:
            try:
                other = self.offer(request, aims)
            except (NoChain, NoRoom, Rejected):
                other = mine
            sooner = other.missed < mine.missed and other.first_s < mine.first_s * MARGIN
            if other.stages != mine.stages and sooner:
                return other
        if aims.strict and mine.first_s > aims.first_s:
            raise Rejected("none of the chains that were asked would answer in time")
        return None

    def has_room(self, stages: Sequence[Stage], request: ChainRequest) -> bool:
        """Whether a given chain is hosted, and each stage has cache room for the request."""
        hosts = [self._host(stage) for stage in stages]
        return all(h is not None and h.kv_tokens_free >= request.tokens for h in hosts)

    def weigh(self, stages: Sequence[Stage], request: ChainRequest, aims: Aims) -> Offer | None:
        """What a given chain would take; None where a stage of it is hosted no more."""
        hosts = [self._host(stage) for stage in stages]
        known = [h for h in hosts if h is not None]
        if not stages or len(known) < len(stages):
            return None
        first_s = self._first_s(stages, known, request)
        token_s = self._token_s(stages, known, request)
        cost_s = WAIT_WEIGHT * first_s + request.new_tokens * token_s
        for stage, h in zip(stages, known, strict=True):
            work_s = (
                WAIT_WEIGHT * _unread(stages, request) * prefill_s(h) + request.new_tokens * h.s_per_layer
            )
            doubt = 1.0 / max(RELIABILITY_LEAST, h.reliability) - 1.0
            cost_s += doubt * work_s * (stage.end - stage.start)
        return Offer(tuple(stages), first_s, token_s, cost_s, aims.missed(first_s, token_s))

    def _host(self, stage: Stage) -> Hosted | None:
        for h in self._hosts.get(stage.node, ()):
            if h.start <= stage.start < stage.end <= h.end:
                return h
        return None

    def _first_s(self, stages: Sequence[Stage], hosts: Sequence[Hosted], request: ChainRequest) -> float:
        """Seconds until the first token, the stages working on chunks one behind another; queues empty while the
        stages before them work."""
        tokens, at = _unread(stages, request), request.gateway
        chunk = min(self._chunk_tokens, tokens)
        here_s = last_s = self._links(at, stages[0].node).latency_s
        for k, (stage, h) in enumerate(zip(stages, hosts, strict=True)):
            start_s = max(here_s, queue_s(h, request.priority))
            work_s = tokens * (stage.end - stage.start) * prefill_s(h)
            chunk_s = work_s * chunk / tokens
            end_s = max(start_s + work_s, last_s + chunk_s)
            link = self._links(stage.node, stages[k + 1].node if k + 1 < len(stages) else at)
            if k + 1 == len(stages):
                return end_s + link.latency_s
            hop_s = link.seconds(chunk * request.hidden_bytes)
            here_s = start_s + chunk_s + hop_s
            last_s = max(end_s + hop_s, start_s + chunk_s + link.seconds(tokens * request.hidden_bytes))
        return last_s

    def _token_s(self, stages: Sequence[Stage], hosts: Sequence[Hosted], request: ChainRequest) -> float:
        """Seconds for each further token: the stages' work and the ring of hops."""
        total = sum(h.s_per_layer * (s.end - s.start) for s, h in zip(stages, hosts, strict=True))
        if len(stages) > 1:
            ring = zip(stages, [*stages[1:], stages[0]], strict=True)
            total += sum(self._links(a.node, b.node).seconds(request.hidden_bytes) for a, b in ring)
        return total


def _unread(stages: Sequence[Stage], request: ChainRequest) -> int:
    """Tokens of the prompt that the stages have to read: less what all of them hold in their caches."""
    if not request.prefix_nodes or not request.prefix_nodes.issuperset(stage.node for stage in stages):
        return request.prompt_tokens
    return max(1, request.prompt_tokens - (request.prefix_tokens or 9 * request.prompt_tokens // 10))
