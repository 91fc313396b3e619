"""The `/mesh` document: this node's view of the mesh as plain JSON values. A contract; extend, never break."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from node.adverts import HostAdvert, ModelAdvert
from node.atlas import Atlas
from node.planning import Planning
from scheduler import Standing, node_of


def mesh_document(
    atlas: Atlas,
    planning: Planning,
    *,
    mesh_id: str,
    me: str,
    connected: Collection[str],
    rtt_s: Callable[[str], float | None],
    requests: Collection[Mapping[str, Any]] = (),
    standings: Mapping[str, Standing] | None = None,
    queues: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Everything this node knows, JSON-able. `standings` are what its gateway thinks of the nodes it saw at work,
    `queues` its (running, waiting) requests by manifest id."""
    names = {model.manifest_id: model.name for model in atlas.models.values()}
    spans: dict[str, list[dict[str, Any]]] = {}
    for manifest_id, hosts in atlas.hosts.items():
        for name, host in hosts.items():
            shown = _span(names.get(manifest_id, manifest_id[:12]), manifest_id, host)
            spans.setdefault(node_of(name), []).append(shown | {"host": name})
    nodes = []
    for peer, node in sorted(atlas.nodes_known.items(), key=lambda item: (item[1].name, item[0])):
        rtt = rtt_s(peer)
        nodes.append(
            {
                "peer": peer,
                "name": node.name,
                "version": node.version,
                "addrs": list(node.addrs),
                "api": node.api,
                "device": node.device,
                "devices": [{"device": d.device, "memory_bytes": d.memory_bytes} for d in node.devices],
                "region": node.region,
                "tags": list(node.tags),
                "serves": node.serves,
                "memory_bytes": node.memory_bytes,
                "flops_per_s": node.flops_per_s,
                "read_bytes_per_s": node.read_bytes_per_s,
                "self": peer == me,
                "connected": peer == me or peer in connected,
                "suspect": peer in atlas.suspects,
                "health": _health((standings or {}).get(peer)),
                "rtt_ms": None if rtt is None else round(rtt * 1e3, 3),
                "spans": sorted(spans.get(peer, []), key=lambda span: (span["model"], span["start"])),
            }
        )
    models = [
        _model(atlas, planning, model) | _queue((queues or {}).get(model.manifest_id, (0, 0)))
        for model in sorted(atlas.models.values(), key=lambda m: m.name)
    ]
    return {
        "mesh": mesh_id,
        "self": me,
        "nodes": nodes,
        "models": models,
        "adapters": [
            {"name": a.name, "manifest": a.manifest_id, "base": names.get(a.base), "bytes": a.size_bytes}
            for a in sorted(atlas.adapters.values(), key=lambda a: a.name)
        ],
        "requests": list(requests),
    }


def _health(standing: Standing | None) -> dict[str, Any] | None:
    if standing is None:
        return None
    return {
        "state": standing.state,
        "reliability": round(standing.reliability, 3),
        "slowdown": round(standing.slowdown, 2),
    }


def _queue(counts: tuple[int, int]) -> dict[str, int]:
    return {"running": counts[0], "waiting": counts[1]}


def model_detail(atlas: Atlas, planning: Planning, model: ModelAdvert) -> str:
    """Why a model is not served completely now, in plain words; "" when it is."""
    counts = atlas.copies(model)
    if min(counts, default=0) > 0:
        return ""
    shortage = planning.shortages.get(model.manifest_id, "")
    if shortage:
        return shortage
    missing = ", ".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in _runs(counts))
    hosts = atlas.live_hosts(model.manifest_id).values()
    failed = next((h.detail for h in hosts if h.state == "failed" and h.detail), "")
    if failed:
        return f"layers {missing} are not served: {failed}"
    coming = [h for h in hosts if h.state in ("fetching", "loading")]
    return f"layers {missing} are not served yet" + (f"; {len(coming)} nodes are loading" if coming else "")


def model_shortage(planning: Planning, model: ModelAdvert) -> str:
    """What stands against every copy of every layer having a place, in plain words; "" when nothing does."""
    shortage = planning.shortages.get(model.manifest_id, "")
    plan = planning.plans.get(model.manifest_id)
    if shortage or plan is None:
        return shortage
    planned = min(sum(a.start <= layer < a.end for a in plan.assignments) for layer in range(model.layers))
    if planned >= model.copies:
        return ""
    return f"the mesh has room for {planned} of {model.copies} copies of each layer"


def _runs(counts: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for layer, count in enumerate(counts):
        if count == 0 and runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        elif count == 0:
            runs.append((layer, layer + 1))
    return runs


def _span(model: str, manifest_id: str, host: HostAdvert) -> dict[str, Any]:
    return {
        "model": model,
        "manifest": manifest_id,
        "start": host.start,
        "end": host.end,
        "state": host.state,
        "progress": round(host.progress, 3),
        "bytes_fetched": host.bytes_fetched,
        "bytes_wanted": host.bytes_wanted,
        "sessions": host.sessions,
        "kv_tokens_free": host.kv_tokens_free,
        "tokens_per_s": host.tokens_per_s,
        "detail": host.detail,
    }


def _model(atlas: Atlas, planning: Planning, model: ModelAdvert) -> dict[str, Any]:
    plan = planning.plans.get(model.manifest_id)
    copies_min = min(atlas.copies(model), default=0)
    return {
        "name": model.name,
        "manifest": model.manifest_id,
        "layers": model.layers,
        "context_tokens": model.context_tokens,
        "dtype": model.dtype,
        "quant": model.quant,
        "ready": copies_min > 0,
        "copies_min": copies_min,
        "copies_wanted": model.copies,
        "require": list(model.require),
        "ends_require": list(model.ends_require),
        "epoch": None if plan is None else plan.epoch,
        "planner": None if plan is None else plan.planner,
        "plan": []
        if plan is None
        else [{"node": a.node, "start": a.start, "end": a.end} for a in plan.assignments],
        "detail": model_detail(atlas, planning, model),
        "shortage": model_shortage(planning, model),
    }
