"""`shoal plan MODEL`: what would go where if a model were added to the mesh as it is now, as plain JSON values.

It asks the planner and moves nothing. The figures of a replica are those that the planner goes by: measured times where
there are any.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from node.adverts import ModelAdvert
from node.atlas import Atlas
from node.planning import Planning, facts_of
from scheduler import Assignment, Shortage, memory_needed, node_of
from scheduler.judge import SideBySide
from scheduler.mend import fetch_bytes


def preview_document(
    planning: Planning, atlas: Atlas, model: ModelAdvert, copies: int, *, here: str | None = None
) -> dict[str, Any]:
    """Where the layers of `model` would go, or what is missing. `here` is the node that has all its files already."""
    began_s = time.perf_counter()
    document: dict[str, Any] = {
        "model": model.name,
        "published": any(m.manifest_id == model.manifest_id for m in atlas.models.values()),
        "layers": model.layers,
        "copies": copies,
        "dtype": model.dtype,
        "quant": model.quant,
        "context_tokens": model.context_tokens,
        "concurrency": model.concurrency,
        "weight_bytes": model.shape().weight_bytes(0, model.layers),
        "spans": [],
        "replicas": [],
        "unused": [],
        "moved": [],
        "shortage": None,
    }
    try:
        prospect = planning.preview(model, copies)
    except Shortage as short:
        document["shortage"] = {
            "detail": str(short),
            "needed_bytes": short.needed_bytes,
            "available_bytes": short.available_bytes,
            "missing_bytes": short.missing_bytes,
            "layers_short": short.layers_short,
        }
    else:
        hosts = atlas.live_hosts(model.manifest_id)
        held = dict(facts_of(hosts).held)
        if here is not None:
            held[here] = [(0, model.layers)]
        names = {m.manifest_id: m.name for m in atlas.models.values()}
        used = {node_of(a.node) for a in prospect.spans}
        document |= {
            "spans": [_span(atlas, model, a, held) for a in sorted(prospect.spans, key=_by_layer)],
            "replicas": [_replica(chain) for chain in prospect.chains],
            "unused": sorted(peer for peer, node in atlas.nodes.items() if node.serves and peer not in used),
            "moved": sorted(names.get(m, m) for m in prospect.moved),
        }
    return document | {"planning_s": time.perf_counter() - began_s}


def _by_layer(a: Assignment) -> tuple[int, int, str]:
    return a.start, a.end, a.node


def _span(atlas: Atlas, model: ModelAdvert, a: Assignment, held: Mapping[str, Any]) -> dict[str, Any]:
    shape, peer = model.shape(), node_of(a.node)
    node = atlas.nodes[peer]
    ready = atlas.live_hosts(model.manifest_id).get(a.node)
    return {
        "node": a.node,
        "name": node.name,
        "start": a.start,
        "end": a.end,
        "memory_bytes": memory_needed(shape, a.start, a.end),
        "fetch_bytes": fetch_bytes(shape, None, (a.start, a.end), held.get(a.node, held.get(peer, ()))),
        "serves": ready is not None
        and ready.state == "ready"
        and (ready.start, ready.end) == (a.start, a.end),
    }


def _replica(chain: SideBySide) -> dict[str, Any]:
    return {
        "stages": [{"node": a.node, "start": a.start, "end": a.end} for a in chain.stages],
        "ms_per_token": chain.single_s * 1000,
        "tokens_per_s": chain.full_rate,
    }
