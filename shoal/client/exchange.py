"""One streamed answer over several gateways: a pure core that both clients drive.

    call = exchange.call(now)           where to send what
    exchange.document(event, now)       a piece of the answer, or None
    exchange.ended(now)                 the stream ended in order
    exchange.broke(why, now)            it did not: seconds to wait before the next call, or the error is raised
    exchange.refused(status, ...)       the same for an answer that is an error

Until the first text another gateway is simply asked again. Afterwards it is told the tokens that have come and goes on
behind them: an answer's randomness is a function of (seed, position), so the text is the one that would have come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.client.answers import Answer, Piece
from shoal.client.asking import Ask
from shoal.client.gateways import Gateways, nobody
from shoal.client.reading import document_of
from shoal.daemon_client import refusal
from shoal.errors import DaemonGarbled, DaemonRefused, DaemonSilent, ResourceLimit, ShoalError

PAUSE_S = 0.25
PAUSE_S_MAX = 4.0
# Errors of a gateway that say nothing against the request itself.
PASSING = frozenset({"node_lost", "internal_error", "model_not_ready", "overloaded", "shutting_down"})


@dataclass(frozen=True, slots=True)
class Call:
    """What to send now: POST `body` to `url`; read on for `left_s` seconds at most (None: as long as it takes)."""

    url: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    left_s: float | None


class Exchange:
    """The state of one answer. Times are seconds of one monotonic clock."""

    def __init__(
        self, gateways: Gateways, ask: Ask, now_s: float, *, timeout_s: float | None = None, tries: int = 4
    ) -> None:
        self._gateways = gateways
        self._ask = ask
        self._start_s = now_s
        self._deadline_s = None if timeout_s is None else now_s + timeout_s
        self._timeout_s = timeout_s
        self._tries_left = max(tries, len(gateways.addresses))
        self._avoid: frozenset[str] = frozenset()
        self._address = ""
        self._pauses = 0
        self._reached: list[str] = []
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._untold = False  # text came without its tokens: nobody else could go on behind it
        self._first_s: float | None = None
        self._usage: Mapping[str, Any] = {}
        self.model = str(ask.body["model"])
        self.finish: str | None = None

    def call(self, now_s: float) -> Call:
        """Where to send what. Raises DaemonSilent where the time is over."""
        left_s = self.left_s(now_s)
        self._address = self._gateways.choose(now_s, self._avoid)
        body: dict[str, Any] = dict(self._ask.body)
        if self._tokens:
            body["continue_token_ids"] = list(self._tokens)
        headers = dict(self._ask.headers)
        if left_s is not None:
            headers["X-Shoal-Deadline"] = f"{left_s:.3f}"
        return Call(self._address + self._ask.path, body, headers, left_s)

    def document(self, event: Mapping[str, Any], now_s: float) -> Piece | None:
        """Take one event. Raises what `broke` raises where it is an error for good; Interrupted where it is not."""
        if "error" in event:
            problem = refusal(200, event, None)
            if getattr(problem, "code", "") in PASSING:
                raise Interrupted(str(problem))
            raise problem
        if self._address not in self._reached:
            self._reached.append(self._address)
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        if isinstance(event.get("model"), str):
            self.model = event["model"]
        choices = event.get("choices")
        if not choices:
            return None
        try:
            text, tokens, finish = _read(choices[0])
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            raise DaemonGarbled(
                f"the node sent an event that is no piece of an answer: {str(event)[:80]}"
            ) from None
        self.finish = finish or self.finish
        if not (text or tokens or finish):
            return None
        self._untold |= bool(text) and not tokens
        self._tokens += tokens
        self._text.append(text)
        if (text or tokens) and self._first_s is None:
            self._first_s = now_s
        return Piece(text, tokens, finish)

    def ended(self, now_s: float) -> float | None:
        """The stream is at its end: None if the answer is whole, else as `broke`."""
        if self.finish is None:
            return self.broke("the stream ended before the answer did", now_s)
        self._gateways.worked(self._address)
        return None

    def broke(self, reason: str, now_s: float) -> float:
        """The connection failed, or broke off. Returns how many seconds to wait before the next `call`."""
        self._gateways.failed(self._address, now_s)
        self._avoid |= {self._address}
        if self.finish is not None:
            return 0.0
        if self._tries_left <= 1 or self._untold:
            raise self._given_up(reason)
        self._tries_left -= 1
        return self._pause_s(now_s)

    def refused(self, status: int, body: bytes, retry_after: str | None, now_s: float) -> float:
        """The gateway answered with an error. Returns how many seconds to wait before the next `call`."""
        try:
            document: Mapping[str, Any] = document_of(body)
        except DaemonGarbled:
            document = {}
        problem = refusal(status, document, retry_after)
        passing = isinstance(problem, ResourceLimit) or getattr(problem, "code", "") in PASSING
        if not passing or self._tries_left <= 1:
            raise problem
        self._tries_left -= 1
        self._avoid |= {self._address}
        wait_s = problem.retry_after_s if isinstance(problem, ResourceLimit) else self._pause_s(now_s)
        if self._deadline_s is not None and now_s + wait_s >= self._deadline_s:
            raise problem
        return wait_s

    def answer(self, now_s: float) -> Answer:
        """The whole answer, once `finish` is there."""
        return Answer(
            text="".join(self._text),
            finish=self.finish,
            model=self.model,
            tokens=tuple(self._tokens),
            prompt_tokens=self._usage.get("prompt_tokens"),
            completion_tokens=int(self._usage.get("completion_tokens") or len(self._tokens)),
            ttft_s=None if self._first_s is None else self._first_s - self._start_s,
            total_s=now_s - self._start_s,
            gateways=tuple(self._reached),
        )

    def left_s(self, now_s: float) -> float | None:
        """What is left of the answer's time; None: as long as it takes. Raises DaemonSilent where it is over."""
        if self._deadline_s is None:
            return None
        if now_s >= self._deadline_s:
            raise self.late()
        return self._deadline_s - now_s

    def late(self) -> DaemonSilent:
        """The error of an answer that was not whole within its time."""
        return DaemonSilent(f"no whole answer within {self._timeout_s:g} s")

    def _pause_s(self, now_s: float) -> float:
        """Nothing while there are gateways that were not asked yet, then longer and longer."""
        if set(self._gateways.addresses) - self._avoid:
            return 0.0
        pause_s = min(PAUSE_S * 2.0**self._pauses, PAUSE_S_MAX)
        self._pauses += 1
        return pause_s if self._deadline_s is None else min(pause_s, max(0.0, self._deadline_s - now_s))

    def _given_up(self, reason: str) -> ShoalError:
        if not self._reached:
            return nobody(self._gateways, reason)
        if self._untold:
            return DaemonSilent(f"{self._address} broke off ({reason}) and tells no tokens to go on from")
        return DaemonSilent(f"{self._address} broke off ({reason}); no other node could go on")


class Interrupted(DaemonRefused):
    """The gateway's stream ended with an error that another may not have."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 502)


def _read(choice: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str | None]:
    """Text, token ids and the reason for the end of a chunk's choice, of a chat or a plain completion."""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, Mapping) else choice.get("text")
    finish = choice.get("finish_reason")
    tokens = tuple(int(token) for token in choice.get("token_ids") or ())
    return text if isinstance(text, str) else "", tokens, finish if isinstance(finish, str) else None
