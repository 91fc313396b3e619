"""What a stage says to its neighbours in the chain: results onward, notes back. Knows nothing of engines' state."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeAlias

import trio

from model_shards import Step, StepResult, tensor_to_bytes
from node.serve.feed import InputChannel
from node.serve.protocol import SESSION, Activations, SessionInput, SessionNote, SessionOpen, StageRef
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
    """To the next stage of the chain, watching that it stays alive and how long it takes."""

    def __init__(self, channel: OnwardChannel, follower: StageRef, index: int, above: Above) -> None:
        self._channel = channel
        self._follower = follower
        self._index = index
        self._above = above
        self._watch = Stopwatch()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, rpc: Rpc, request: SessionOpen, above: Above) -> AsyncIterator[Relay]:
        index = request.index + 1
        follower = request.stages[index]
        onward = replace(request, index=index)
        async with rpc.open(follower.peer, SESSION, onward) as channel, trio.open_nursery() as nursery:
            relay = cls(channel, follower, index, above)
            nursery.start_soon(relay.listen)
            yield relay
            nursery.cancel_scope.cancel()

    async def put(self, step: Step, result: StepResult, sample: bool, tell: bool) -> None:
        if result.hidden is None:
            raise RpcRefusal("internal", "the engine gave no activations for the next stage")
        hidden = Tensor(*tensor_to_bytes(result.hidden))
        parents = step.window.parents if step.window is not None else ()
        message = Activations(step.position, hidden, sample, tell, parents, step.kept)
        if tell:
            self._watch.sent(step.position, trio.current_time())
        await self._channel.send(SessionInput(activations=message))

    async def listen(self) -> None:
        """Pass on what is said from below. A stage that ends before its session does is a fault, even when it says
        goodbye politely."""
        with contextlib.suppress(EndOfChannel):
            while True:
                note = await self._channel.receive()
                if note.stage == self._index and note.position != UNASKED:
                    seconds = self._watch.told(note.position, trio.current_time())
                    if seconds is None:
                        continue
                    note = replace(note, seconds=seconds)
                await self._above.say(note)
        raise PeerLost(self._follower.peer, f"stage on {self._follower.peer} left the session")
