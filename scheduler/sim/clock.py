"""Virtual time: a heap of things to do, by time and then by the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Runs callbacks in the order of their times; `now_s` is the time of the one that runs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, time_s: float, what: Callable[..., None], *args: Any) -> None:
        """Call `what(*args)` at that time, or now if it is past."""
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._asked, what, args))
        self._asked += 1

    def every(self, period_s: float, until_s: float, what: Callable[[], None]) -> None:
        """Call `what` each period, first after one."""

        def again() -> None:
            what()
            if self.now_s + period_s <= until_s:
                self.at(self.now_s + period_s, again)

        if self.now_s + period_s <= until_s:
            self.at(self.now_s + period_s, again)

    def run(self, until_s: float) -> None:
        """Until nothing is left, or the next thing is later than that."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, what, args = heapq.heappop(self._heap)
            self.events += 1
            what(*args)
        self.now_s = until_s if until_s != float("inf") else self.now_s
