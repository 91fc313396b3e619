"""What one gateway knows of hosts beyond what they announced: its own sessions, and what stages said of their work.

Announced loads are a second or two old. What this gateway opened or closed since is added to them, so that it neither
crowds one chain nor waits for room that it has just given back; and a stage that said how much work it had when a
session was opened on it is believed before an older advert. Pure: it is told with the time, and answers with numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from scheduler.routing import Hosted, Stage, prefill_s

ADVERT_AGE_S_MAX = 3.0
"""After so long an advert has had its chance to change: what it says holds."""
ADVERT_LAG_S = 2.0
"""An advert may speak of a time so long before it came: what a stage said to this gateway since then is newer."""
SAID_SPARE = 8
"""So many times the adverts that are asked about are kept: it may be some hosts now and others the next time."""
YIELDS = 2
"""Work of this class and those after it waits for all other."""


@dataclass(slots=True)
class _Session:
    model: str
    stages: tuple[Stage, ...]
    tokens: int
    prompt_tokens: int
    priority: int
    opened_s: float
    closed_s: float | None = None
    heard: dict[int, tuple[float, ...]] = field(default_factory=dict)


_Part = tuple[str, _Session, Stage, tuple[float, ...] | None]
"""A session's name, the session, its stage on some node, and what that stage said of its work."""


class Ledger:
    """This gateway's own sessions against what adverts can know of them."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._said: dict[str, dict[tuple[str, int, int], tuple[object, float]]] = {}

    def opened(
        self,
        session: str,
        model: str,
        stages: Sequence[Stage],
        *,
        tokens: int,
        prompt_tokens: int,
        priority: int,
        now_s: float,
    ) -> None:
        """A session over `stages` takes room for `tokens` and has `prompt_tokens` to read."""
        self._sessions[session] = _Session(model, tuple(stages), tokens, prompt_tokens, priority, now_s)

    def heard(self, session: str, stage: int, queues_s: Sequence[float]) -> bool:
        """A stage of the session had so many seconds of prompts to read when it was opened, by priority class, the
        most urgent first; the session's own prompt is not among them. Whether now, and not before, all have said so.
        """
        known = self._sessions.get(session)
        if known is None or not 0 <= stage < len(known.stages) or stage in known.heard:
            return False
        known.heard[stage] = tuple(queues_s)
        return len(known.heard) == len(known.stages)

    def closed(self, session: str, now_s: float) -> None:
        """Its room is free again."""
        known = self._sessions.get(session)
        if known is not None:
            known.closed_s = now_s

    def adjusted(
        self,
        model: str,
        hosted: Sequence[Hosted],
        said: Iterable[object],
        now_s: float,
        *,
        without: str | None = None,
    ) -> list[Hosted]:
        """The spans with what was opened, closed and heard since their adverts, as if the session `without` were not.

        `said` are the adverts, in the same order; one that differs from the one before is new.
        """
        for name, session in list(self._sessions.items()):
            if session.closed_s is not None and now_s - session.closed_s > ADVERT_AGE_S_MAX:
                del self._sessions[name]
        own = self._by_node(model)
        first_said = self._said.setdefault(model, {})
        out = []
        for h, advert in zip(hosted, said, strict=True):
            key = (h.node, h.start, h.end)
            known = first_said.get(key)
            if known is None or (known[0] is not advert and known[0] != advert):
                known = first_said[key] = (advert, now_s)
            # An advert that says the same for long was in no need of change: it knows of all that is older.
            since_s = max(known[1], now_s - ADVERT_AGE_S_MAX)
            mine = [part for part in own.get(h.node, ()) if h.start <= part[2].start < part[2].end <= h.end]
            out.append(_adjusted(h, mine, since_s, now_s, without) if mine else h)
        if len(first_said) > SAID_SPARE * len(out):
            keys = {(h.node, h.start, h.end) for h in hosted}
            self._said[model] = {key: known for key, known in first_said.items() if key in keys}
        return out

    def running(self) -> int:
        """Sessions that are open."""
        return sum(session.closed_s is None for session in self._sessions.values())

    def _by_node(self, model: str) -> dict[str, list[_Part]]:
        found: dict[str, list[_Part]] = {}
        for name, session in self._sessions.items():
            if session.model == model:
                for k, stage in enumerate(session.stages):
                    found.setdefault(stage.node, []).append((name, session, stage, session.heard.get(k)))
        return found


def _adjusted(h: Hosted, mine: Sequence[_Part], since_s: float, now_s: float, without: str | None) -> Hosted:
    """A span with this gateway's sessions on it, all there are, worked into an advert first seen at `since_s`."""
    tokens, work_s = 0, 0.0
    told_s, queues, plain_s = since_s, list(h.queue_by_class_s), h.queue_s
    spoken = [(s.opened_s, heard) for _, s, _, heard in mine if heard is not None]
    if spoken and max(spoken)[0] >= since_s - ADVERT_LAG_S:
        # What the host said to this gateway itself knows of all sessions before it.
        told_s, heard = max(spoken)
        queues = drained(heard, now_s - told_s)
        plain_s = sum(queues[:YIELDS])
    for name, session, stage, _ in mine:
        told, layers = session.opened_s < since_s, stage.end - stage.start
        room = -(-session.tokens * layers // (h.end - h.start))
        if session.closed_s is not None:
            tokens -= room if told and session.closed_s >= since_s else 0
        elif name != without:
            tokens += 0 if told else room
            if session.opened_s >= told_s:
                seconds = session.prompt_tokens * layers * prefill_s(h)
                work_s += seconds if session.priority < YIELDS else 0.0
                if session.priority < len(queues):
                    queues[session.priority] += seconds
    return replace(
        h,
        kv_tokens_free=max(0, h.kv_tokens_free - tokens),
        queue_s=plain_s + work_s,
        queue_by_class_s=tuple(queues),
    )


def drained(queues_s: Sequence[float], passed_s: float) -> list[float]:
    """What is left of queues by class when `passed_s` more were worked, the most urgent first."""
    left = []
    for queue_s in queues_s:
        left.append(max(0.0, queue_s - passed_s))
        passed_s = max(0.0, passed_s - queue_s)
    return left
