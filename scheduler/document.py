"""`shoal plan --input`: a document in, a plan for a mesh that need not exist out. No network, nothing measured.

The document states every figure; this file checks it, turns it into seats and shows what the search finds. The live
mesh is planned by `placement`, with the same search.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from scheduler.errors import PreviewError, Shortage
from scheduler.pipeline import Seat
from scheduler.pool import Pool, Prefer, Replica, objective
from scheduler.search import best_effort_group, group_seats
from scheduler.seating import TIME_LEAST_S, least_memory, spare_layers

GIB = float(1 << 30)
NODES_MAX = 100_000
LAYERS_MAX = 10_000
PREFERS = ("balanced", "latency", "throughput")


@dataclass(frozen=True, slots=True)
class PreviewModel:
    """The document's `model`, as integers and floats."""

    layers: int
    layer_bytes: float
    embed_bytes: float
    head_bytes: float
    layer_flops_per_token: float
    hidden_bytes: float
    kv_bytes_per_token_per_layer: float
    tied: bool


@dataclass(frozen=True, slots=True)
class PreviewNode:
    """One of the document's `nodes`, in bytes and seconds."""

    id: str
    flops_per_s: float
    memory_bytes: float
    read_bytes_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Preview:
    """The whole document, checked."""

    model: PreviewModel
    nodes: tuple[PreviewNode, ...]
    hop_s: float
    hop_between_s: Mapping[str, Mapping[str, float]]
    context_tokens: int
    batch: int
    weight_fraction: float


def preview(
    document: Mapping[str, Any], *, prefer: str | None = None, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Replicas for the nodes and the model of `document`, JSON-able.

    Output: `replicas` [{`stages` [{`node`, `start`, `end`}], `ms_per_token`, `tokens_per_s`, `load_s`}], quickest
    first, `unused` node ids, `objective` (what was maximised), `planning_s`. `load_s`: how long the slowest stage
    takes to fetch its weights over its own link. `prefer` ("balanced", "latency", "throughput") wins over the
    document's.
    Raises PreviewError naming the field, Shortage when the pool cannot hold the model.
    """
    began_s = clock()
    if not isinstance(document, Mapping):
        raise PreviewError("document", document, "an object with `model` and `nodes`")
    wish = _one_of("prefer", prefer or document.get("prefer", "balanced"), PREFERS)
    checked = read_document(document)
    names = [node.id for node in checked.nodes]
    pool = Pool(
        [_seat(checked, node) for node in checked.nodes],
        checked.model.layers,
        _hops(checked),
        batch=checked.batch,
    )
    grouping = group_seats(pool, cast(Prefer, wish)) if names else None
    replicas = grouping.replicas() if grouping is not None else []
    if not replicas and names:
        replicas = best_effort_group(pool)
    if not replicas:
        raise _shortage(checked, pool.seats)
    replicas.sort(key=lambda r: (r.single_s, r.seats))
    used = {i for replica in replicas for i in replica.seats}
    sums = sum(r.token_rate for r in replicas), sum(r.full_rate for r in replicas)
    return {
        "replicas": [_shown(checked, replica) for replica in replicas],
        "unused": [name for i, name in enumerate(names) if i not in used],
        "objective": objective(*sums, cast(Prefer, wish)),
        "planning_s": clock() - began_s,
    }


def _shown(checked: Preview, replica: Replica) -> dict[str, Any]:
    stages, load_s, start = [], 0.0, 0
    for i, count in zip(replica.seats, replica.counts, strict=True):
        node = checked.nodes[i]
        stages.append({"node": node.id, "start": start, "end": start + count})
        size = _weight_bytes(checked.model, start, start + count)
        load_s = max(load_s, size / node.link_bytes_per_s)
        start += count
    return {
        "stages": stages,
        "ms_per_token": replica.single_s * 1000,
        "tokens_per_s": replica.full_rate,
        "load_s": load_s,
    }


def _weight_bytes(model: PreviewModel, start: int, end: int) -> float:
    size = (end - start) * model.layer_bytes
    first, last = start == 0, end == model.layers
    if first and last and model.tied:
        return size + max(model.embed_bytes, model.head_bytes)
    return size + first * model.embed_bytes + last * model.head_bytes


def _seat(checked: Preview, node: PreviewNode) -> Seat:
    """Weights may take `weight_fraction` of the memory; weights and cache together all of it."""
    model = checked.model
    cache = model.kv_bytes_per_token_per_layer * checked.context_tokens * checked.batch

    def room(extra: float) -> int:
        weights = node.memory_bytes * checked.weight_fraction - extra
        both = node.memory_bytes - extra
        if weights < 0 or both < 0:
            return 0
        by_weights = _whole(weights / model.layer_bytes)
        return max(0, min(model.layers, by_weights, _whole(both / (model.layer_bytes + cache))))

    ends = max(model.embed_bytes, model.head_bytes) if model.tied else model.embed_bytes + model.head_bytes
    arithmetic = checked.batch * model.layer_flops_per_token / node.flops_per_s
    return Seat(
        node=node.id,
        layer_s=max(arithmetic, model.layer_bytes / node.read_bytes_per_s, TIME_LEAST_S),
        head_s=model.head_bytes / node.read_bytes_per_s,
        room=room(0),
        room_first=room(model.embed_bytes),
        room_last=room(model.head_bytes),
        room_alone=room(ends),
    )


def _whole(ratio: float) -> int:
    """Floor that forgives the last bits of a quotient that should be whole."""
    return math.floor(ratio * (1 + 1e-12))


def _hops(checked: Preview) -> float | Callable[[int, int], float]:
    if not checked.hop_between_s:
        return checked.hop_s
    names = [node.id for node in checked.nodes]
    rows = [checked.hop_between_s.get(name, {}) for name in names]
    default_s = checked.hop_s
    return lambda a, b: rows[a].get(names[b], default_s)


def _shortage(checked: Preview, seats: tuple[Seat, ...]) -> Shortage:
    model = checked.model
    weights = _weight_bytes(model, 0, model.layers)
    offered = sum(node.memory_bytes for node in checked.nodes)
    needed, available = weights, offered * checked.weight_fraction
    if needed <= available:
        cache = model.kv_bytes_per_token_per_layer * checked.context_tokens * checked.batch
        needed, available = weights + model.layers * cache, offered
    short = max(1, model.layers - spare_layers(model.layers, seats))
    cache = model.kv_bytes_per_token_per_layer * checked.context_tokens * checked.batch
    enough = math.ceil(max(weights / checked.weight_fraction, weights + model.layers * cache)) + 1

    def seat_with(size: int) -> Seat:
        return _seat(checked, PreviewNode("", 1.0, size, 1.0, 1.0))

    missing = least_memory(model.layers, seats, seat_with, enough)
    return Shortage(math.ceil(needed), math.floor(available), short, model.layers, missing)


def read_document(document: Mapping[str, Any]) -> Preview:
    """Check every field. Raises PreviewError with the first that is wrong; fields it does not know are ignored."""
    nodes = document_field(document, "nodes")
    if not isinstance(nodes, list) or len(nodes) > NODES_MAX:
        raise PreviewError("nodes", nodes, f"a list of at most {NODES_MAX} nodes")
    read = tuple(_read_node(f"nodes[{k}]", node) for k, node in enumerate(nodes))
    names: set[str] = set()
    for k, node in enumerate(read):
        if node.id in names:
            raise PreviewError(f"nodes[{k}].id", node.id, "different from every other node's")
        names.add(node.id)
    return Preview(
        model=_read_model(document_field(document, "model")),
        nodes=tuple(sorted(read, key=lambda node: node.id)),
        hop_s=_number("hop_ms", document.get("hop_ms", 10)) / 1000,
        hop_between_s=_read_hops(document.get("hop_ms_between", {})),
        context_tokens=_count("context_tokens", document.get("context_tokens", 4096), 0),
        batch=_count("batch", document.get("batch", 1), 1),
        weight_fraction=_number(
            "weight_fraction", document.get("weight_fraction", 0.65), above=0.0, most=1.0
        ),
    )


def _read_model(model: Any) -> PreviewModel:
    if not isinstance(model, Mapping):
        raise PreviewError("model", model, "an object")

    def number(field: str, **bounds: float) -> float:
        return _number(f"model.{field}", document_field(model, field, where="model."), **bounds)

    tied = model.get("tied", False)
    if not isinstance(tied, bool):
        raise PreviewError("model.tied", tied, "true or false")
    embed, head = number("embed_bytes"), number("head_bytes")
    return PreviewModel(
        layers=_count("model.layers", document_field(model, "layers", where="model."), 1, LAYERS_MAX),
        layer_bytes=number("layer_bytes", above=0.0),
        embed_bytes=embed,
        head_bytes=head or (embed if tied else 0.0),
        layer_flops_per_token=number("layer_flops_per_token"),
        hidden_bytes=number("hidden_bytes"),
        kv_bytes_per_token_per_layer=number("kv_bytes_per_token_per_layer"),
        tied=tied,
    )


def _read_node(where: str, node: Any) -> PreviewNode:
    if not isinstance(node, Mapping):
        raise PreviewError(where, node, "an object")
    name = document_field(node, "id", where=f"{where}.")
    if not isinstance(name, str) or not name:
        raise PreviewError(f"{where}.id", name, "a text that is not empty")

    def number(field: str, scale: float, default: float | None = None, **bounds: float) -> float:
        value = document_field(node, field, default, where=f"{where}.")
        return _number(f"{where}.{field}", value, **bounds) * scale

    return PreviewNode(
        id=name,
        flops_per_s=number("tflops", 1e12, above=0.0),
        memory_bytes=number("memory_gib", GIB),
        read_bytes_per_s=number("bandwidth_gbps", 1e9, above=0.0),
        link_bytes_per_s=number("link_mbps", 1e6 / 8, 1000.0, above=0.0),
    )


def _read_hops(table: Any) -> dict[str, dict[str, float]]:
    """`hop_ms_between` is directed: table[a][b] is the way from a to b; pairs that it lacks cost `hop_ms`."""
    if not isinstance(table, Mapping):
        raise PreviewError("hop_ms_between", table, "an object of objects: {a: {b: ms}}")
    found: dict[str, dict[str, float]] = {}
    for a, row in table.items():
        if not isinstance(row, Mapping):
            raise PreviewError(f"hop_ms_between.{a}", row, "an object: {b: ms}")
        found[a] = {b: _number(f"hop_ms_between.{a}.{b}", ms) / 1000 for b, ms in row.items()}
    return found


def document_field(document: Mapping[str, Any], field: str, default: Any = None, where: str = "") -> Any:
    """The field, or its default; PreviewError when it is missing and has none."""
    value = document.get(field, default)
    if value is None:
        raise PreviewError(f"{where}{field}", None, "given")
    return value


def _number(field: str, value: Any, *, above: float | None = None, most: float = 1e30) -> float:
    right = f"a number above {above:g}" if above is not None else "a number of at least 0"
    right += f" and at most {most:g}" if most < 1e30 else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
        raise PreviewError(field, value, right)
    if value < 0 or value > most or (above is not None and value <= above):
        raise PreviewError(field, value, right)
    return float(value)


def _count(field: str, value: Any, least: int, most: int = 1 << 40) -> int:
    right = f"a whole number from {least} to {most}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PreviewError(field, value, right)
    return value


def _one_of(field: str, value: Any, right: tuple[str, ...]) -> str:
    if value not in right:
        raise PreviewError(field, value, "one of " + ", ".join(right))
    return cast(str, value)
