"""Phase 2: a chain for a request, over what is hosted now.

The cost of a chain is the time the request is expected to take on it: queues, prefill, and for every new token the
stages' work and the ring of hops. KV room is a hard bound. Loads are those it is given (cached, never probed); a
seed spreads gateways that share a stale view. It keeps no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.errors import NoChain, NoRoom
from scheduler.shapes import Links
from scheduler.walk import Ground, Walk, shortest_walk


@dataclass(frozen=True, slots=True)
class Hosted:
    """A span that a node serves now. Times are measured; `kv_tokens_free` is room for tokens over the whole span."""

    node: str
    start: int
    end: int
    s_per_layer: float
    queue_s: float = 0.0
    kv_tokens_free: int = 0
    reliability: float = 1.0
    prefill_s_per_token_per_layer: float = 0.0


@dataclass(frozen=True, slots=True)
class ChainRequest:
    """What a request needs. `tokens` is prompt and answer together; a seed of 0 asks for the plain shortest path."""

    layers: int
    tokens: int
    prompt_tokens: int
    hidden_bytes: int
    gateway: str
    prefix_nodes: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    seed: int = 0


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


def choose_chain(
    hosted: Sequence[Hosted], links: Links, request: ChainRequest, *, alternates: int = 2
) -> Chain:
    """The chain for a request, with up to `alternates` others that share as little with it as possible.

    Raises NoChain naming the layers that nobody serves, NoRoom when all are served but not with cache room.
    """
    spans = sorted(
        (h for h in hosted if h.node not in request.exclude and h.start < h.end),
        key=lambda h: (h.node, h.start, h.end),
    )
    roomy = [h for h in spans if h.kv_tokens_free >= request.tokens]
    walk = None
    if roomy:
        walk = shortest_walk(_ground(roomy, links, request), range(len(roomy)))
    if walk is None:
        missing = _missing(spans, request.layers)
        if missing:
            raise NoChain(missing)
        raise NoRoom(request.tokens, _missing(roomy, request.layers))
    return _chain(roomy, walk)


def _missing(spans: Sequence[Hosted], layers: int) -> list[int]:
    covered = set[int]()
    for h in spans:
        covered.update(range(max(0, h.start), min(h.end, layers)))
    return [layer for layer in range(layers) if layer not in covered]


def _chain(spans: Sequence[Hosted], walk: Walk) -> Chain:
    return Chain(tuple(Stage(spans[v].node, start, end) for v, start, end in walk.stages), walk.cost_s)


def _ground(spans: Sequence[Hosted], links: Links, request: ChainRequest) -> Ground:
    new_tokens = max(1, request.tokens - request.prompt_tokens)
    hidden = request.hidden_bytes
    known: dict[tuple[str, str], float] = {}

    def hop(a: str, b: str) -> float:
        found = known.get((a, b))
        if found is None:
            link = links(a, b)
            found = new_tokens * link.seconds(hidden) + link.seconds(hidden * request.prompt_tokens)
            known[a, b] = found
        return found

    def per_layer(h: Hosted) -> float:
        prefill = h.prefill_s_per_token_per_layer or h.s_per_layer / 16
        if h.node in request.prefix_nodes:
            prefill *= 0.1
        return (new_tokens * h.s_per_layer + request.prompt_tokens * prefill) / max(0.05, h.reliability)

    names = [h.node for h in spans]
    return Ground(
        layers=request.layers,
        starts=[max(0, h.start) for h in spans],
        ends=[min(h.end, request.layers) for h in spans],
        layer_s=[per_layer(h) for h in spans],
        enter_s=[h.queue_s for h in spans],
        first_s=lambda v: links(request.gateway, names[v]).seconds(0),
        hop_s=lambda u, v: hop(names[u], names[v]),
        back_s=lambda u, v: hop(names[u], names[v]) if u != v else 0.0,
    )
