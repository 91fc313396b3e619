"""The shortest way through layers 0..L over spans that overlap as they like.

A node may be entered and left at any layer it hosts, and is used once at most. For two nodes in a row the cost is
linear in the layer of the hand-over, so some best walk hands over only where the first span ends or the second
begins: those are the layers looked at. It knows costs as numbers and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NEARLY_FREE = 0.99
"""Where the way back is so small a part of the cost, no other first node is tried for it."""

Label = tuple[int, int, "Label | None"]
"""A node, the layer it was entered at, and how one came there."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Nodes by number with the layers [start, end) each serves, and the cost."""

    stages: tuple[tuple[int, int, int], ...]
    cost_s: float


@dataclass(frozen=True, slots=True)
class Ground:
    """What there is to walk on: spans by number and their costs in seconds.

    `enter_s` is paid on entering a node, `layer_s` for each layer served; `first_s(v)` to reach the first node,
    `hop_s(u, v)` between two, `back_s(last, first)` once at the end. `width` bounds how many nodes to leave from
    are weighed at one layer (the cheapest so far), `firsts_max` how many other first nodes are tried for a shorter
    way back.
    """

    layers: int
    starts: Sequence[int]
    ends: Sequence[int]
    layer_s: Sequence[float]
    enter_s: Sequence[float]
    first_s: Callable[[int], float]
    hop_s: Callable[[int, int], float]
    back_s: Callable[[int, int], float]
    width: int = 1 << 30
    firsts_max: int = 1 << 30


def shortest_walk(ground: Ground, usable: Sequence[int]) -> Walk | None:
    """The cheapest walk over the `usable` numbers, or None when some layer has no host among them.

    The way back depends on the first node, which the shortest way to a layer has forgotten; so where another first
    node may still win, it is tried on its own, those nearest to the last one before others, `firsts_max` at most.
    """
    found = _from(ground, usable, None)
    if found is None:
        return None
    best, without_back_s = found
    firsts = [v for v in usable if ground.starts[v] == 0 and v != best.stages[0][0]]
    if firsts and ground.firsts_max:
        last = best.stages[-1][0]
        back_s = {v: ground.back_s(last, v) for v in firsts}
        for v in sorted(firsts, key=lambda v: (back_s[v], v))[: ground.firsts_max]:
            if without_back_s >= best.cost_s * NEARLY_FREE:
                break
            other = _from(ground, usable, v)
            if other is not None and other[0].cost_s < best.cost_s:
                best = other[0]
    return best


def _from(ground: Ground, usable: Sequence[int], first: int | None) -> tuple[Walk, float] | None:
    """The cheapest walk that begins at `first` (any, when None), and the least cost to the last layer."""
    starts, ends, layers = ground.starts, ground.ends, ground.layers
    opening: dict[int, list[int]] = {}
    bounds = {layers}
    for v in usable:
        opening.setdefault(starts[v], []).append(v)
        bounds.add(starts[v])
        bounds.add(ends[v])
    # cost at layer b of being inside node v is base[v] + layer_s[v] * b
    base: dict[int, float] = {}
    label: dict[int, Label] = {}
    crossing: list[int] = []
    for v in opening.get(0, ()):
        crossing.append(v)
        if first is not None and v != first:
            continue
        base[v] = ground.first_s(v) + ground.enter_s[v]
        label[v] = (v, 0, None)
    for b in sorted(bounds):
        if 0 < b < layers:
            fresh = opening.get(b, [])
            _hand_over(ground, b, base, label, crossing, fresh)
            crossing = [v for v in crossing if ends[v] > b] + fresh
            for v in [u for u in base if ends[u] <= b]:
                del base[v], label[v]
            if not base:
                return None
    best: tuple[float, Label] | None = None
    least = float("inf")
    for u, cost in base.items():
        if ends[u] >= layers:
            there = cost + ground.layer_s[u] * layers
            least = min(least, there)
            total = there + ground.back_s(u, _first(label[u]))
            if best is None or (total, u) < (best[0], best[1][0]):
                best = (total, label[u])
    return None if best is None else (Walk(_stages(best[1], layers), best[0]), least)


def _hand_over(
    ground: Ground,
    b: int,
    base: dict[int, float],
    label: dict[int, Label],
    crossing: Sequence[int],
    fresh: Sequence[int],
) -> None:
    """Let every node that begins at layer b, or that can take over from one that ends there, be entered at b."""
    ends, layer_s, enter_s, hop_s = ground.ends, ground.layer_s, ground.enter_s, ground.hop_s
    leavers = sorted([(cost + layer_s[u] * b, u) for u, cost in base.items() if label[u][1] < b])
    leavers = leavers[: ground.width]
    ending = [(cost, u) for cost, u in leavers if ends[u] == b]
    entered: list[tuple[int, float, Label]] = []
    for v in (*fresh, *(crossing if ending else ())):
        if ends[v] <= b:
            continue
        sources = leavers if ground.starts[v] == b else ending
        own = base.get(v)
        # Staying in v costs own + layer_s * b: only something cheaper than that is news.
        top = float("inf") if own is None else own + layer_s[v] * b - enter_s[v]
        origin = -1
        for cost, u in sources:
            if cost >= top:
                break
            reached = cost + hop_s(u, v)
            if reached < top and u != v and not _visits(label[u], v):
                top, origin = reached, u
        if origin >= 0:
            entered.append((v, top + enter_s[v] - layer_s[v] * b, (v, b, label[origin])))
    for v, cost, path in entered:
        base[v], label[v] = cost, path


def _visits(label: Label | None, v: int) -> bool:
    while label is not None:
        if label[0] == v:
            return True
        label = label[2]
    return False


def _first(label: Label) -> int:
    while label[2] is not None:
        label = label[2]
    return label[0]


def _stages(label: Label | None, layers: int) -> tuple[tuple[int, int, int], ...]:
    stages: list[tuple[int, int, int]] = []
    end = layers
    while label is not None:
        stages.append((label[0], label[1], end))
        end = label[1]
        label = label[2]
    return tuple(reversed(stages))
