"""How likely each node is to be there, from the time it was and was not. A pure core over who is live when.

It starts from the guess that nodes are nearly always there, and what it saw counts for less as it grows old.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

PRIOR_S = 1800.0
PRIOR_SHARE = 0.98
MEMORY_S = 6 * 3600.0
FORGET_AFTER_S = 24 * 3600.0
STEP_S_MAX = 60.0
"""A longer pause between two looks is this computer's own (asleep, stopped): it says nothing of the others."""


@dataclass(slots=True)
class _Seen:
    up_s: float = 0.0
    down_s: float = 0.0
    last_up_s: float = 0.0


class Presence:
    """Times are monotonic seconds of the caller's clock."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._at_s: float | None = None

    def note(self, live: Collection[str], now_s: float) -> None:
        """Who is there now, and was since the last look."""
        step_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        self._at_s = now_s
        if step_s > STEP_S_MAX:
            step_s = 0.0
        fade = math.exp(-step_s / MEMORY_S)
        for name in live:
            self._seen.setdefault(name, _Seen(last_up_s=now_s))
        for name, seen in list(self._seen.items()):
            seen.up_s *= fade
            seen.down_s *= fade
            if name in live:
                seen.up_s += step_s
                seen.last_up_s = now_s
            else:
                seen.down_s += step_s
            if now_s - seen.last_up_s > FORGET_AFTER_S:
                del self._seen[name]

    def reliability(self, name: str) -> float:
        """The share of the time that the node is there, in steps of a hundredth."""
        seen = self._seen.get(name, _Seen())
        share = (seen.up_s + PRIOR_SHARE * PRIOR_S) / (seen.up_s + seen.down_s + PRIOR_S)
        return round(share, 2)
