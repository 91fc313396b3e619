"""How long planning and routing take here, for `shoal bench plan`: seconds by a clock that is given.

The meshes are made from fixed seeds, so that figures of two machines speak of the same work. The targets stand beside
the figures; nothing fails when one is missed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from scheduler.document import preview
from scheduler.online import Joined, Left, MeshPlanner, ModelAdded
from scheduler.planner import MESH, planner_rank
from scheduler.routing import ChainRequest, Hosted, Router
from scheduler.shapes import Link, Links, ModelShape, NodeShape
from scheduler.sharing import Wanted

LAYERS = 80
CHANGES = 40
CHAINS = 200
TARGETS = {
    "plan_40_s": 1.0,
    "plan_1000_s": 5.0,
    "plan_10000_s": 60.0,
    "join_or_leave_1000_ms": 50.0,
    "chain_1000_ms": 2.0,
}


def bench_plan(*, nodes_max: int = 10_000, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Figures and targets, JSON-able: plans of 40, 1,000 and 10,000 diverse nodes (up to `nodes_max`) for 80 layers,
    the median join or leave at 1,000 nodes, and the median and 99th percentile chain, with two alternates."""
    figures: dict[str, float] = {}
    for size in (40, 1000, 10_000):
        if size <= nodes_max:
            began_s = clock()
            result = preview(diverse_document(size))
            figures[f"plan_{size}_s"] = clock() - began_s
            figures[f"plan_{size}_objective"] = result["objective"]
    if nodes_max >= 1000:
        figures.update(_changes(clock))
        figures.update(_chains(clock))
    return {"figures": figures, "targets": {k: v for k, v in TARGETS.items() if k in figures}}


def diverse_document(size: int, seed: int = 1) -> dict[str, Any]:
    """A pool of nodes no two of which are alike, and a 70B model in eight bits, as `preview` takes them."""
    rng = random.Random(seed)
    return {
        "model": {
            "layers": LAYERS,
            "layer_bytes": 860e6,
            "embed_bytes": 1.05e9,
            "head_bytes": 1.05e9,
            "layer_flops_per_token": 1.7e9,
            "hidden_bytes": 16384,
            "kv_bytes_per_token_per_layer": 4096,
        },
        "nodes": [
            {
                "id": f"n{k:05d}",
                "tflops": rng.choice([20, 40, 80, 160]) * rng.uniform(0.8, 1.2),
                "memory_gib": rng.choice([8, 12, 16, 24, 32, 48]),
                "bandwidth_gbps": rng.choice([270, 450, 700, 1008, 1792]) * rng.uniform(0.8, 1.2),
            }
            for k in range(size)
        ],
    }


def _shapes(size: int) -> tuple[ModelShape, list[NodeShape]]:
    document = diverse_document(size)
    model = document["model"]
    shape = ModelShape(
        layers=LAYERS,
        layer_bytes=int(model["layer_bytes"]),
        embed_bytes=int(model["embed_bytes"]),
        head_bytes=int(model["head_bytes"]),
        tied=False,
        layer_flops_per_token=model["layer_flops_per_token"],
        hidden_bytes=model["hidden_bytes"],
        kv_bytes_per_token_per_layer=model["kv_bytes_per_token_per_layer"],
        context_tokens=4096,
    )
    nodes = [
        NodeShape(n["id"], n["memory_gib"] << 30, n["tflops"] * 1e12, n["bandwidth_gbps"] * 1e9)
        for n in document["nodes"]
    ]
    return shape, nodes


def plane(names: list[str], seed: int = 1) -> Links:
    """Links between points of a square: 2 ms and up to 70 ms more by distance."""
    rng = random.Random(seed)
    place = {name: (rng.random(), rng.random()) for name in names}

    def link(a: str, b: str) -> Link:
        (x, y), (u, v) = place[a], place[b]
        return Link(0.002 + 0.05 * ((x - u) ** 2 + (y - v) ** 2) ** 0.5, 1e8)

    return link


def _changes(clock: Callable[[], float]) -> dict[str, float]:
    """Nodes leave and others join a planned mesh of 1,000."""
    shape, nodes = _shapes(1000 + CHANGES)
    me = planner_rank(MESH, [node.id for node in nodes[:1000]])[0]
    planner = MeshPlanner(me, plane([node.id for node in nodes]))
    for node in nodes[:1000]:
        planner.handle(Joined(node), 0.0)
    planner.handle(ModelAdded("m", Wanted(shape, copies=16)), 0.0)
    rng = random.Random(2)
    took: list[float] = []
    for fresh in nodes[1000:]:
        gone = rng.choice([a.node for a in planner.plans["m"].assignments if a.node != me])
        for event in (Left(gone), Joined(fresh)):
            began_s = clock()
            planner.handle(event, 1.0)
            took.append(1000 * (clock() - began_s))
    return {"join_or_leave_1000_ms": statistics.median(took), "join_or_leave_1000_max_ms": max(took)}


def _chains(clock: Callable[[], float]) -> dict[str, float]:
    """Requests of 32 gateways over one view of 1,000 nodes with spans of all lengths."""
    rng = random.Random(3)
    hosted = []
    for k in range(1000):
        length = rng.choice([4, 8, 12, 20, 30])
        start = rng.randrange(0, LAYERS - length + 1)
        span = (f"n{k}", start, start + length)
        hosted.append(Hosted(*span, rng.uniform(3e-4, 3e-3), rng.uniform(0, 2), kv_tokens_free=20_000))
    router = Router(hosted, plane([h.node for h in hosted]))
    took: list[float] = []
    for k in range(CHAINS):
        request = ChainRequest(LAYERS, 1500, 1000, 16384, f"n{k % 32}", seed=k + 1)
        began_s = clock()
        router.choose(request)
        took.append(1000 * (clock() - began_s))
    took.sort()
    return {
        "chain_1000_ms": statistics.median(took),
        "chain_1000_p99_ms": took[int(0.99 * CHAINS)],
        "first_chain_ms": took[-1],
    }
