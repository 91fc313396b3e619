"""The smallest additions that give every layer its hosts again: idle nodes take short layers, neighbours grow.

Bytes to fetch come first, then sessions disturbed (a span that grows is loaded anew), then hops and speed. It moves
nothing that works; when additions cannot do, it says so and `placement` plans afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from scheduler.pipeline import Seat
from scheduler.shapes import Assignment, ModelShape, coverage

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
    if not have:
        return model.weight_bytes(*new)
    total = sum(model.layer_bytes for x in range(*new) if not any(a <= x < b for a, b in have))
    if new[0] == 0 and not any(a == 0 for a, _ in have):
        total += model.embed_bytes
    if new[1] == model.layers and not any(b == model.layers for _, b in have):
        tied_here = model.tied and (new[0] == 0 or any(a == 0 for a, _ in have))
        total += 0 if tied_here else model.head_weight_bytes
    return total


class Mender:
    """Additions to assignments, over fixed nodes."""

    def __init__(
        self,
        model: ModelShape,
        seats: Sequence[Seat],
        held: Held,
        fetch_factors: Mapping[str, float] | None = None,
    ) -> None:
        self._model = model
        self._fetch_factors = fetch_factors or {}
        self._held = held
        self._seats = {seat.node: seat for seat in seats}

    def fits(self, node: str, start: int, end: int) -> bool:
        """Whether the node has memory for [start, end); rooms are exact by memory_needed."""
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
        counts = coverage(list(assignments), self._model.layers)
        for target in range(min(counts) + 1, copies + 1):
            found, covered = self._reach(spans, target, self._held)
            if min(covered) < target:
                # Cheap scraps of room, or what lies on disks, can lead to pieces that no whole copy is made of: then
                # the cheaper of a copy as if nothing lay there, and of one in as few pieces as can be.
                ways = [self._reach(spans, target, self._held, few=True)]
                if any(self._held.values()):
                    ways.append(self._reach(spans, target, {}))
                whole = [way for way in ways if min(way[1]) >= target]
                found, covered = min(
                    whole, key=lambda way: self._sum(spans, way[0]), default=(found, covered)
                )
            if min(covered) < target == 1:
                return None
            spans = found
            if min(covered) < target:
                break
        return [Assignment(node, start, end) for node, (start, end) in sorted(spans.items())]

    def _sum(self, old: Mapping[str, tuple[int, int]], new: Mapping[str, tuple[int, int]]) -> float:
        """What all additions cost together."""
        changed = [(node, span) for node, span in sorted(new.items()) if old.get(node) != span]
        return sum(self._cost(node, old.get(node), span, self._held.get(node, ())) for node, span in changed)

    def _reach(
        self, spans: Mapping[str, tuple[int, int]], target: int, held: Held, *, few: bool = False
    ) -> tuple[dict[str, tuple[int, int]], list[int]]:
        """The spans with additions that bring each layer to `target` hosts, or as near as they come, and the hosts of
        each layer then. The cheapest addition a layer comes first, or with `few` the one of most layers."""
        spans = dict(spans)
        counts = coverage([Assignment(n, a, b) for n, (a, b) in spans.items()], self._model.layers)
        idle = self._idle(spans, held)
        while min(counts) < target:
            step = self._best_step(spans, idle, [count < target for count in counts], target, held, few)
            if step is None:
                break
            old = spans.get(step.node)
            for x in range(step.start, step.end):
                counts[x] += not (old and old[0] <= x < old[1])
            spans[step.node] = (step.start, step.end)
            for group in idle.values():
                if step.node in group:
                    group.remove(step.node)
        return spans, counts

    def _idle(self, spans: Mapping[str, tuple[int, int]], held: Held) -> dict[object, list[str]]:
        """Nodes without a span, quickest first, those alike in room together; holders of weights each alone."""
        groups: dict[object, list[str]] = {}
        for seat in sorted(self._seats.values(), key=lambda s: (s.layer_s, s.node)):
            if seat.room > 0 and seat.node not in spans:
                factor = self._fetch_factors.get(seat.node, 1.0)
                alike = (seat.room, seat.room_first, seat.room_last, seat.room_alone, factor)
                groups.setdefault(seat.node if held.get(seat.node) else alike, []).append(seat.node)
        return groups

    def _best_step(
        self,
        spans: Mapping[str, tuple[int, int]],
        idle: Mapping[object, Sequence[str]],
        short: Sequence[bool],
        target: int,
        held: Held,
        few: bool,
    ) -> Assignment | None:
        """One node's new span that covers short layers at the least cost a layer, with `few` as many as can be; None
        when none can.

        Only the first copy of a layer is worth disturbing a host for.
        """
        runs = short_runs(short)
        candidates: list[tuple[str, tuple[int, int] | None]] = [
            (group[0], None) for group in idle.values() if group
        ]
        if target == 1:
            candidates.extend(
                (node, old)
                for node, old in spans.items()
                if node in self._seats and any(a <= old[1] < b or a < old[0] <= b for a, b in runs)
            )
        best: tuple[tuple[int, float, float, str, int, int], Assignment] | None = None
        for node, old in candidates:
            seat = self._seats[node]
            for start, end in self._windows(seat, old, runs, held.get(node, ())):
                covered = sum(short[start:end])
                if covered == 0 or end - start > self._room(seat, start, end):
                    continue
                cost = self._cost(node, old, (start, end), held.get(node, ())) / covered
                key = (-covered if few else 0, round(cost, 9), seat.layer_s, node, start, end)
                if best is None or key < best[0]:
                    best = (key, Assignment(node, start, end))
        return None if best is None else best[1]

    def _cost(
        self,
        node: str,
        old: tuple[int, int] | None,
        new: tuple[int, int],
        held: Iterable[tuple[int, int]],
    ) -> float:
        """Layers' worth of bytes to fetch, with the penalties for growing and for one more stage."""
        fetched = fetch_bytes(self._model, old, new, held) / self._model.layer_bytes
        fetched *= self._fetch_factors.get(node, 1.0)
        if old is not None:
            return fetched + GROW_PENALTY * (old[1] - old[0])
        return fetched + PIECE_PENALTY

    def _windows(
        self,
        seat: Seat,
        old: tuple[int, int] | None,
        runs: Sequence[tuple[int, int]],
        held: Sequence[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Spans worth trying: old ones grown to either side, new ones at edges of short runs and on held layers."""
        found: set[tuple[int, int]] = set()
        if old is not None:
            for a, b in runs:
                if a <= old[1] < b:
                    found.update((old[0], end) for end in range(old[1] + 1, b + 1))
                if a < old[0] <= b:
                    found.update((start, old[1]) for start in range(a, old[0]))
            return sorted(found)
        # First and last stages have less room: shorter windows at the ends of the model.
        sizes = {seat.room, seat.room_first, seat.room_last, seat.room_alone} - {0}
        for a, b in runs:
            anchors = {a, max(a, b - seat.room)}
            anchors.update(x for h, e in held for x in (h, max(0, e - seat.room)) if a <= x < b)
            for size in sizes:
                found.update((start, min(b, start + size)) for start in anchors)
                found.add((max(a, b - size), b))
        return sorted(found)


def short_runs(short: Sequence[bool]) -> list[tuple[int, int]]:
    """Runs [start, end) of layers that are short."""
    runs: list[tuple[int, int]] = []
    for layer, lacking in enumerate(short):
        if lacking and runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        elif lacking:
            runs.append((layer, layer + 1))
    return runs
