"""From nodes to seats: how many layers fit where, and how long a layer takes there.

It joins shapes and cost into the figures that the placement search works on, and says exactly what is short when a
pool cannot hold a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from scheduler import cost
from scheduler.errors import Shortage
from scheduler.pipeline import Seat
from scheduler.policy import ANYONE, Policy, slowdown
from scheduler.shapes import Link, Links, ModelShape, NodeShape, memory_needed

TIME_LEAST_S = 1e-12


def rooms_of(model: ModelShape, node: NodeShape) -> tuple[int, int, int, int]:
    """Layers that fit on the node: inside a pipeline, as first stage, as last, alone. Exact by memory_needed.

    With devices each holds whole layers and its own working space, embedding and head each lie on one device, and all
    of them together stay within the node's memory.
    """
    if not node.devices:
        return _rooms(model, [node.memory_bytes])
    whole, parts = _rooms(model, [node.memory_bytes]), _rooms(model, [d.memory_bytes for d in node.devices])
    inner, first, last, alone = (min(pair) for pair in zip(whole, parts, strict=True))
    return inner, first, last, alone


def _rooms(model: ModelShape, sizes: Sequence[int]) -> tuple[int, int, int, int]:
    each = model.layer_bytes + model.kv_bytes_per_layer
    embed, head = model.embed_bytes, model.head_weight_bytes
    both = max(embed, head) if model.tied else embed + head
    alone = _fit(sizes, each, model.working_bytes, [both])
    if len(sizes) > 1 and not model.tied:
        alone = max(alone, _fit(sizes, each, model.working_bytes, [embed, head]))
    found = (
        _fit(sizes, each, model.working_bytes, []),
        _fit(sizes, each, model.working_bytes, [embed]),
        _fit(sizes, each, model.working_bytes, [head]),
        alone,
    )
    inner, first, last, alone = (max(0, min(n, model.layers)) for n in found)
    return inner, first, last, alone


def _fit(sizes: Sequence[int], each: int, working: int, extras: Sequence[int]) -> int:
    """Layers that fit beside `extras`, each put where it costs fewest layers; -1 when an extra fits nowhere."""
    free = [size - working for size in sizes]
    for extra in sorted(extras, reverse=True):
        able = [k for k, room in enumerate(free) if room >= extra]
        if not able:
            return -1
        place = min(able, key=lambda k: (free[k] // each - (free[k] - extra) // each, free[k], k))
        free[place] -= extra
    return sum(max(0, room) // each for room in free)


@lru_cache(maxsize=1 << 16)
def seat_of(model: ModelShape, node: NodeShape, batch: int = 1, policy: Policy = ANYONE) -> Seat:
    """The node's figures for the model; no room where the policy (or a pin) does not allow it."""
    inner, first, last, alone = rooms_of(model, node)
    if node.pinned is not None or not policy.allows(node):
        inner = first = last = alone = 0
    elif not policy.allows_ends(node):
        first = last = alone = 0
    slow = slowdown(node)
    return Seat(
        node=node.id,
        layer_s=max(TIME_LEAST_S, slow * _layer_s(model, node, batch)),
        head_s=slow * cost.head_s(model, node),
        room=inner,
        room_first=first,
        room_last=last,
        room_alone=alone,
        reliability=min(1.0, max(0.01, node.reliability)),
    )


def _layer_s(model: ModelShape, node: NodeShape, batch: int) -> float:
    """One layer's time; over several devices the mean, weighed by the layers that each can hold."""
    if node.decode_s_per_layer is not None or not node.devices:
        return cost.decode_s_per_layer(model, node, batch)
    each = model.layer_bytes + model.kv_bytes_per_layer
    total = weight = 0.0
    for k, device in enumerate(node.devices):
        part = NodeShape(f"{node.id}/{k}", device.memory_bytes, device.flops_per_s, device.read_bytes_per_s)
        layers = max(0, device.memory_bytes - model.working_bytes) // each
        total += layers * cost.decode_s_per_layer(model, part, batch)
        weight += layers
    return total / weight if weight else cost.decode_s_per_layer(model, node, batch)


def hops_between(
    model: ModelShape, names: Sequence[str], links: Links
) -> float | Callable[[int, int], float]:
    """Seconds for one token's hidden state between seats, asked of `links` once a pair; one figure if all agree."""
    known: dict[tuple[int, int], float] = {}

    def hop(a: int, b: int) -> float:
        found = known.get((a, b))
        if found is None:
            found = known[a, b] = cost.hop_s(model, links(names[a], names[b]))
        return found

    if 2 <= len(names) <= UNIFORM_CHECK_MAX:
        figures = {hop(a, b) for a in range(len(names)) for b in range(len(names)) if a != b}
        if len(figures) == 1:
            return figures.pop()
    return hop


UNIFORM_CHECK_MAX = 64


def same_link(_a: str, _b: str) -> Link:
    """A mesh without distances."""
    return Link(0.0, 1e12)


def spare_layers(layers: int, seats: Iterable[Seat]) -> int:
    """The most layers that one copy could place on these seats, embedding and head counted."""
    found = [seat for seat in seats if seat.room > 0]
    if any(seat.room_alone >= layers for seat in found):
        return layers
    first = sorted((s for s in found if s.room_first > 0), key=lambda s: (s.room - s.room_first, s.node))[:2]
    last = sorted((s for s in found if s.room_last > 0), key=lambda s: (s.room - s.room_last, s.node))[:2]
    total = sum(seat.room for seat in found)
    best = 0
    for f in first:
        for g in last:
            if f.node != g.node:
                best = max(best, total - (f.room - f.room_first) - (g.room - g.room_last))
    return min(best, layers)


def shortage(
    model: ModelShape, nodes: Sequence[NodeShape], seats: Sequence[Seat], policy: Policy = ANYONE
) -> Shortage:
    """What is missing for one copy. `needed` counts working space once a node that would take part."""
    available = sum(node.memory_bytes for node in nodes)
    taking_part = max(1, sum(seat.room > 0 for seat in seats))
    needed = model.weight_bytes(0, model.layers) + model.layers * model.kv_bytes_per_layer
    needed += model.working_bytes * taking_part
    short = max(1, model.layers - spare_layers(model.layers, seats))
    return Shortage(needed, available, short, model.layers, missing_bytes(model, seats, policy))


def missing_bytes(model: ModelShape, seats: Sequence[Seat], policy: Policy = ANYONE) -> int:
    """The least memory of one more node (with whatever tags the policy asks for) beside which one copy fits."""
    tags = policy.require | policy.ends_require

    def seat_with(size: int) -> Seat:
        return seat_of(model, NodeShape("", size, 1.0, 1.0, tags=tags), 1, policy)

    return least_memory(model.layers, seats, seat_with, memory_needed(model, 0, model.layers))


def least_memory(layers: int, seats: Sequence[Seat], seat_with: Callable[[int], Seat], enough: int) -> int:
    """The least size (bytes, at most `enough`) for which a copy fits on `seats` and `seat_with(size)`."""
    low, high = 0, enough
    while low < high:
        middle = (low + high) // 2
        if one_copy_fits(layers, [*seats, seat_with(middle)]):
            high = middle
        else:
            low = middle + 1
    return high


def one_copy_fits(layers: int, seats: Sequence[Seat]) -> bool:
    """Whether some seat holds the model alone, or some seats do in a row, embedding and head counted."""
    if any(seat.room_alone >= layers for seat in seats):
        return True
    return layers > 1 and spare_layers(layers, seats) >= layers
