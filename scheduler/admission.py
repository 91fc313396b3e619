"""Who is served next, who waits, and who is told at once that it would be too late.

Clients share the capacity by deficit: each waiting client earns the same, pays for the tokens it uses, and among
those in credit the request whose prefix is cached goes first (locality with bounded unfairness, after deficit longest
prefix match, arXiv 2501.14312). Background work runs only on what nobody else wants and yields at once. A state
machine: events and `now` in, instructions out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from scheduler.errors import InputError, LocalFault

Class = Literal["interactive", "background"]
REQUESTS_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Limits of the queue and the price of tokens."""

    waiting_max: int = 1024
    waiting_a_client_max: int = 256
    quantum_tokens: float = 1024.0
    new_token_price: float = 2.0
    debt_quanta_max: float = 8.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that asks to be served. `cached_tokens` of its prompt are in some cache that would be used.

    `target_s` is the longest wait for service that still makes sense; None waits for ever. An `urgent` request goes
    before others of clients in credit; it costs its client as much as any.
    """

    request: str
    client: str
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0
    kind: Class = "interactive"
    target_s: float | None = None
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """A request arrives."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Ended:
    """A request finished, failed, or its client left (also while it waited)."""

    request: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """The mesh can hold so many tokens in flight, and serves so many a second; `requests` at once at most."""

    tokens: int
    tokens_per_s: float
    requests: int = REQUESTS_MAX


Event = Submit | Ended | Capacity


@dataclass(frozen=True, slots=True)
class Start:
    """Serve it now."""

    request: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse it: it would wait longer than its target, or the queue is full."""

    request: str
    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Yield:
    """Stop this background request at once; it waits again, first among its kind."""

    request: str


Instruction = Start | Reject | Yield


@dataclass(slots=True)
class _Waiting:
    ticket: Ticket
    since_s: float
    number: int


@dataclass(slots=True)
class Admission:
    """The queue in front of one mesh (or one gateway's share of it)."""

    config: AdmissionConfig = field(default_factory=AdmissionConfig)
    _capacity: Capacity = field(default_factory=lambda: Capacity(0, 0.0))
    _running: dict[str, Ticket] = field(default_factory=dict)
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _credit: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in an event; who starts, yields or is refused because of it."""
        out: list[Instruction] = []
        match event:
            case Submit(ticket):
                refusal = self._submit(ticket, now_s)
                if refusal is not None:
                    return [refusal]
            case Ended(request):
                self._running.pop(request, None)
                self._waiting.pop(request, None)
            case Capacity():
                self._capacity = event
        out.extend(self._expire(now_s))
        out.extend(self._serve(now_s))
        return out

    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def running(self, kind: Class | None = None) -> int:
        """Requests that are served now, of one kind or of both."""
        return sum(kind is None or t.kind == kind for t in self._running.values())

    def tokens_running(self) -> int:
        """Tokens that the requests served now may come to hold."""
        return self._used()

    def expected_wait_s(self, kind: Class = "interactive", tokens: int = 0, client: str = "") -> float:
        """Seconds until a request of so many tokens that a client sent now would start.

        What must end before that: whatever of those running, of those that wait before it and of itself does not
        fit at once; over the rate at which it is done. Of another client's queue no more is served before it than of
        its own, give or take a quantum. Background work stands in nobody's way but its own.
        """
        both = kind == "background"
        busy = [t for t in self._running.values() if both or t.kind == "interactive"]
        before = self._before(client, tokens, fair=not both)
        used, ahead = sum(map(_tokens, busy)), sum(before)
        excess = used + ahead + tokens - self._capacity.tokens if busy or before else 0
        crowd = len(busy) + len(before) + 1 - self._capacity.requests
        if crowd > 0 and busy:
            excess = max(excess, math.ceil(crowd * used / len(busy)))
        if self._capacity.tokens <= 0:
            return float("inf")
        if excess <= 0:
            return 0.0
        return excess / self._capacity.tokens_per_s if self._capacity.tokens_per_s > 0 else float("inf")

    def _before(self, client: str, tokens: int, *, fair: bool) -> list[int]:
        """Tokens of each waiting request that is probably served before a new one of a client."""
        if not fair:
            return [_tokens(w.ticket) for w in self._waiting.values()]
        queues: dict[str, list[int]] = {}
        for w in self._waiting.values():
            if w.ticket.kind == "interactive":
                queues.setdefault(w.ticket.client, []).append(_tokens(w.ticket))
        own = queues.pop(client, [])
        share = sum(own) + tokens + self.config.quantum_tokens
        before = own
        for queue in queues.values():
            served = 0
            for size in queue:
                if served >= share:
                    break
                served += size
                before.append(size)
        return before

    def validate(self) -> None:
        """Raise LocalFault unless every bound holds."""
        if len(self._waiting) > self.config.waiting_max + len(self._running):
            raise LocalFault("more requests wait than may")
        if set(self._running) & set(self._waiting):
            raise LocalFault("a request both waits and runs")

    def _submit(self, ticket: Ticket, now_s: float) -> Reject | None:
        if ticket.request in self._waiting or ticket.request in self._running:
            raise InputError("request", ticket.request, "a name not in use")
        if len(self._waiting) >= self.config.waiting_max:
            return Reject(ticket.request, "the queue is full", self._retry_s())
        mine = sum(w.ticket.client == ticket.client for w in self._waiting.values())
        if mine >= self.config.waiting_a_client_max:
            return Reject(ticket.request, "this client has too many requests waiting", self._retry_s())
        wait_s = self.expected_wait_s(ticket.kind, _tokens(ticket), ticket.client)
        if ticket.target_s is not None and wait_s > ticket.target_s:
            late = wait_s - ticket.target_s
            return Reject(
                ticket.request, f"it would wait {wait_s:.1f} s, {late:.1f} s too long", min(late, 60.0)
            )
        self._count += 1
        self._waiting[ticket.request] = _Waiting(ticket, now_s, self._count)
        self._credit.setdefault(ticket.client, self.config.quantum_tokens)
        return None

    def _retry_s(self) -> float:
        return min(60.0, max(1.0, self.expected_wait_s("background")))

    def _expire(self, now_s: float) -> list[Instruction]:
        """Refuse those that have waited past their target: serving them would help nobody."""
        late = [
            w
            for w in self._waiting.values()
            if w.ticket.target_s is not None and now_s - w.since_s > w.ticket.target_s
        ]
        for w in late:
            del self._waiting[w.ticket.request]
        return [Reject(w.ticket.request, "its target passed while it waited", self._retry_s()) for w in late]

    def _serve(self, now_s: float) -> list[Instruction]:
        out: list[Instruction] = []
        while True:
            pick = self._next("interactive")
            if pick is None:
                break
            out.extend(self._make_room(pick.ticket, now_s))
            if not self._fits(pick.ticket):
                break
            self._start(pick, charge=True)
            out.append(Start(pick.ticket.request))
        while self._next("interactive") is None:
            pick = self._next("background")
            if pick is None or not self._fits(pick.ticket):
                break
            self._start(pick, charge=False)
            out.append(Start(pick.ticket.request))
        return out

    def _next(self, kind: Class) -> _Waiting | None:
        """Of the clients in credit, the request with most of its prompt cached; the earliest of those."""
        queue = [w for w in self._waiting.values() if w.ticket.kind == kind]
        if not queue:
            return None
        if kind == "background":
            return min(queue, key=lambda w: w.number)
        clients = {w.ticket.client for w in queue}
        while not any(self._credit[c] > 0 for c in clients):
            for c in clients:
                self._credit[c] = min(
                    self.config.quantum_tokens, self._credit[c] + self.config.quantum_tokens
                )
        able = [w for w in queue if self._credit[w.ticket.client] > 0]
        return min(able, key=_precedence)

    def _start(self, pick: _Waiting, *, charge: bool) -> None:
        ticket = pick.ticket
        del self._waiting[ticket.request]
        self._running[ticket.request] = ticket
        if charge:
            price = float(ticket.prompt_tokens - min(ticket.cached_tokens, ticket.prompt_tokens))
            price += self.config.new_token_price * ticket.new_tokens
            floor = -self.config.debt_quanta_max * self.config.quantum_tokens
            self._credit[ticket.client] = max(floor, self._credit[ticket.client] - price)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """A client that neither waits nor runs keeps no credit, and no debt once it is served out."""
        busy = {w.ticket.client for w in self._waiting.values()} | {t.client for t in self._running.values()}
        for client in [c for c in self._credit if c not in busy]:
            del self._credit[client]

    def _make_room(self, ticket: Ticket, now_s: float) -> list[Instruction]:
        """Let background requests yield, the latest first, until this one fits; none if it would not even then."""
        out: list[Instruction] = []
        held = self._used("interactive")
        if held and held + _tokens(ticket) > self._capacity.tokens:
            return out
        if self.running("interactive") >= self._capacity.requests:
            return out
        for other in [t for t in reversed(self._running.values()) if t.kind == "background"]:
            if self._fits(ticket):
                break
            del self._running[other.request]
            self._waiting[other.request] = _Waiting(other, now_s, -self._count)
            out.append(Yield(other.request))
        return out

    def _fits(self, ticket: Ticket) -> bool:
        """Whether there is room; a request larger than the whole capacity may run alone."""
        if not self._running:
            return self._capacity.tokens > 0
        if len(self._running) >= self._capacity.requests:
            return False
        return self._used() + _tokens(ticket) <= self._capacity.tokens

    def _used(self, kind: Class | None = None) -> int:
        return sum(_tokens(t) for t in self._running.values() if kind is None or t.kind == kind)


def _precedence(waiting: _Waiting) -> tuple[bool, float, int]:
    """Urgent ones, then those with most of their prompt cached, then the earliest."""
    ticket = waiting.ticket
    return not ticket.urgent, -ticket.cached_tokens / max(1, ticket.prompt_tokens), waiting.number


def _tokens(ticket: Ticket) -> int:
    return ticket.prompt_tokens + ticket.new_tokens
