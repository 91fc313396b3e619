"""When a node knows enough of its mesh to plan for it. A pure core over its start, its meetings and its looks.

A node that just started has heard nothing yet. One that was stopped or asleep finds that all which others said has run
out meanwhile: it sees a mesh of itself alone, in which it plans, and would lay every model upon itself. Both first wait
until they have met somebody and heard what is so.
"""

from __future__ import annotations

SETTLE_S = 1.5
"""So long after a meeting all that the other knows has come."""
ALONE_S = 8.0
"""Whoever meets nobody for so long after a pause is alone, and plans for that."""
PAUSE_S_MAX = 5.0
"""Looks are a second apart; what was said a longer pause ago may have run out, or been answered by others since."""


class Settling:
    """`now_s` are monotonic seconds, `mesh_s` those by which records run out: they go on while a computer sleeps, and
    where they are set forward the records run out just so."""

    def __init__(self) -> None:
        self._settled_s = self._latest_s = float("inf")
        self._looked_s: float | None = None

    def begin(self, now_s: float, *, others: bool) -> None:
        """Life in the mesh begins; `others` where any member is known."""
        self._settled_s = self._latest_s = now_s + (SETTLE_S if others else 0.0)

    def joined(self, now_s: float) -> None:
        """The first member was reached: all that was seen before is nothing."""
        self._settled_s = self._latest_s = now_s + SETTLE_S

    def met(self, now_s: float) -> None:
        """A connection to a member stands anew, or a member said something new."""
        self._settled_s = min(self._settled_s, now_s + SETTLE_S)

    def lost(self, now_s: float) -> None:
        """A connection ended. What came on it just after a pause was said before: that meeting was none."""
        if now_s < self._settled_s:
            self._settled_s = self._latest_s

    def look(self, now_s: float, mesh_s: float) -> bool:
        """Begin a look at the mesh; whether what is seen may be planned with."""
        if self._looked_s is not None and mesh_s - self._looked_s > PAUSE_S_MAX:
            self._settled_s = self._latest_s = now_s + ALONE_S
        self._looked_s = mesh_s
        return now_s >= self._settled_s

    def looked(self, mesh_s: float) -> None:
        """A look has ended: the time that planning took is no pause."""
        self._looked_s = mesh_s
