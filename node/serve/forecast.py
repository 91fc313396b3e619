"""What the mesh can take from this gateway: room, rate, and how adverts differ from what was done since.

Pure: it is told of sessions and adverts with the time, and answers with numbers. Adverts of load are about a second
old; what this gateway itself opened or closed since then is added to them, so that it neither crowds one chain nor
waits for room that it has just given back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from node.serve.protocol import BACKGROUND, StageRef
from scheduler import Hosted

WINDOW_S = 5.0
SATURATED_S = 1.0
BUCKET_S = 0.05
ADVERT_AGE_S_MAX = 3.0
"""After so long an advert has had its chance to change: what it says holds."""
SEATS_PER_CONCURRENCY = 4
"""Requests at once for each session of full length that a host has room for."""
PREFILL_SHARE = 1 / 16


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


@dataclass(slots=True)
class _Session:
    model: str
    stages: tuple[StageRef, ...]
    tokens: int
    prompt_tokens: int
    priority: int
    opened_s: float
    closed_s: float | None = None


class Ledger:
    """This gateway's own sessions against what adverts can know of them."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._said: dict[str, dict[tuple[str, int, int], tuple[object, float]]] = {}

    def opened(
        self,
        session: str,
        model: str,
        stages: tuple[StageRef, ...],
        *,
        tokens: int,
        prompt_tokens: int,
        priority: int,
        now_s: float,
    ) -> None:
        """A session over `stages` takes room for `tokens` and has `prompt_tokens` to read."""
        self._sessions[session] = _Session(model, stages, tokens, prompt_tokens, priority, now_s)

    def closed(self, session: str, now_s: float) -> None:
        """Its room is free again."""
        known = self._sessions.get(session)
        if known is not None:
            known.closed_s = now_s

    def adjusted(
        self, model: str, hosted: Sequence[Hosted], said: Iterable[object], now_s: float
    ) -> list[Hosted]:
        """The spans with what was opened and closed since their adverts. `said` are the adverts, in the same order."""
        for name, session in list(self._sessions.items()):
            if session.closed_s is not None and now_s - session.closed_s > ADVERT_AGE_S_MAX:
                del self._sessions[name]
        before, fresh = self._said.get(model, {}), {}
        out = []
        for h, advert in zip(hosted, said, strict=True):
            key = (h.node, h.start, h.end)
            known = before.get(key)
            fresh[key] = known if known is not None and known[0] == advert else (advert, now_s)
            # An advert that says the same for long was in no need of change: it knows of all that is older.
            since_s = max(fresh[key][1], now_s - ADVERT_AGE_S_MAX)
            out.append(self._adjust(model, h, since_s))
        self._said[model] = fresh
        return out

    def _adjust(self, model: str, h: Hosted, since_s: float) -> Hosted:
        tokens, work_s = 0, 0.0
        queues = list(h.queue_by_class_s)
        for session in self._sessions.values():
            for stage in session.stages:
                if session.model != model or stage.peer != h.node:
                    continue
                if not h.start <= stage.start < stage.end <= h.end:
                    continue
                told, layers = session.opened_s < since_s, stage.end - stage.start
                room = -(-session.tokens * layers // (h.end - h.start))
                if not told and session.closed_s is None:
                    tokens += room
                    seconds = session.prompt_tokens * layers * prefill_s(h)
                    work_s += seconds if session.priority < BACKGROUND else 0.0
                    if session.priority < len(queues):
                        queues[session.priority] += seconds
                elif told and session.closed_s is not None and session.closed_s >= since_s:
                    tokens -= room
        if not tokens and not work_s and queues == list(h.queue_by_class_s):
            return h
        return replace(
            h,
            kv_tokens_free=max(0, h.kv_tokens_free - tokens),
            queue_s=h.queue_s + work_s,
            queue_by_class_s=tuple(queues),
        )


def prefill_s(h: Hosted) -> float:
    """Seconds a prompt's token takes for a layer."""
    return h.prefill_s_per_token_per_layer or h.s_per_layer * PREFILL_SHARE


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


def queue_s(h: Hosted, priority: int) -> float:
    """Seconds that a request of a class waits at a host."""
    return sum(h.queue_by_class_s[: priority + 1]) if h.queue_by_class_s else h.queue_s


def first_token_s(
    stages: Sequence[StageRef],
    hosts: Mapping[StageRef, Hosted],
    hops_s: Sequence[float],
    *,
    prompt_tokens: int,
    priority: int,
) -> float:
    """Seconds until a chain gives its first token: queues, the prompt's work, and hops to each stage and back."""
    total = sum(hops_s)
    for stage in stages:
        h = hosts[stage]
        total += queue_s(h, priority) + prompt_tokens * (stage.end - stage.start) * prefill_s(h)
    return total
