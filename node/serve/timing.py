"""How long a stage takes as its predecessor sees it: from handing work over until the stage says that it is done.

What a stage says of itself leaves out what it does not notice, such as being stopped or starved; what the one before it
measures does not. Pure; time is an argument.
"""

from __future__ import annotations

UNTOLD_MAX = 256


class Stopwatch:
    """Work handed over by position. Pieces handed over together are done one after another: each counts from the end of
    the one before it."""

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._free_s = float("-inf")

    def sent(self, position: int, now_s: float) -> None:
        """The positions from `position` on were handed over."""
        if len(self._sent) < UNTOLD_MAX:
            self._sent[position] = now_s

    def told(self, position: int, now_s: float) -> float | None:
        """The seconds that they took, or None for work that was not handed over."""
        sent_s = self._sent.pop(position, None)
        if sent_s is None:
            return None
        began_s, self._free_s = max(sent_s, self._free_s), now_s
        return max(0.0, now_s - began_s)
