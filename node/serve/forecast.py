"""What the mesh can take from this gateway: room, seats, and tokens a second.

Pure: it is told of work done with the time, and answers with numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from scheduler import Hosted

WINDOW_S = 5.0
SATURATED_S = 1.0
BUCKET_S = 0.05
SEATS_PER_CONCURRENCY = 4
"""Requests at once for each session of full length that a host has room for."""


class Pace:
    """How many tokens a second the mesh works off for this gateway, seen while requests wait."""

    def __init__(self) -> None:
        self._work: deque[tuple[float, int]] = deque()
        self._waiting_since_s: float | None = None

    def worked(self, tokens: int, now_s: float) -> None:
        """So many tokens of prompts or answers are done."""
        if self._work and now_s - self._work[-1][0] < BUCKET_S:
            self._work[-1] = (self._work[-1][0], self._work[-1][1] + tokens)
        else:
            self._work.append((now_s, tokens))
        while self._work[0][0] < now_s - WINDOW_S:
            self._work.popleft()

    def waits(self, anybody: bool, now_s: float) -> None:
        """Whether requests wait: only then does what is done tell what can be done."""
        if not anybody:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = now_s

    def tokens_per_s(self, prior: float, now_s: float) -> float:
        """The measured rate, or the `prior` where too little was seen."""
        if self._waiting_since_s is None or now_s - self._waiting_since_s < SATURATED_S:
            return prior
        since_s = max(self._waiting_since_s, now_s - WINDOW_S)
        done = sum(tokens for at_s, tokens in self._work if at_s > since_s)
        return done / (now_s - since_s) if done else prior


def room_tokens(hosted: Sequence[Hosted], layers: int) -> int:
    """Tokens for which every layer has room on some host, whichever chains they take."""
    rooms = [0] * layers
    for h in hosted:
        for layer in range(max(0, h.start), min(h.end, layers)):
            rooms[layer] += h.kv_tokens_free
    return min(rooms, default=0)


def seats(copies: Sequence[int], concurrency: int) -> int:
    """Requests that may run at once."""
    return max(1, min(copies, default=1)) * max(1, concurrency) * SEATS_PER_CONCURRENCY
