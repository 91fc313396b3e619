"""An engine that keeps note of what its steps took, for the planner: a clock around `run`, and nothing else.

Steps are told apart as decode (single positions and windows of some sessions) and prefill (one piece of a prompt), each
with the layers that it really passed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model_shards import Engine, ParkingLot, Span, Step, StepResult
from scheduler.corrections import Kind

KEPT_MAX = 256


@dataclass(frozen=True, slots=True)
class Took:
    """A step of `tokens` tokens through `layers` layers (and the head) took `seconds`."""

    kind: Kind
    layers: int
    tokens: int
    seconds: float
    with_head: bool


class TimedEngine(Engine):
    """`busy_s` is the time spent in `run` so far. Called from one thread at a time; `take` from any."""

    def __init__(
        self,
        span: Span,
        *,
        kv_bytes_max: int,
        parking: ParkingLot | None = None,
        identity: str = "",
        kv_quant: str = "none",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(
            span, kv_bytes_max=kv_bytes_max, parking=parking, identity=identity, kv_quant=kv_quant
        )
        self.busy_s = 0.0
        self._clock = clock
        self._layers: dict[str, int] = {}
        self._took: deque[Took] = deque(maxlen=KEPT_MAX)

    def open(self, session: str, start: int, end: int, tokens_max: int, **more: Any) -> None:
        """As the engine's."""
        super().open(session, start, end, tokens_max, **more)
        self._layers[session] = end - start

    def close(self, session: str, tokens: Sequence[int] = ()) -> None:
        """As the engine's."""
        self._layers.pop(session, None)
        super().close(session, tokens)

    def run(
        self, steps: Sequence[Step], check_cancelled: Callable[[], None] = lambda: None
    ) -> list[StepResult]:
        """As the engine's. What was broken off counts as work, not as a measure."""
        began_s = self._clock()
        try:
            results = super().run(steps, check_cancelled)
        finally:
            took_s = self._clock() - began_s
            self.busy_s += took_s
        self._note(steps, took_s)
        return results

    def take(self) -> list[Took]:
        """What was noted since the last call."""
        found = []
        while self._took:
            found.append(self._took.popleft())
        return found

    def _note(self, steps: Sequence[Step], took_s: float) -> None:
        """A measure of one kind of work; a batch of both, or over different layers, is none."""
        layers = {self._layers.get(step.session, 0) for step in steps}
        if len(layers) != 1 or 0 in layers or took_s <= 0:
            return
        with_head = any(step.sample is not None for step in steps)
        if max(step.certain for step in steps) == 1:
            rows = sum(step.count for step in steps)
            self._took.append(Took("decode", layers.pop(), rows, took_s, with_head))
        elif len(steps) == 1:
            self._took.append(Took("prefill", layers.pop(), steps[0].count, took_s, with_head))
