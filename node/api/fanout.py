"""Several generations for one HTTP request (`n`, lists of prompts), merged into one stream of pieces.

Every generation runs in a task of its own; the consumer sees their pieces in the order they come and the
first error as an error. Where the mesh has room for some of them only, the rest wait for a sibling to end.
It knows nothing of the shape of answers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from node.errors import GatewayError, ModelNotReady, Overloaded, StageLost
from node.gateway import Gateway, GenerateRequest, TokenEvent
from node.metrics import Metrics, Running
from node.text import Piece, TextStream

PIECES_BUFFERED = 64


@dataclass(slots=True)
class Choice:
    """One generation to run and the text it becomes."""

    index: int
    request: GenerateRequest
    text: TextStream


Told = tuple[int, Piece] | GatewayError


class Fanout:
    """Runs the choices of one request; `receive` gives the next piece."""

    def __init__(self, gateway: Gateway, metrics: Metrics, choices: Sequence[Choice]) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._choices = choices
        self._active = len(choices)
        self._freed = trio.Event()
        self._send, self._receive = trio.open_memory_channel[Told](PIECES_BUFFERED)
        self._open = len(choices)

    async def receive(self) -> tuple[int, Piece] | None:
        """(choice index, piece) as they come; None once all choices ended. Raises the first GatewayError."""
        if self._open == 0:
            return None
        told = await self._receive.receive()
        if isinstance(told, GatewayError):
            raise told
        if told[1].finish is not None:
            self._open -= 1
        return told

    async def watch(self, stopping: trio.Event) -> None:
        """End the request with an error when the node stops."""
        await stopping.wait()
        await self._send.send(ModelNotReady("this node is stopping"))

    async def run(self, choice: Choice) -> None:
        """Run one choice to its end, its error, or cancellation."""
        model = choice.request.model
        with self._metrics.track(model, len(choice.request.prompt)) as running:
            try:
                while not await self._attempt(choice, running):
                    await self._freed.wait()
                    self._active += 1
            except GatewayError as problem:
                self._metrics.count_failure(model, type(problem).__name__)
                await self._send.send(problem)
            except trio.Cancelled:
                self._metrics.count_failure(model, "cancelled")
                raise

    async def _attempt(self, choice: Choice, running: Running) -> bool:
        """Whether the choice ran; False where it must wait for a sibling to make room."""
        try:
            async with self._gateway.generate(choice.request) as events:
                running.entered()
                await self._take(choice, events, running)
        except Overloaded:
            self._active -= 1
            if choice.text.tokens > len(choice.request.made) or self._active == 0:
                raise
            return False
        self._active -= 1
        self._freed.set()
        self._freed = trio.Event()
        return True

    async def _take(self, choice: Choice, events: AsyncIterator[TokenEvent], running: Running) -> None:
        try:
            async for event in events:
                running.token()
                piece = choice.text.push(event)
                await self._send.send((choice.index, piece))
                if piece.finish is not None:
                    running.finished(piece.finish)
                    return
        finally:
            # A stop string ends the reading early: a generator must not be left to the garbage collector.
            if isinstance(events, AsyncGenerator):
                await events.aclose()
        raise StageLost("at the end of the chain", "the tokens ended without an end of the answer")


@asynccontextmanager
async def open_fanout(
    gateway: Gateway, metrics: Metrics, choices: Sequence[Choice], stopping: trio.Event
) -> AsyncIterator[Fanout]:
    """Run the choices while the block lasts; leaving it cancels what still runs.

    A GatewayError raised in the block comes out as itself, not in a group.
    """
    fanout = Fanout(gateway, metrics, choices)
    problem: GatewayError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fanout.watch, stopping)
        for choice in choices:
            nursery.start_soon(fanout.run, choice)
        try:
            yield fanout
        except GatewayError as raised:
            problem = raised
        nursery.cancel_scope.cancel()
    if problem is not None:
        raise problem
