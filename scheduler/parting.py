"""Whether a request's prompt is read on one chain and answered on another.

That pays where some nodes compute fast and others read memory fast. Prefill and decode chains are looked for apart;
what both would take, with the way of the prompt's cache between them, is held against one chain that does all. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.outlook import Aims, Offer, Outlook
from scheduler.routing import Chain, ChainRequest, Stage

GAIN = 0.15
"""The share of a request's time that two chains must save."""
GAIN_S_MIN = 0.05
"""And at least so many seconds: two sessions are more to set up than one."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A chain whose caches hold the first `tokens` of the prompt."""

    stages: tuple[Stage, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Parted:
    """Two chains: the first `reuse` positions of the prompt are in the caches of the `reading` one, all of its cache
    takes `moved_s` to the `answering` one. `first_s` until tokens come, `whole_s` until the last that is likely."""

    reading: Offer
    answering: Offer
    reuse: int
    moved_s: float
    first_s: float
    whole_s: float


def part(
    outlook: Outlook,
    request: ChainRequest,
    aims: Aims,
    together: Offer,
    *,
    likely_tokens: int,
    holders: Sequence[Holder] = (),
    gain_least: float = GAIN,
) -> Parted | None:
    """Two chains where those are quicker than `together` by a margin, and miss the aims by no more; else None.

    The chain that reads is the quickest, or one of `holders` that has less to read. Nodes in both need room twice.
    """
    if gain_least >= 1.0 or request.kv_bytes_per_token_per_layer <= 0 or likely_tokens < 2:
        return None
    limit_s = together.first_s + likely_tokens * together.token_s
    limit_s -= max(GAIN_S_MIN, gain_least * limit_s)
    best: Parted | None = None
    quickest = outlook.router.prefill(request)
    readers = [] if quickest is None else [Holder(quickest.stages, 0)]
    for reader in (*readers, *holders):
        found = _through(outlook, request, aims, reader, likely_tokens)
        if found is None or found.whole_s > limit_s:
            continue
        if aims.missed(found.first_s, found.answering.token_s) > together.missed:
            continue
        if best is None or found.whole_s < best.whole_s:
            best = found
    return best


def _through(
    outlook: Outlook, request: ChainRequest, aims: Aims, reader: Holder, likely_tokens: int
) -> Parted | None:
    """The best that can be had where this chain reads."""
    nodes = frozenset(stage.node for stage in reader.stages)
    held = replace(request, prefix_nodes=nodes, prefix_tokens=reader.tokens) if reader.tokens else request
    reading = outlook.weigh(reader.stages, held, aims)
    if reading is None:
        return None
    first = Chain(reader.stages, reading.first_s)
    split = outlook.router.split(request, together_s=math.inf, first=first, gain_least=0.0)
    answering = outlook.weigh(split.decode.stages, request, aims) if split is not None else None
    if split is None or answering is None:
        return None
    shared = [stage for stage in split.decode.stages if stage.node in nodes]
    twice = replace(request, tokens=request.tokens + request.prompt_tokens)
    if not outlook.has_room(shared, twice):
        return None
    moved_s = split.cost_s - split.prefill.cost_s - split.decode.cost_s
    # The first token is held back until the chain that answers has made one of its own.
    first_s = reading.first_s + moved_s + answering.token_s
    whole_s = first_s + (likely_tokens - 2) * answering.token_s
    return Parted(reading, answering, reader.tokens, moved_s, first_s, whole_s)
