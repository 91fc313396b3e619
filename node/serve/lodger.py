"""What a node holds of a session, whichever chain it is part of at the moment: its place, what it handed on and said.

A `Lodger` outlives the calls by which it is fed. Each of those is a `Stay`: the newest one works, older ones keep their
way onward open until the newer chain stands, so that nobody below them takes their end for that of the session.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from node.serve.compute import Compute
from node.serve.feed import InputChannel
from node.serve.history import History
from node.serve.prefixes import scope_of, stand_ins, told_mark
from node.serve.protocol import PIECE_TOKENS, SessionOpen, StageReport, TokenOut
from p2p import RpcRefusal

Why = Literal["", "left", "lost", "superseded", "evicted"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a session's prompt is to this stage's cache: `told` marks of its whole pieces and the ids that stand for
    them, the scope, how many positions to `keep` at the end (None: whatever is cached)."""

    scope: str
    told: tuple[bytes, ...]
    stand_ins: tuple[int, ...]
    keep: int | None

    @classmethod
    def of(cls, request: SessionOpen, compute: Compute) -> Plan:
        scope, marks = scope_of(request.stages, request.index), request.marks
        if not compute.engine.shares_prefixes:
            return cls(scope, (), (), None)
        stage = request.stages[request.index]
        told = tuple(told_mark(scope, stage.start, stage.end, mark) for mark in marks)
        if request.index == 0:
            return cls(scope, told, (), len(marks) * PIECE_TOKENS)
        return cls(scope, told, stand_ins(marks, compute.engine.span.config.vocab), None)

    def again(self) -> Plan:
        """The same once some of the prompt was read again: nothing is told of it."""
        return replace(self, told=(), keep=0 if self.keep is not None else None)


@dataclass(eq=False, slots=True)
class Stay:
    """One call that feeds a session here. Stopping its `work` leaves its way onward open until `release`."""

    request: SessionOpen
    channel: InputChannel
    work: trio.CancelScope = field(default_factory=trio.CancelScope)
    whole: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)
    release: trio.Event = field(default_factory=trio.Event)
    why: Why = ""
    refusal: RpcRefusal | None = None

    def stop(self, why: Why) -> None:
        """End its work; "left" and "evicted" end all of it."""
        if why in ("left", "evicted"):
            self.why = why
            self.whole.cancel()
        elif not self.why:
            self.why = why
            self.work.cancel()


@dataclass(eq=False, slots=True)
class Lodger:
    """A session's layers on this node, under the `name` that the engine knows. At the first stage, `text` are its
    tokens from position 0 on; at the last one, `told` are those it returned, from index `told_from` on."""

    name: str
    compute: Compute
    plan: Plan
    history: History
    request: SessionOpen
    text: list[int] = field(default_factory=list)
    told: list[TokenOut] = field(default_factory=list)
    told_from: int = 0
    given: int = 0
    done: int = 0
    busy_from_s: float | None = None
    current: Stay | None = None
    older: list[Stay] = field(default_factory=list)
    left: trio.Event = field(default_factory=trio.Event)

    @property
    def key(self) -> tuple[str, int, int]:
        """By whom it is found: the session and its layers."""
        stage = self.request.stages[self.request.index]
        return self.request.session, stage.start, stage.end

    @property
    def waiting(self) -> bool:
        """Whether nobody feeds it now: its chain broke."""
        return self.current is None or self.current.finished.is_set()

    @property
    def mendable(self) -> bool:
        """Whether its gateway may join it anew should its chain break."""
        request = self.request
        begun = self.done > (request.prompt_tokens + 1 if request.sources else 0)
        return begun and not request.heirs and not request.pool

    def enter(self, stay: Stay) -> Stay | None:
        """`stay` feeds it from now on; gives the one that did so before."""
        before, self.current, self.request = self.current, stay, stay.request
        if before is not None:
            self.older.append(before)
            before.stop("superseded")
        return before

    def stands(self) -> None:
        """The chain below was joined: older ways onward may close."""
        for stay in self.older:
            stay.release.set()
        self.older.clear()

    def report(self, now_s: float) -> StageReport:
        """How far it is."""
        start = self.request.stages[self.request.index].start
        busy_s = 0.0 if self.busy_from_s is None else now_s - self.busy_from_s
        return StageReport(start, self.request.epoch, self.given, self.done, busy_s)
