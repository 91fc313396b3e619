"""The smallest additions that give every layer its hosts again: idle nodes take short layers, neighbours grow.

Bytes to fetch come first, then sessions disturbed (a span that grows is loaded anew), then hops and speed. It moves
nothing that works; when additions cannot do, it says so and `placement` plans afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from scheduler.pipeline import Seat
from scheduler.shapes import Assignment, ModelShape, NodeShape, coverage, memory_needed

Held = Mapping[str, Sequence[tuple[int, int]]]
GROW_PENALTY = 0.5
"""A node that grows counts as fetching this share of its old span again: its sessions are disturbed."""
PIECE_PENALTY = 0.5
"""An extra stage counts as this many layers to fetch."""


def fetch_bytes(
    model: ModelShape, old: tuple[int, int] | None, new: tuple[int, int], held: Iterable[tuple[int, int]] = ()
) -> int:
    """Weight bytes that a node must fetch to go from span `old` to `new`, with `held` on its disk."""
    have = [span for span in (old, *held) if span is not None]
    layers = range(new[0], new[1])
    total = sum(model.layer_bytes for x in layers if not any(a <= x < b for a, b in have))
    if new[0] == 0 and not any(a == 0 for a, _ in have):
        total += model.embed_bytes
    if new[1] == model.layers and not any(b == model.layers for _, b in have):
        tied_here = model.tied and (new[0] == 0 or any(a == 0 for a, _ in have))
        total += 0 if tied_here else model.head_weight_bytes
    return total


class Mender:
    """Additions to assignments, over fixed nodes."""

    def __init__(
        self, model: ModelShape, nodes: Sequence[NodeShape], seats: Sequence[Seat], held: Held
    ) -> None:
        self._model = model
        self._held = held
        self._seats = {seat.node: seat for seat in seats}
        self._memory = {node.id: node.memory_bytes for node in nodes}
        self._plain = {node.id for node in nodes if not node.devices}

    def fits(self, node: str, start: int, end: int) -> bool:
        """Whether the node has memory for [start, end)."""
        if node in self._plain:
            return memory_needed(self._model, start, end) <= self._memory[node]
        return end - start <= self._room(self._seats[node], start, end)

    def _room(self, seat: Seat, start: int, end: int) -> int:
        if start == 0 and end == self._model.layers:
            return seat.room_alone
        if start == 0:
            return seat.room_first
        return seat.room_last if end == self._model.layers else seat.room

    def mend(self, assignments: Sequence[Assignment], copies: int) -> list[Assignment] | None:
        """The assignments with additions: each layer once, then as near to `copies` times as memory goes.

        None when some layer cannot be covered by additions alone.
        """
        spans = {a.node: (a.start, a.end) for a in assignments}
        for target in range(1, copies + 1):
            while True:
                short = self._short(spans, target)
                if not short:
                    break
                step = self._best_step(spans, short, target)
                if step is None:
                    if target == 1:
                        return None
                    break
                spans[step.node] = (step.start, step.end)
            if short:
                break
        return [Assignment(node, start, end) for node, (start, end) in sorted(spans.items())]

    def _short(self, spans: Mapping[str, tuple[int, int]], target: int) -> list[bool]:
        counts = coverage([Assignment(n, a, b) for n, (a, b) in spans.items()], self._model.layers)
        short = [count < target for count in counts]
        return short if any(short) else []

    def _best_step(
        self, spans: Mapping[str, tuple[int, int]], short: Sequence[bool], target: int
    ) -> Assignment | None:
        """One node's new span that covers short layers at the least cost a layer; None when none can."""
        best: tuple[tuple[float, float, str, int, int], Assignment] | None = None
        for node, seat in self._seats.items():
            if seat.room < 1:
                continue
            old = spans.get(node)
            if old is not None and target > 1:
                continue  # a second copy is not worth disturbing a host
            for start, end in self._windows(seat, old, short):
                covered = sum(short[x] and not (old and old[0] <= x < old[1]) for x in range(start, end))
                if covered == 0 or not self.fits(node, start, end):
                    continue
                cost = self._cost(node, old, (start, end)) / covered
                key = (round(cost, 9), seat.layer_s, node, start, end)
                if best is None or key < best[0]:
                    best = (key, Assignment(node, start, end))
        return None if best is None else best[1]

    def _cost(self, node: str, old: tuple[int, int] | None, new: tuple[int, int]) -> float:
        """Layers' worth of bytes to fetch, with the penalties for growing and for one more stage."""
        fetched = fetch_bytes(self._model, old, new, self._held.get(node, ())) / self._model.layer_bytes
        if old is not None:
            return fetched + GROW_PENALTY * (old[1] - old[0])
        return fetched + PIECE_PENALTY

    def _windows(
        self, seat: Seat, old: tuple[int, int] | None, short: Sequence[bool]
    ) -> list[tuple[int, int]]:
        """Spans worth trying: old ones grown to either side, new ones at edges of short runs and on held layers."""
        layers = len(short)
        runs = short_runs(short)
        found: set[tuple[int, int]] = set()
        if old is not None:
            for a, b in runs:
                if a <= old[1] < b:
                    found.update((old[0], end) for end in range(old[1] + 1, b + 1))
                if a < old[0] <= b:
                    found.update((start, old[1]) for start in range(a, old[0]))
            return [w for w in sorted(found) if w[1] - w[0] <= seat.room]
        for a, b in runs:
            anchors = {a, max(a, b - seat.room)}
            anchors.update(
                x for h, e in self._held.get(seat.node, ()) for x in (h, max(0, e - seat.room)) if a <= x < b
            )
            for start in anchors:
                # First and last stages have less room: shorter windows at the ends of the model.
                for size in {seat.room, seat.room_first, seat.room_last, seat.room_alone}:
                    if size > 0:
                        found.add((start, min(b, start + size)))
                        found.add((max(a, min(b, layers) - size), b))
        return sorted(w for w in found if w[0] < w[1] and w[1] - w[0] <= seat.room)


def short_runs(short: Sequence[bool]) -> list[tuple[int, int]]:
    """Runs [start, end) of layers that are short."""
    runs: list[tuple[int, int]] = []
    for layer, lacking in enumerate(short):
        if lacking and runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        elif lacking:
            runs.append((layer, layer + 1))
    return runs
