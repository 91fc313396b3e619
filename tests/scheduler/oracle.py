"""The best plan for a small pool by brute force: every cut of the layers, every group, every set of groups.

Independent of the scheduler: written from the definition of the objective, with numpy to bear the enumeration. For
at most eight nodes and a dozen layers.
"""

import itertools
import math
import random

import numpy as np


def random_document(seed, nodes_max=8, layers_max=10, pairs=None):
    """A pool of uneven nodes and a model that may or may not fit, as `preview` takes them."""
    rng = random.Random(seed)
    layers = rng.randint(3, layers_max)
    layer = rng.uniform(0.2e9, 2e9)
    nodes = [
        {
            "id": f"n{k}",
            "tflops": rng.choice([5, 20, 80, 165]) * rng.uniform(0.8, 1.2),
            "memory_gib": rng.choice([4, 8, 12, 16, 24, 32]),
            "bandwidth_gbps": rng.choice([60, 200, 450, 1000, 1800]) * rng.uniform(0.8, 1.2),
        }
        for k in range(rng.randint(1, nodes_max))
    ]
    document = {
        "model": {
            "layers": layers,
            "layer_bytes": layer,
            "embed_bytes": rng.choice([0, 0.3, 1.5]) * layer,
            "head_bytes": rng.choice([0.2, 1.5]) * layer,
            "layer_flops_per_token": layer,
            "hidden_bytes": 8192,
            "kv_bytes_per_token_per_layer": 4096,
            "tied": rng.random() < 0.3,
        },
        "nodes": nodes,
        "hop_ms": rng.choice([0.1, 1, 10, 40]),
        "batch": rng.choice([1, 1, 8]),
    }
    if pairs if pairs is not None else rng.random() < 0.4:
        names = [node["id"] for node in nodes]
        document["hop_ms_between"] = {
            a: {b: rng.choice([0.5, 5, 30]) * rng.uniform(0.8, 1.2) for b in names if b != a} for a in names
        }
    return document


class Oracle:
    """Everything one document allows."""

    def __init__(self, document):
        self.model, self.nodes = document["model"], document["nodes"]
        self.layers, self.batch = self.model["layers"], document.get("batch", 1)
        self.fraction = document.get("weight_fraction", 0.65)
        self.context = document.get("context_tokens", 4096)
        between, hop = document.get("hop_ms_between", {}), document.get("hop_ms", 10)
        names = [node["id"] for node in self.nodes]
        self.hop = [[between.get(a, {}).get(b, hop) for b in names] for a in names]
        self.layer_ms = [self._layer_ms(node) for node in self.nodes]
        self.head_ms = [self.model["head_bytes"] / node["bandwidth_gbps"] / 1e6 for node in self.nodes]
        self.uniform = not between

    def _layer_ms(self, node):
        arithmetic = self.batch * self.model["layer_flops_per_token"] / (node["tflops"] * 1e9)
        return max(arithmetic, self.model["layer_bytes"] / (node["bandwidth_gbps"] * 1e6))

    def fits(self, k, count, first, last):
        m = self.model
        extra = first * m["embed_bytes"] + last * m["head_bytes"]
        if first and last and m["tied"]:
            extra = max(m["embed_bytes"], m["head_bytes"])
        weights = count * m["layer_bytes"] + extra
        cache = count * m["kv_bytes_per_token_per_layer"] * self.context * self.batch
        memory = self.nodes[k]["memory_gib"] * 2**30
        return weights <= self.fraction * memory and weights + cache <= memory

    def room(self, k, first, last):
        return max([n for n in range(1, self.layers + 1) if self.fits(k, n, first, last)], default=0)

    def figures(self, stages):
        """(ms_per_token, tokens_per_s) of stages [(node number, layers)], by the definition."""
        ms = [n * self.layer_ms[k] for k, n in stages]
        ms[-1] += self.head_ms[stages[-1][0]]
        order = [k for k, _ in stages]
        hops = (
            sum(self.hop[a][b] for a, b in zip(order, order[1:] + order[:1], strict=True))
            if len(order) > 1
            else 0
        )
        return sum(ms) + hops, self.batch * 1000 / max(ms)

    def fronts(self):
        """By set of nodes (bits), the undominated (1000/ms, tokens_per_s) as an array [points, 2]."""
        size = len(self.nodes)
        room = [[[self.room(k, f, g) for g in (0, 1)] for f in (0, 1)] for k in range(size)]
        found = {}
        for mask in range(1, 1 << size):
            members = [k for k in range(size) if mask >> k & 1]
            if len(members) > self.layers:
                continue
            points = [self._points(members, f, g, room) for f in members for g in members]
            points = [p for p in points if p is not None]
            if points:
                found[mask] = undominated(np.concatenate(points))
        return found

    def _points(self, members, first, last, room):
        if (first == last) != (len(members) == 1):
            return None
        inner = [k for k in members if k not in (first, last)]
        order = [first] if first == last else [first, *inner, last]
        limits = np.array([room[k][k == first][k == last] for k in order])
        cuts = compositions(self.layers, len(order))
        cuts = cuts[(cuts <= limits).all(axis=1)]
        if not len(cuts):
            return None
        ms = cuts * np.array([self.layer_ms[k] for k in order])
        ms[:, -1] += self.head_ms[last]
        single = ms.sum(axis=1) + self._tour(first, inner, last)
        return np.stack([1000 / single, self.batch * 1000 / ms.max(axis=1)], axis=1)

    def _tour(self, first, inner, last):
        if first == last:
            return 0.0
        if self.uniform:
            return self.hop[first][last] * (len(inner) + 2)
        ways = (
            sum(self.hop[a][b] for a, b in itertools.pairwise((first, *way, last)))
            for way in itertools.permutations(inner)
        )
        return min(ways) + self.hop[last][first]

    def best(self, prefer="balanced"):
        """The greatest objective; 0 when nothing fits."""
        fronts, size = self.fronts(), len(self.nodes)
        sums = [np.zeros((1, 2))] * (1 << size)
        for mask in range(1, 1 << size):
            low = mask & -mask
            parts = [sums[mask ^ low]]
            rest = mask ^ low
            sub = rest
            while True:
                front = fronts.get(sub | low)
                if front is not None:
                    others = sums[rest ^ sub]
                    parts.append((front[:, None, :] + others[None, :, :]).reshape(-1, 2))
                if sub == 0:
                    break
                sub = (sub - 1) & rest
            sums[mask] = undominated(np.concatenate(parts))
        s, p = sums[-1][:, 0], sums[-1][:, 1]
        return float({"balanced": np.sqrt(s * p), "latency": s, "throughput": p}[prefer].max())


def undominated(points):
    """The Pareto front of [points, 2], both to be large."""
    points = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    ceiling = np.maximum.accumulate(points[:, 1])
    keep = np.ones(len(points), dtype=bool)
    keep[1:] = points[1:, 1] > ceiling[:-1]
    return points[keep]


_COMPOSITIONS = {}


def compositions(layers, parts):
    """Every way to cut `layers` into `parts` parts of one at least, [ways, parts]."""
    key = (layers, parts)
    if key not in _COMPOSITIONS:
        cuts = itertools.combinations(range(1, layers), parts - 1)
        _COMPOSITIONS[key] = np.array([np.diff((0, *cut, layers)) for cut in cuts]).reshape(-1, parts)
    return _COMPOSITIONS[key]


def objective_of(result, prefer="balanced"):
    """The objective of `preview`'s output, from its own figures."""
    s = sum(1000 / r["ms_per_token"] for r in result["replicas"])
    p = sum(r["tokens_per_s"] for r in result["replicas"])
    return {"balanced": math.sqrt(s * p), "latency": s, "throughput": p}[prefer]


def check_result(oracle, result):
    """Every replica covers each layer once in order within memory, nodes are used once, figures are as defined."""
    names = {node["id"]: k for k, node in enumerate(oracle.nodes)}
    used = []
    for replica in result["replicas"]:
        at, stages = 0, []
        for stage in replica["stages"]:
            k = names[stage["node"]]
            assert stage["start"] == at < stage["end"]
            at = stage["end"]
            stages.append((k, stage["end"] - stage["start"]))
            assert oracle.fits(k, stages[-1][1], stage["start"] == 0, stage["end"] == oracle.layers)
        assert at == oracle.layers
        ms, rate = oracle.figures(stages)
        assert math.isclose(replica["ms_per_token"], ms, rel_tol=1e-9)
        assert math.isclose(replica["tokens_per_s"], rate, rel_tol=1e-9)
        used.extend(stage["node"] for stage in replica["stages"])
    assert len(used) == len(set(used))
    assert sorted([*used, *result["unused"]]) == sorted(names)
