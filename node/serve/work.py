"""A request on its way at a gateway: what of it is done, what is shown of it, how its stream is read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from node.adverts import ModelAdvert
from node.errors import GatewayError
from node.gateway import GenerateRequest, TokenEvent
from node.serve.protocol import BACKGROUND, Priority, StageRef
from scheduler.outlook import Aims

AIMS = Aims(first_s=5.0, token_s=0.25)
"""What a request that names no target of its own should keep if it can be had."""


@dataclass(slots=True)
class LiveRequest:
    """A request under way: what the dashboard and the metrics show."""

    request_id: str
    model: str
    chain: tuple[StageRef, ...]
    began_s: float
    tokens: int = 0
    reused: int = 0
    priority: str = "normal"
    prefill: tuple[StageRef, ...] = ()


@dataclass(slots=True)
class Outcome:
    """How a stream ended, when it did not end by its last token."""

    problem: GatewayError | None = None


@dataclass(slots=True)
class Work:
    """A request on its way: what of it is done, and what it knows of chains (`left`: those it left for better ones)."""

    request: GenerateRequest
    model: ModelAdvert
    priority: Priority
    give_up_s: float
    arrived_s: float = 0.0
    made: list[int] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    left: int = 0
    adapter: str = ""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt and what was made of the answer so far."""
        return (*self.request.prompt, *self.made) if self.made else self.request.prompt

    @property
    def tokens_left(self) -> int:
        return self.request.max_tokens - len(self.made)

    def aims(self, now_s: float) -> Aims:
        """What it should keep from now on."""
        first_s = self.request.first_token_s
        if self.priority == BACKGROUND:
            return Aims()
        if self.made or first_s is None:
            return AIMS
        return Aims(first_s - (now_s - self.arrived_s), strict=True)


class Stream:
    """Plain iteration: no cancel scope is held between two events, so a fault reaches the reader as an exception."""

    def __init__(self, receive: trio.MemoryReceiveChannel[TokenEvent], outcome: Outcome) -> None:
        self._receive = receive
        self._outcome = outcome

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._outcome.problem is not None:
                raise self._outcome.problem from None
            raise StopAsyncIteration from None
