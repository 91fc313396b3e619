"""Phase 2 for a chain that lost stages: the shortest way through the gaps, the other stages stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scheduler.routing import Chain, ChainRequest, Hosted, Router, Stage
from scheduler.shapes import Links

BOUNDLESS = 1 << 50


def bridge(hosted: Sequence[Hosted], links: Links, request: ChainRequest, kept: Sequence[Stage]) -> Chain:
    """A chain for `request` that goes through the stages `kept`, which have their room already, in order and as they
    are; what lies between them is served by anybody of `hosted`, a kept stage's node included. Raises NoChain, NoRoom
    or Rejected."""
    spans = [_kept(stage, hosted) for stage in kept]
    edges = [0, *(edge for stage in kept for edge in (stage.start, stage.end)), request.layers]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if start < end:
            spans += [
                replace(h, start=max(h.start, start), end=min(h.end, end))
                for h in hosted
                if h.node not in request.exclude and h.start < end and h.end > start
            ]
    return Router(spans, links).choose(replace(request, exclude=frozenset()), alternates=0)


def _kept(stage: Stage, hosted: Sequence[Hosted]) -> Hosted:
    for h in hosted:
        if h.node == stage.node and h.start <= stage.start < stage.end <= h.end:
            # Its work is done already: it costs nothing to go on with it.
            return replace(h, start=stage.start, end=stage.end, kv_tokens_free=BOUNDLESS, queue_s=0.0)
    return Hosted(stage.node, stage.start, stage.end, 1e-3, kv_tokens_free=BOUNDLESS)
