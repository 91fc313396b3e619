"""Phase 2: a chain for a request, over what is hosted now.

The cost of a chain is the time the request is expected to take on it: queues, prefill, and for every new token the
stages' work and the ring of hops. KV room is a hard bound. Loads are those it is given (cached, never probed). A
`Router` holds one view of the mesh and answers many requests; `choose_chain` answers one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.shapes import Links
from scheduler.shortlist import anchors, mix, noise
from scheduler.terrain import Terrain
from scheduler.walk import Ground, Walk, shortest_walk

EXACT_SPANS_MAX = 48
"""Up to so many spans all are weighed; beyond, a shortlist."""
SHORTLIST_WIDTH = 6
"""Nodes to leave from that are weighed at one layer of a shortlist."""
SPREAD = 0.25
"""With a seed, nodes are seen up to this much slower than they are, each by chance: equal ones share the requests."""
CHOICES = 3
"""With a seed, chains among which one is drawn."""
FIRSTS_SEEDED_MAX = 1
"""With a seed, other first nodes tried for a shorter way back: what the seed blurs need not be exact."""
COSTLIER_SCALE = 0.25
COSTLIER_MAX = 1.9
"""A chain that costs this many times the best is never drawn; one e times as unlikely costs COSTLIER_SCALE more."""
ALTERNATE_PENALTY = 8.0
PREFILL_SHARE = 1 / 16
"""Where a node's prefill was never measured, a prompt token costs this share of a decoded one."""
RELIABILITY_LEAST = 0.05
SPLIT_GAIN_LEAST = 0.15


@dataclass(frozen=True, slots=True)
class Hosted:
    """A span that a node serves now. Times are measured; `kv_tokens_free` is room for tokens over the whole span.

    `queue_s` is the work waiting there; `queue_by_class_s`, where known, tells it apart by priority class, most urgent
    first.
    """

    node: str
    start: int
    end: int
    s_per_layer: float
    queue_s: float = 0.0
    kv_tokens_free: int = 0
    reliability: float = 1.0
    prefill_s_per_token_per_layer: float = 0.0
    queue_by_class_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ChainRequest:
    """What a request needs. `tokens` is prompt and answer together.

    `prefix_nodes` hold the first `prefix_tokens` of the prompt in their caches (0: nearly all of it). A request of
    `priority` k waits for work of classes up to k. With `deadline_s`, a chain that takes longer is refused. A seed of 0
    asks for the plain shortest path; gateways pass different ones so as not to pick alike. A second
    until the first token (queues, prefill) costs `wait_weight` times one of decoding.
    """

    layers: int
    tokens: int
    prompt_tokens: int
    hidden_bytes: int
    gateway: str
    prefix_nodes: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    seed: int = 0
    prefix_tokens: int = 0
    priority: int = 0
    deadline_s: float | None = None
    kv_bytes_per_token_per_layer: int = 0
    wait_weight: float = 1.0

    @property
    def new_tokens(self) -> int:
        """Tokens to decode, one at least."""
        return max(1, self.tokens - self.prompt_tokens)


def prefill_s(h: Hosted) -> float:
    """Seconds that a prompt's token takes a host for a layer."""
    return h.prefill_s_per_token_per_layer or h.s_per_layer * PREFILL_SHARE


def queue_s(h: Hosted, priority: int) -> float:
    """Seconds that a request of a class waits at a host."""
    return sum(h.queue_by_class_s[: priority + 1]) if h.queue_by_class_s else h.queue_s


@dataclass(frozen=True, slots=True)
class Stage:
    """`node` serves layers [start, end) of the request."""

    node: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Stages in order, the seconds the request should take, and other chains to fall back on."""

    stages: tuple[Stage, ...]
    cost_s: float
    alternates: tuple[Chain, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Split:
    """Prefill on one chain, decode on another, the cache handed over between; the whole in seconds."""

    prefill: Chain
    decode: Chain
    cost_s: float


def choose_chain(
    hosted: Sequence[Hosted], links: Links, request: ChainRequest, *, alternates: int = 2
) -> Chain:
    """The chain for a request, with up to `alternates` others that share as little with it as possible.

    Raises NoChain naming the layers that nobody serves, NoRoom when all are served but not with cache room, Rejected
    when no chain would meet the request's deadline.
    """
    return Router(hosted, links).choose(request, alternates=alternates)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Seconds by span number for one request: to enter, for a layer."""

    enter_s: list[float]
    layer_s: list[float]

    def blurred(self, factors: Sequence[float]) -> _Costs:
        """Each span's costs times its factor."""
        return _Costs(
            [e * f for e, f in zip(self.enter_s, factors, strict=True)],
            [s * f for s, f in zip(self.layer_s, factors, strict=True)],
        )


@dataclass(frozen=True, slots=True)
class _Trip:
    """A request on the way to its chain: true costs, costs as its seed shows them, rounds of the ring, first hops."""

    request: ChainRequest
    costs: _Costs
    seen: _Costs
    hops: float
    near_s: list[float]

    @property
    def crossings(self) -> float:
        """Messages over each link: one for the prompt, one for each round of the ring."""
        return self.hops + 1.0

    @property
    def hop_bytes(self) -> float:
        """Bytes over each link."""
        return self.request.hidden_bytes * (self.hops + self.request.prompt_tokens)


class Router:
    """One view of what is hosted. Build it when the view is refreshed, ask it for every request until then; where only
    loads changed, a new one on the old `terrain` costs little."""

    def __init__(self, hosted: Sequence[Hosted], links: Links, terrain: Terrain | None = None) -> None:
        """`terrain` is that of an earlier router; where the spans are the same it serves again, links and all."""
        self._spans = sorted(
            (h for h in hosted if 0 <= h.start < h.end), key=lambda h: (h.node, h.start, h.end)
        )
        places = [(h.node, h.start, h.end) for h in self._spans]
        if terrain is None or terrain.spans != places:
            terrain = Terrain(places, links)
        self.terrain = terrain
        self._links = terrain.links
        self._names, self._starts, self._shortlist = terrain.names, terrain.starts, terrain.shortlist
        self._kv_tokens_free = [h.kv_tokens_free for h in self._spans]
        self._queue_s = [h.queue_s for h in self._spans]
        self._by_class = {v: h.queue_by_class_s for v, h in enumerate(self._spans) if h.queue_by_class_s}
        safe = [max(RELIABILITY_LEAST, h.reliability) for h in self._spans]
        self._decode_s = [h.s_per_layer / r for h, r in zip(self._spans, safe, strict=True)]
        self._prefill_s = [prefill_s(h) / r for h, r in zip(self._spans, safe, strict=True)]

    def choose(self, request: ChainRequest, *, alternates: int = 2) -> Chain:
        """As `choose_chain`."""
        roomy = self._roomy(request)
        costs = self._costs(request, float(request.prompt_tokens), float(request.new_tokens))
        hops = float(request.new_tokens)
        draw = request.seed != 0
        found = self._chains(request, roomy, costs, hops, max(1 + alternates, CHOICES if draw else 1))
        if not found:
            self._refuse(request, roomy)
        found.sort(key=lambda chain: chain.cost_s)
        if draw:
            found.insert(0, found.pop(_draw(found, request)))
        best = found[0]
        if request.deadline_s is not None and best.cost_s > request.deadline_s:
            late = best.cost_s - request.deadline_s
            raise Rejected(
                f"the quickest chain takes {best.cost_s:.2f} s, the deadline is {request.deadline_s:.2f} s",
                late,
            )
        return Chain(best.stages, best.cost_s, tuple(found[1 : 1 + alternates]))

    def prefill(self, request: ChainRequest) -> Chain | None:
        """The chain that reads the prompt quickest and need not decode, at that cost; None where none has room."""
        costs = self._costs(request, float(request.prompt_tokens), 0.0)
        found = self._chains(request, self._roomy(request), costs, 0.0, 1)
        return found[0] if found else None

    def split(
        self,
        request: ChainRequest,
        *,
        together_s: float | None = None,
        first: Chain | None = None,
        gain_least: float = SPLIT_GAIN_LEAST,
    ) -> Split | None:
        """Separate chains for prefill and decode where that costs less by the share `gain_least` than one chain; None
        where it does not, or where it is not known how much cache a token takes.

        `together_s` is what one chain costs and `first` the chain to read the prompt with, where they are known
        already. The prompt's cache travels once, layer by layer; layers that stay on their node do not travel.
        """
        if request.kv_bytes_per_token_per_layer <= 0:
            return None
        limit_s = self.choose(request, alternates=0).cost_s if together_s is None else together_s
        limit_s *= 1 - gain_least
        first = self.prefill(request) if first is None else first
        if first is None or first.cost_s >= limit_s:
            return None
        costs = self._costs(request, 0.0, float(request.new_tokens))
        hops, asked = float(request.new_tokens), replace(request, prompt_tokens=0)
        moving_s = self._moving_s(request, first)
        found = self._chains(asked, self._roomy(request), costs, hops, 1, moving_s)
        if not found or found[0].stages == first.stages:
            return None
        busy_s = self._busy_s(request, first, found[0].stages)
        cost_s = first.cost_s + max(busy_s.values(), default=0.0) + found[0].cost_s
        return Split(first, found[0], cost_s) if cost_s <= limit_s else None

    def _busy_s(
        self, request: ChainRequest, first: Chain, stages: Sequence[Stage]
    ) -> dict[tuple[str, bool], float]:
        """Seconds that each giver (False) and each taker (True) is busy with the prompt's cache."""
        busy_s: dict[tuple[str, bool], float] = {}
        for a in first.stages:
            for b in stages:
                layers = min(a.end, b.end) - max(a.start, b.start)
                if a.node == b.node or layers <= 0:
                    continue
                size = request.prompt_tokens * request.kv_bytes_per_token_per_layer * layers
                took_s = self._links(a.node, b.node).seconds(size)
                for end in ((a.node, False), (b.node, True)):
                    busy_s[end] = busy_s.get(end, 0.0) + took_s
        return busy_s

    def _moving_s(self, request: ChainRequest, first: Chain) -> list[float]:
        """Seconds for each span to take over one layer's cache of the prompt from where `first` leaves it, so that a
        search finds chains near to it."""
        terrain = self.terrain
        givers = [(terrain.names.index(a.node), a) for a in first.stages]
        each = request.prompt_tokens * request.kv_bytes_per_token_per_layer
        found = []
        for v, h in enumerate(self._spans):
            taken_s = 0.0
            for u, a in givers:
                layers = min(a.end, h.end) - max(a.start, h.start)
                if layers > 0 and a.node != h.node:
                    message_s, byte_s = terrain.known.get((u, v)) or terrain.link(u, v)
                    taken_s += message_s + each * layers * byte_s
            found.append(taken_s / max(1, min(h.end, request.layers) - h.start))
        return found

    def _roomy(self, request: ChainRequest) -> list[int]:
        tokens, layers = request.tokens, request.layers
        roomy = [
            v for v, free in enumerate(self._kv_tokens_free) if free >= tokens and self._starts[v] < layers
        ]
        if request.exclude:
            roomy = [v for v in roomy if self._names[v] not in request.exclude]
        return roomy

    def _costs(self, request: ChainRequest, prompt: float, new: float) -> _Costs:
        weight = request.wait_weight
        prompt *= weight
        layer_s = [new * d + prompt * p for d, p in zip(self._decode_s, self._prefill_s, strict=True)]
        if request.prefix_nodes:
            cached = min(prompt, weight * request.prefix_tokens or 0.9 * prompt)
            for v, name in enumerate(self._names):
                if name in request.prefix_nodes:
                    layer_s[v] -= cached * self._prefill_s[v]
        enter_s = self._queue_s
        if self._by_class:
            enter_s, k = list(enter_s), request.priority + 1
            for v, classes in self._by_class.items():
                enter_s[v] = sum(classes[:k])
        if weight != 1.0:
            enter_s = [weight * queue_s for queue_s in enter_s]
        return _Costs(enter_s, layer_s)

    def _chains(
        self,
        request: ChainRequest,
        roomy: list[int],
        costs: _Costs,
        hops: float,
        count: int,
        more_s: Sequence[float] = (),
    ) -> list[Chain]:
        """Up to `count` chains, each avoiding the nodes of those before it. `more_s` weighs in the search, by span and
        layer, and not in the price."""
        seen = costs.blurred(noise(self.terrain.marks, request.seed, SPREAD)) if request.seed else costs
        if more_s:
            seen = _Costs(seen.enter_s, [a + b for a, b in zip(seen.layer_s, more_s, strict=True)])
        trip = _Trip(request, costs, seen, hops, self.terrain.near_s(request.gateway))
        large = len(roomy) > EXACT_SPANS_MAX
        places = self._places(trip, roomy) if large else []
        ranked, chains, used = roomy, list[Chain](), set[int]()
        for k in range(count):
            if k < len(places):
                near_s = self.terrain.anchors[places[k]]
                ranked = self._shortlist.rank(roomy, seen.enter_s, seen.layer_s, near_s, hops)
            found = self._attempt(trip, ranked, used)
            if found is None or any(found[0].stages == chain.stages for chain in chains):
                break
            chains.append(found[0])
            used.update(found[1])
        return chains

    def _places(self, trip: _Trip, roomy: list[int]) -> list[int]:
        """Where in a large mesh to look for the first chain, and for each alternate: the anchors around which the
        first request of this view found the best chain, the best that avoids it, and so on."""
        terrain = self.terrain
        if not terrain.places_good:
            names, links = terrain.names, terrain.links
            terrain.anchors = anchors(lambda u, v: links(names[u], names[v]).latency_s, len(names))
            seen = trip.seen
            lists = [
                self._shortlist.rank(roomy, seen.enter_s, seen.layer_s, near, trip.hops)
                for near in terrain.anchors
            ]
            used: set[int] = set()
            for _ in range(CHOICES):
                tried = [(self._attempt(trip, ranked, used), place) for place, ranked in enumerate(lists)]
                able = [(found[0].cost_s, place, found[1]) for found, place in tried if found is not None]
                if not able:
                    break
                _, place, numbers = min(able)
                terrain.places_good.append(place)
                used.update(numbers)
        return terrain.places_good

    def _attempt(self, trip: _Trip, ranked: list[int], used: set[int]) -> tuple[Chain, list[int]] | None:
        """The best chain over a list of spans, at its true cost, and its spans; nodes already used only if need be."""
        layers = trip.request.layers
        usable = self._shortlist.pick(ranked, layers, used) if len(ranked) > EXACT_SPANS_MAX else ranked
        walk = shortest_walk(self._ground(trip, used, whole=usable is ranked), usable)
        if walk is None:
            return None
        return self._priced(trip, walk), [v for v, _, _ in walk.stages]

    def _ground(self, trip: _Trip, used: set[int], *, whole: bool) -> Ground:
        crossings, size, terrain = trip.crossings, trip.hop_bytes, self.terrain
        known = terrain.known
        enter_s, layer_s = trip.seen.enter_s, trip.seen.layer_s
        if used:
            enter_s, layer_s = list(enter_s), list(layer_s)
            for v in used:
                enter_s[v] = enter_s[v] * ALTERNATE_PENALTY + 1.0
                layer_s[v] *= ALTERNATE_PENALTY

        def hop_s(u: int, v: int) -> float:
            found = known.get((u, v)) or terrain.link(u, v)
            return crossings * found[0] + size * found[1]

        firsts_max = (FIRSTS_SEEDED_MAX if trip.request.seed else EXACT_SPANS_MAX) if whole else 0
        return Ground(
            layers=trip.request.layers,
            starts=self._starts,
            ends=self._shortlist.ends_to(trip.request.layers),
            layer_s=layer_s,
            enter_s=enter_s,
            first_s=trip.near_s.__getitem__,
            hop_s=hop_s,
            back_s=lambda u, v: hop_s(u, v) if u != v else 0.0,
            width=EXACT_SPANS_MAX if whole else SHORTLIST_WIDTH,
            firsts_max=firsts_max,
        )

    def _priced(self, trip: _Trip, walk: Walk) -> Chain:
        """The chain of a walk at its true cost, without the blur of seeds and the penalties of alternates."""
        numbers = [v for v, _, _ in walk.stages]
        costs = trip.costs
        cost = trip.near_s[numbers[0]]
        cost += sum(costs.enter_s[v] + costs.layer_s[v] * (end - start) for v, start, end in walk.stages)
        if len(numbers) > 1:
            for u, v in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
                message_s, byte_s = self.terrain.known.get((u, v)) or self.terrain.link(u, v)
                cost += trip.crossings * message_s + trip.hop_bytes * byte_s
        return Chain(tuple(Stage(self._names[v], start, end) for v, start, end in walk.stages), cost)

    def _refuse(self, request: ChainRequest, roomy: list[int]) -> None:
        served = [h for h in self._spans if h.node not in request.exclude]
        missing = _uncovered(served, request.layers)
        if missing:
            raise NoChain(missing)
        raise NoRoom(request.tokens, _uncovered([self._spans[v] for v in roomy], request.layers))


def _draw(chains: Sequence[Chain], request: ChainRequest) -> int:
    """One of several chains by chance, the cheap ones likelier: where one is best for every gateway, and all know its
    load from one old view, some must take the next best or all will queue there. None that misses the deadline, if
    the best does not."""
    least = min(chain.cost_s for chain in chains)
    limit = COSTLIER_MAX * least
    if request.deadline_s is not None:
        limit = min(limit, max(least, request.deadline_s))
    weights = [
        math.exp(-(chain.cost_s / least - 1.0) / COSTLIER_SCALE) if chain.cost_s <= limit else 0.0
        for chain in chains
    ]
    point = mix(request.seed) / 2.0**64 * sum(weights)
    for k, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return k
    return weights.index(max(weights))


def _uncovered(spans: Sequence[Hosted], layers: int) -> list[int]:
    covered = set[int]()
    for h in spans:
        covered.update(range(h.start, min(h.end, layers)))
    return [layer for layer in range(layers) if layer not in covered]
