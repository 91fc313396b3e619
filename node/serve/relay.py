"""What a stage says to its neighbours in the chain: results onward, notes back. Knows nothing of engines' state."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeAlias

import torch
import trio

from model_shards import WINDOW_ROWS_MAX, Step, StepResult, tensor_to_bytes
from node.serve.feed import InputChannel
from node.serve.history import History
from node.serve.lineage import parts
from node.serve.protocol import (
    IDLE_S_MAX,
    SESSION,
    Activations,
    SessionInput,
    SessionNote,
    SessionOpen,
    StageRef,
)
from node.serve.timing import Stopwatch
from p2p import Channel, EndOfChannel, PeerLost, Rpc, RpcRefusal, Tensor

UNASKED = -1
"""The position of a note that answers no work."""
OnwardChannel: TypeAlias = Channel[SessionNote, SessionInput]


class Above:
    """The way back up the chain. Several tasks speak, one at a time."""

    def __init__(self, channel: InputChannel) -> None:
        self._channel = channel
        self._turn = trio.Lock()

    async def say(self, note: SessionNote) -> None:
        async with self._turn:
            with contextlib.suppress(EndOfChannel):
                await self._channel.send(note)


class Onward:
    """Where a stage's results go."""

    async def put(self, step: Step, result: StepResult, sample: bool, tell: bool) -> None:
        raise LookupError("an abstract onward path was used")

    async def guesses(self, position: int) -> tuple[int, ...]:
        """What the window at `position` guesses, where the stage does not see it."""
        raise LookupError("only the last stage is told guesses")


class Relay(Onward):
    """To the next stage of the chain, watching that it stays alive and how long it takes. What goes there is kept in
    `history`; positions that the next stage has from an earlier chain are not sent."""

    def __init__(
        self, channel: OnwardChannel, follower: StageRef, request: SessionOpen, above: Above, history: History
    ) -> None:
        self._channel = channel
        self._follower = follower
        self._index = request.index + 1
        self._above = above
        self._history = history
        self._watch = Stopwatch()
        self._below = 0
        self._joined: SessionNote | None = None
        self._heard = trio.Event()
        # Rows of the last window: those beyond the first count once the next step keeps them.
        self._loose: tuple[int, torch.Tensor] | None = None
        self._cut = 0
        self._owed: tuple[int, ...] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, rpc: Rpc, request: SessionOpen, above: Above, history: History
    ) -> AsyncIterator[Relay]:
        index = request.index + 1
        follower = request.stages[index]
        onward = replace(request, index=index)
        async with rpc.open(follower.peer, SESSION, onward) as channel, trio.open_nursery() as nursery:
            relay = cls(channel, follower, request, above, history)
            nursery.start_soon(relay.listen)
            yield relay
            nursery.cancel_scope.cancel()

    async def joined(self) -> SessionNote:
        """From where the next stage wants to be fed, in a chain that is joined anew."""
        with trio.move_on_after(IDLE_S_MAX):
            await self._heard.wait()
        if self._joined is None:
            raise RpcRefusal("unavailable", f"{self._follower.peer} does not say what it has")
        self._below = self._joined.want
        return self._joined

    async def replay(self, start: int, end: int, prompt_tokens: int, known: int) -> None:
        """What was kept of positions [start, end), to the next stage. Raises OSError where it cannot be read."""
        spans = [(a, min(b, end)) for a, b in self._history.spans(start) if a < end]
        for part in parts(spans, prompt_tokens, known, WINDOW_ROWS_MAX):
            hidden = Tensor(*tensor_to_bytes(self._history.read(part.start, part.end)))
            rows = part.end - part.start
            line = tuple(range(-1, rows - 1)) if part.alone and rows > 1 else ()
            await self._say(Activations(part.start, hidden, part.sample, False, line, self._owed))
            self._owed = tuple(range(1, rows)) if line else ()

    async def put(self, step: Step, result: StepResult, sample: bool, tell: bool) -> None:
        if result.hidden is None:
            raise RpcRefusal("internal", "the engine gave no activations for the next stage")
        made = result.hidden.cpu()
        dtype, shape, view = tensor_to_bytes(made)
        hidden = Tensor(dtype, shape, bytes(view))
        self._keep(step, made, hidden)
        rows = shape[0]
        skip = max(0, self._below - step.position)
        if skip >= rows:
            self._cut = rows
            return
        if skip and step.window is None:
            raise RpcRefusal("internal", f"positions from {step.position} on cannot go from {self._below} on")
        kept = tuple(row - self._cut for row in step.kept if row > self._cut) or self._owed
        parents: tuple[int, ...] = ()
        if step.window is not None:
            parents = step.window.parents if not skip else tuple(range(-1, rows - skip - 1))
        self._cut, self._owed = skip, ()
        if len(parents) == 1:
            parents = ()
        if skip:
            hidden = Tensor(*tensor_to_bytes(made[skip:]))
        if tell:
            self._watch.sent(step.position + skip, trio.current_time())
        await self._say(Activations(step.position + skip, hidden, sample, tell, parents, kept))

    def _keep(self, step: Step, made: torch.Tensor, whole: Tensor) -> None:
        if self._loose is not None:
            position, rows = self._loose
            for number, row in enumerate(step.kept):
                self._history.add(position + number, rows[row : row + 1])
            self._loose = None
        if step.window is None:
            self._history.add_bytes(step.position, whole.dtype, whole.shape, bytes(whole.data))
        else:
            self._history.add(step.position, made[:1])
            self._loose = step.position + 1, made

    async def _say(self, message: Activations) -> None:
        await self._channel.send(SessionInput(activations=message))

    async def listen(self) -> None:
        """Pass on what is said from below. A stage that ends before its session does is a fault, even when it says
        goodbye politely."""
        with contextlib.suppress(EndOfChannel):
            while True:
                note = await self._channel.receive()
                if note.stage == self._index and note.want >= 0:
                    self._joined = note
                    self._heard.set()
                if note.stage == self._index and note.position != UNASKED:
                    seconds = self._watch.told(note.position, trio.current_time())
                    if seconds is None:
                        continue
                    note = replace(note, seconds=seconds)
                await self._above.say(note)
        raise PeerLost(self._follower.peer, f"stage on {self._follower.peer} left the session")
