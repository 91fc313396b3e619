"""What runs next on one device: continuous batching with chunked prefill, priorities, parking and admission.

A pure core: it is told of sessions, of work and of the time, and says which work runs together, who is parked (its KV
cache swapped out) so that another may come in, and when a refused one should come again. It holds no tensors, no clock
and no threads.

Work comes in chunks that the engine computes whole: single positions and windows of guesses (decode), which run
together, and pieces of a prompt, which run one at a time, because a piece keeps its own shape whoever runs beside it.
Promises, which `validate` checks:
- between two turns of a waiting decode at most one piece of a prompt runs, however many are waiting;
- a turn of decodes comes between two pieces only if decodes wait: the device is never idle while there is work;
- who yields (background work) runs only where nobody else waits, and its batch is stopped between two layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from model_shards.errors import LocalFault

STEP_S_ASSUMED = 0.1
SMOOTHING = 0.2
RETRY_S_MIN = 0.1
RETRY_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Decodes of ``rows_max`` rows in all share a batch. A piece of a prompt holds at most ``chunk_tokens_max``
    positions: longer steps are cut before they come here. Sessions of priority ``yields_from`` or later yield to
    earlier ones."""

    rows_max: int = 64
    chunk_tokens_max: int = 128
    yields_from: int = 2


@dataclass(frozen=True, slots=True)
class Run:
    """Compute these pieces of work (their numbers) as one batch, then say `finished`."""

    work: tuple[int, ...]
    sessions: tuple[str, ...]
    yields: bool


@dataclass(frozen=True, slots=True)
class Resume:
    """Bring the parked session's cache back, then say `resumed`."""

    session: str


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a session may come in: at once where ``refused_s`` is None, after these were ``parked``; else the
    seconds after which it may try again."""

    parked: tuple[str, ...] = ()
    refused_s: float | None = None


@dataclass(slots=True)
class _Work:
    number: int
    count: int
    since_s: float
    rows: int = 1
    chunks_seen: int = 0


@dataclass(slots=True)
class _Seat:
    """An open session. ``tokens_left`` is how many positions it may still take, ``prompt_left`` those of its prompt."""

    priority: int
    blocks: int
    prompt_left: int
    tokens_left: int
    opened_s: float
    order: int
    parked: bool = False
    step_s: float = 0.0
    last_s: float | None = None
    work: deque[_Work] = field(default_factory=deque)


class Batcher:
    """One device's sessions and their waiting work. ``blocks`` are KV blocks, times are seconds of one clock."""

    def __init__(self, blocks: int, limits: BatchLimits | None = None) -> None:
        self.limits = limits or BatchLimits()
        self.blocks = blocks
        self._seats: dict[str, _Seat] = {}
        self._running: dict[str, _Work] = {}
        self._deserted: set[str] = set()
        self._runs_yielding = self._runs_chunk = self._chunk_last = False
        self._opened = self._numbered = 0

    def __contains__(self, session: str) -> bool:
        return session in self._seats

    def room(self, priority: int, blocks: int, free: int, now_s: float) -> Room:
        """Whether a session of ``blocks`` may come in now that ``free`` blocks are held by nobody.

        Who is parked already comes back before newcomers that are not more urgent.
        """
        owed = sum(seat.blocks for seat in self._seats.values() if seat.parked and seat.priority <= priority)
        if blocks + owed <= free:
            return Room()
        chosen: list[str] = []
        gained = free - owed
        for name, seat in self._yielding(priority):
            chosen.append(name)
            gained += seat.blocks
            if blocks <= gained:
                return Room(tuple(chosen))
        return Room(refused_s=self._retry_s(priority, blocks + owed - free, now_s))

    def opened(
        self, session: str, priority: int, blocks: int, prompt_tokens: int, tokens_max: int, now_s: float
    ) -> None:
        """A session came in: it has ``prompt_tokens`` to compute and up to ``tokens_max`` positions in all."""
        if session in self._seats:
            raise LocalFault(f"session {session} is open already")
        self._opened += 1
        seat = _Seat(priority, blocks, prompt_tokens, tokens_max, now_s, self._opened)
        self._seats[session] = seat

    def closed(self, session: str) -> tuple[int, ...]:
        """A session left; returns its work that will not run. What runs already is stopped between two layers if
        nobody else shares its batch, see `stop`."""
        seat = self._seats.pop(session, None)
        return tuple(work.number for work in seat.work) if seat is not None else ()

    def dropped(self, session: str) -> tuple[int, ...]:
        """Nobody waits for a session's work any more, though it stays open; returns what will not run."""
        seat = self._seats.get(session)
        if seat is None:
            return ()
        if session in self._running:
            self._deserted.add(session)
        numbers = tuple(work.number for work in seat.work)
        seat.work.clear()
        return numbers

    def submitted(self, session: str, count: int, now_s: float, *, rows: int = 1) -> int:
        """A session has work of ``count`` positions; returns its number. One position may come with guesses at what
        follows it, a window of ``rows`` rows."""
        seat = self._seats.get(session)
        if seat is None:
            raise LocalFault(f"session {session} is not open")
        if not 1 <= count <= self.limits.chunk_tokens_max:
            raise LocalFault(f"work of {count} positions, expected 1 to {self.limits.chunk_tokens_max}")
        if not 1 <= rows <= self.limits.rows_max or (rows > 1 and count > 1):
            raise LocalFault(f"a window of {rows} rows over {count} positions")
        self._numbered += 1
        work = _Work(self._numbered, count, now_s, rows)
        if self._running and self._runs_chunk and self._runs_yielding == self._yields(seat):
            work.chunks_seen = 1
        seat.work.append(work)
        return work.number

    def parked(self, session: str, blocks: int) -> None:
        """The session's blocks were given up; it needs ``blocks`` to come back (more than it had where it shared)."""
        seat = self._seats.get(session)
        if seat is not None:
            seat.parked, seat.blocks = True, blocks

    def resumed(self, session: str, now_s: float) -> None:
        """The session has its blocks again; it waits as if it had come now."""
        seat = self._seats.get(session)
        if seat is None:
            return
        seat.parked = False
        for work in seat.work:
            work.since_s, work.chunks_seen = now_s, 0

    def next(self, free: int, now_s: float) -> Run | Resume | None:
        """What to do now that the device is idle; ``free`` blocks are held by nobody."""
        if self._running:
            raise LocalFault("a batch is running")
        heads = self._heads(parked=False)
        urgent = {name: seat for name, seat in heads.items() if not self._yields(seat)}
        back = self._resumable(free, only_urgent=bool(urgent))
        if back is not None:
            return Resume(back)
        ready = urgent or heads
        if not ready:
            return None
        decodes = [name for name, seat in ready.items() if seat.work[0].count == 1]
        pieces = [name for name, seat in ready.items() if seat.work[0].count > 1]
        waited = self._chunk_last or any(ready[name].work[0].chunks_seen for name in decodes)
        if decodes and (waited or not pieces):
            decodes.sort(key=lambda name: _turn(ready[name]))
            return self._begin(self._fitting(decodes, ready), yields=not urgent, chunk=False)
        piece = min(pieces, key=lambda name: (ready[name].priority, -_response(ready[name], now_s)))
        for name in decodes:
            ready[name].work[0].chunks_seen += 1
        return self._begin([piece], yields=not urgent, chunk=True)

    @property
    def stop(self) -> str:
        """Why the running batch should end between two layers: "abandoned", "preempted", or "" where it should not."""
        if not self._running:
            return ""
        if all(name in self._deserted or name not in self._seats for name in self._running):
            return "abandoned"
        if self._runs_yielding and any(
            seat.work and not seat.parked and not self._yields(seat) for seat in self._seats.values()
        ):
            return "preempted"
        return ""

    def finished(self, now_s: float, *, again: bool = False) -> None:
        """The running batch ended; ``again`` where it was stopped and its work still waits."""
        for name, work in self._running.items():
            seat = self._seats.get(name)
            if seat is None:
                continue
            if again:
                if name not in self._deserted:
                    seat.work.appendleft(work)
                continue
            seat.prompt_left = max(0, seat.prompt_left - work.count)
            seat.tokens_left = max(0, seat.tokens_left - work.count)
            if seat.last_s is not None:
                took_s = now_s - seat.last_s
                seat.step_s = took_s if not seat.step_s else seat.step_s + (took_s - seat.step_s) * SMOOTHING
            seat.last_s = now_s
        self._chunk_last = self._runs_chunk and not again
        self._running = {}
        self._deserted.clear()

    def decoding(self) -> int:
        """How many sessions have read their prompt and may take turns with one another."""
        return sum(
            not (seat.prompt_left or seat.parked) and seat.last_s is not None for seat in self._seats.values()
        )

    def prompt_left(self, priority: int) -> int:
        """Positions of prompts that open sessions of a priority have still to compute here."""
        return sum(seat.prompt_left for seat in self._seats.values() if seat.priority == priority)

    def blocks_yielding(self) -> int:
        """Blocks held by sessions that would give them to others."""
        return sum(s.blocks for s in self._seats.values() if self._yields(s) and not s.parked)

    def waiting(self) -> bool:
        """Whether any work waits, also that of parked sessions."""
        return any(seat.work for seat in self._seats.values())

    def validate(self) -> None:
        """Raises LocalFault where a promise is broken; for tests."""
        held = sum(seat.blocks for seat in self._seats.values() if not seat.parked)
        if held > self.blocks:
            raise LocalFault(f"{held} blocks are promised, there are {self.blocks}")
        for name, seat in self._seats.items():
            if seat.parked and (not self._yields(seat) or name in self._running):
                raise LocalFault(f"session {name} is parked, but does not yield or runs")
            for work in seat.work:
                if work.count == 1 and work.chunks_seen > 1:
                    raise LocalFault(f"a decode of {name} let {work.chunks_seen} pieces pass")

    def _yields(self, seat: _Seat) -> bool:
        return seat.priority >= self.limits.yields_from

    def _fitting(self, decodes: list[str], ready: dict[str, _Seat]) -> list[str]:
        """The first of ``decodes``, as many as share a batch."""
        rows = 0
        for at, name in enumerate(decodes):
            rows += ready[name].work[0].rows
            if rows > self.limits.rows_max:
                return decodes[:at]
        return decodes

    def _heads(self, *, parked: bool) -> dict[str, _Seat]:
        return {name: seat for name, seat in self._seats.items() if seat.work and seat.parked == parked}

    def _resumable(self, free: int, *, only_urgent: bool) -> str | None:
        """Who comes back first: the most urgent, then the longest open, of those for whom there is room. The smaller do
        not starve the larger: nobody new comes in who is not more urgent than those that are parked, see `room`."""
        waiting = [
            (seat.priority, seat.order, name)
            for name, seat in self._heads(parked=True).items()
            if not (only_urgent and self._yields(seat))
        ]
        return next((name for _, _, name in sorted(waiting) if self._seats[name].blocks <= free), None)

    def _begin(self, names: list[str], *, yields: bool, chunk: bool) -> Run:
        self._running = {name: self._seats[name].work.popleft() for name in names}
        self._runs_yielding, self._runs_chunk = yields, chunk
        return Run(tuple(work.number for work in self._running.values()), tuple(names), yields)

    def _yielding(self, priority: int) -> Iterable[tuple[str, _Seat]]:
        """Who is parked for a newcomer, first to go first: the least urgent, then the latest. Nobody who runs."""
        found = [
            (-seat.priority, -seat.order, name, seat)
            for name, seat in self._seats.items()
            if self._yields(seat)
            and seat.priority > priority
            and not seat.parked
            and name not in self._running
        ]
        return [(name, seat) for _, _, name, seat in sorted(found, key=lambda entry: entry[:2])]

    def _retry_s(self, priority: int, missing: int, now_s: float) -> float:
        """When ``missing`` blocks should have come free, if every session takes all the positions it may."""
        paces = [seat.step_s for seat in self._seats.values() if seat.step_s]
        usual_s = sum(paces) / len(paces) if paces else STEP_S_ASSUMED
        ends: list[tuple[float, int]] = []
        for seat in self._seats.values():
            if not seat.parked:
                pieces = -(-seat.prompt_left // self.limits.chunk_tokens_max)
                steps = pieces + max(0, seat.tokens_left - seat.prompt_left)
                since_s = now_s - (seat.last_s if seat.last_s is not None else seat.opened_s)
                ends.append((max(0.0, steps * (seat.step_s or usual_s) - since_s), seat.blocks))
        for end_s, blocks in sorted(ends):
            missing -= blocks
            if missing <= 0:
                return min(max(end_s, RETRY_S_MIN), RETRY_S_MAX)
        return RETRY_S_MAX


def _turn(seat: _Seat) -> tuple[bool, int, float]:
    """Decodes that let a piece pass go first, then the urgent, then who waits longest."""
    work = seat.work[0]
    return not work.chunks_seen, seat.priority, work.since_s


def _response(seat: _Seat, now_s: float) -> float:
    """Highest response ratio next: short prompts pass long ones, and whoever waits long enough comes first."""
    left = max(1, seat.prompt_left)
    return (now_s - seat.opened_s) / left
