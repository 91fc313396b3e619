"""Single changes to a standing plan that pay: a slow host relieved by a quick idle one, copies nobody needs let go.

For meshes too large to be weighed whole. Each function makes one plan of another and moves as little as can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.pipeline import Seat
from scheduler.shapes import Assignment, coverage

RELIEF_RATIO = 2.0
"""An idle node takes the span of a host that is this many times slower."""


def room_for(seat: Seat, start: int, end: int, layers: int) -> bool:
    """Whether [start, end) fits on the seat."""
    if start == 0:
        room = seat.room_alone if end == layers else seat.room_first
    else:
        room = seat.room_last if end == layers else seat.room
    return end - start <= room


def relieve(assignments: Sequence[Assignment], seats: Mapping[str, Seat], layers: int) -> list[Assignment]:
    """The assignments with the slowest host replaced by an idle node that is RELIEF_RATIO times quicker, if any is."""
    busy = {a.node for a in assignments}
    idle = sorted(
        (s for s in seats.values() if s.node not in busy and s.room > 0), key=lambda s: (s.layer_s, s.node)
    )
    for a in sorted(assignments, key=lambda a: (-seats[a.node].layer_s if a.node in seats else 0.0, a)):
        if a.node not in seats:
            continue
        for seat in idle:
            if seat.layer_s * RELIEF_RATIO > seats[a.node].layer_s:
                break
            if room_for(seat, a.start, a.end, layers):
                return [Assignment(seat.node, a.start, a.end) if b == a else b for b in assignments]
    return list(assignments)


def trim(
    assignments: Sequence[Assignment],
    copies: int,
    seats: Mapping[str, Seat],
    layers: int,
    sessions: Mapping[str, int] | None = None,
) -> list[Assignment]:
    """The assignments without those that no layer needs for its `copies`; let go first are those with fewest open
    sessions, of these the slowest."""
    open_at = sessions or {}
    kept = list(assignments)
    counts = coverage(kept, layers)

    def worth(a: Assignment) -> tuple[int, float, Assignment]:
        return open_at.get(a.node, 0), -seats[a.node].layer_s if a.node in seats else 0.0, a

    for a in sorted(assignments, key=worth):
        if all(counts[x] > copies for x in range(a.start, a.end)):
            kept.remove(a)
            for x in range(a.start, a.end):
                counts[x] -= 1
    return kept
