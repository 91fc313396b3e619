"""Where requests wait for their turn: trio around `scheduler.admission`, one queue a model.

The core decides who starts, who is refused and which background request gives way; this wakes, refuses and stops their
tasks. What the mesh can take is asked from `capacity` whenever somebody comes, leaves or has waited a moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from node.errors import Overloaded
from scheduler.admission import (
    Admission,
    AdmissionConfig,
    Capacity,
    Ended,
    Event,
    Reject,
    Start,
    Submit,
    Ticket,
    Yield,
)

RENEW_S = 0.1


@dataclass(slots=True)
class Line:
    """The queue of one model."""

    admission: Admission
    places: dict[str, Place] = field(default_factory=dict)
    renewed_s: float = float("-inf")


class Place:
    """A request's turn, once it has come."""

    def __init__(self, intake: Intake, model: str, ticket: Ticket) -> None:
        self._intake = intake
        self._model = model
        self.ticket = ticket
        self.started = trio.Event()
        self.refusal: Overloaded | None = None
        self._scope: trio.CancelScope | None = None

    @contextmanager
    def turn(self) -> Iterator[trio.CancelScope]:
        """Work here is cancelled when others need the room; then wait for the next turn with `again`."""
        with trio.CancelScope() as scope:
            self._scope = scope
            if not self.started.is_set():
                scope.cancel()
            yield scope
        self._scope = None

    async def again(self) -> None:
        """Wait until it is this request's turn. Raises Overloaded."""
        while not self.started.is_set():
            with trio.move_on_after(RENEW_S):
                await self.started.wait()
            if not self.started.is_set():
                self._intake.renew(self._model, RENEW_S / 2)
        if self.refusal is not None:
            raise self.refusal

    def start(self) -> None:
        """Its turn came."""
        self.started.set()

    def refuse(self, refusal: Overloaded) -> None:
        """It will not come."""
        self.refusal = refusal
        self.started.set()

    def give_way(self) -> None:
        """Its turn is over; it waits for another."""
        self.started = trio.Event()
        if self._scope is not None:
            self._scope.cancel()


class Intake:
    """All queues of a gateway. `capacity(model, line's admission)` tells what the mesh can take for a model now."""

    def __init__(self, config: AdmissionConfig, capacity: Callable[[str, Admission], Capacity]) -> None:
        self._config = config
        self._capacity = capacity
        self._lines: dict[str, Line] = {}
        self.rejected = 0
        self.yielded = 0

    @asynccontextmanager
    async def place(self, model: str, ticket: Ticket) -> AsyncIterator[Place]:
        """Wait for a turn; it ends with the block. Raises Overloaded, at once where waiting would be in vain."""
        place = Place(self, model, ticket)
        line = self._lines.setdefault(model, Line(Admission(self._config)))
        line.places[ticket.request] = place
        try:
            self.renew(model)
            self._tell(line, Submit(ticket))
            await place.again()
            yield place
        finally:
            del line.places[ticket.request]
            self._tell(line, Ended(ticket.request))
            if line.places:
                self.renew(model)
            else:
                self._lines.pop(model, None)

    async def elsewhere(self, place: Place, model: str, after_s: float) -> None:
        """A background request lost its room to others of the mesh: it comes back to the queue's end a while later."""
        line = self._lines[model]
        place.give_way()
        self._tell(line, Ended(place.ticket.request))
        await trio.sleep(after_s)
        self.renew(model)
        self._tell(line, Submit(place.ticket))
        await place.again()

    def renew(self, model: str, after_s: float = 0.0) -> None:
        """Look again at what the mesh can take, unless that was done within `after_s`."""
        line, now_s = self._lines[model], trio.current_time()
        if now_s - line.renewed_s >= after_s:
            line.renewed_s = now_s
            self._tell(line, self._capacity(model, line.admission))

    def waiting(self, model: str) -> int:
        """Requests of a model that wait for their turn."""
        line = self._lines.get(model)
        return 0 if line is None else line.admission.waiting()

    def counts(self) -> dict[str, tuple[int, int]]:
        """(running, waiting) of each model that anybody asks for."""
        return {
            model: (line.admission.running(), line.admission.waiting()) for model, line in self._lines.items()
        }

    def _tell(self, line: Line, event: Event) -> None:
        for instruction in line.admission.handle(event, trio.current_time()):
            place = line.places.get(instruction.request)
            if place is None:
                continue
            match instruction:
                case Start():
                    place.start()
                case Reject(_, reason, retry_after_s):
                    self.rejected += 1
                    place.refuse(Overloaded(retry_after_s, reason))
                case Yield():
                    self.yielded += 1
                    place.give_way()
