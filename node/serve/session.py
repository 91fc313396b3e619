"""One session over one chain, from the gateway's side: open it, feed the prompt, take the tokens, time the stages.

It chooses nothing and retries nothing; what breaks is raised as what it means to the client, and a cache that holds
less of the prompt than was thought as `CacheStale`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
import trio

from model_shards import WINDOW_ROWS_MAX, tensor_to_bytes
from node.errors import StageLost
from node.serve.faults import leaves, raise_as_gateway_error
from node.serve.lineage import parts
from node.serve.protocol import (
    PIECE_TOKENS,
    SESSION,
    TELL_EVERY_TOKENS,
    Prompt,
    SessionInput,
    SessionNote,
    SessionOpen,
    TokenOut,
)
from node.serve.returns import Returns
from node.serve.selection import Choice
from node.serve.timing import Stopwatch
from p2p import CallFailed, Channel, EndOfChannel, PeerLost, RemoteFault, Rpc, Tensor

Observe = Callable[[int, int, float], None]
Heard = Callable[[int, tuple[float, ...]], None]
QUEUE_S_MAX = 86_400.0
CLASSES_MAX = 8


class CacheStale(Exception):
    """Some stage's cache holds only the first `tokens` of the prompt."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"only {tokens} tokens are cached")
        self.tokens = tokens


class Elsewhere(Exception):
    """Before the first token another chain turned out to be better than this one: `choice`."""

    def __init__(self, choice: Choice) -> None:
        super().__init__("another chain promises the first token sooner")
        self.choice = choice


class Session:
    """The tokens of a session, in order. `observe(stage, tokens, seconds)` is told what stages took, `heard(stage,
    queues_s)` how much work they had; while no token has come what it raises ends the session."""

    def __init__(
        self,
        opening: SessionOpen,
        channel: Channel[SessionNote, SessionInput],
        tokens: trio.MemoryReceiveChannel[TokenOut],
        observe: Observe,
        heard: Heard,
    ) -> None:
        self._opening = opening
        self._channel = channel
        self._tokens = tokens
        self._observe = observe
        self._heard = heard
        self._begun = opening.epoch > 0
        self._watch = Stopwatch()
        self._wants: dict[int, int] = {}
        self._joined = trio.Event()

    def __aiter__(self) -> AsyncIterator[TokenOut]:
        return self

    async def __anext__(self) -> TokenOut:
        try:
            token = await self._tokens.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        self._begun = True
        if token.index % TELL_EVERY_TOKENS == 0 and token.finish is None:
            # The first stage has it now too, and says when it is done with it.
            self._watch.sent(self._opening.prompt_tokens + token.index, trio.current_time())
        return token

    async def feed(self, prompt: tuple[int, ...]) -> None:
        """The prompt into the first stage, a piece at a time."""
        for position in range(0, len(prompt), PIECE_TOKENS):
            ids = torch.tensor(prompt[position : position + PIECE_TOKENS], dtype=torch.int32)
            if position >= self._opening.reuse:
                self._watch.sent(position, trio.current_time())
            piece = Prompt(position, Tensor(*tensor_to_bytes(ids)))
            await self._channel.send(SessionInput(prompt=piece))

    async def joined(self) -> int:
        """In a chain that is joined anew: wait until every stage has found its place. How many positions all of them
        compute again, or for the first time."""
        await self._joined.wait()
        return sum(max(0, self._opening.known - want) for want in self._wants.values())

    async def feed_again(self, text: tuple[int, ...]) -> None:
        """What the first stage lacks of `text`, the prompt and the answer as far as it is known."""
        await self._joined.wait()
        prompt, known = self._opening.prompt_tokens, self._opening.known
        spans = [(p, min(p + PIECE_TOKENS, prompt)) for p in range(0, prompt, PIECE_TOKENS)]
        spans += [(p, p + 1) for p in range(prompt, known)]
        first = self._wants[0]
        for part in parts([s for s in spans if s[0] >= first], prompt, known, WINDOW_ROWS_MAX):
            ids = torch.tensor(text[part.start : part.end], dtype=torch.int32)
            piece = Prompt(part.start, Tensor(*tensor_to_bytes(ids)))
            await self._channel.send(SessionInput(prompt=piece))

    async def begin(self, token: int, prompt: tuple[int, ...]) -> None:
        """The first token into a session whose cache comes from another one, and the prompt before it where it is to
        guess from that."""
        if self._opening.window > 1:
            for position in range(0, len(prompt), PIECE_TOKENS):
                read = torch.tensor(prompt[position : position + PIECE_TOKENS], dtype=torch.int32)
                await self._channel.send(
                    SessionInput(prompt=Prompt(position, Tensor(*tensor_to_bytes(read))))
                )
        ids = torch.tensor([token], dtype=torch.int32)
        first = Prompt(self._opening.prompt_tokens, Tensor(*tensor_to_bytes(ids)))
        await self._channel.send(SessionInput(prompt=first))

    async def listen(self) -> None:
        """Take notes of what stages took. The chain's end before the gateway leaves is a fault."""
        first = self._opening.stages[0].peer
        with contextlib.suppress(EndOfChannel):
            while True:
                note = await self._channel.receive()
                if note.want >= 0:
                    self._wants[note.stage] = note.want
                    if note.stage == 0:
                        self._joined.set()
                    continue
                if note.queues_s:
                    if not self._begun and _sane(note.queues_s):
                        self._heard(note.stage, note.queues_s)
                    continue
                seconds: float | None = note.seconds
                if note.stage == 0:
                    seconds = self._watch.told(note.position, trio.current_time())
                if seconds is not None:
                    self._observe(note.stage, note.tokens, seconds)
        raise PeerLost(first, f"the first stage, {first}, left the session")


def _sane(queues_s: tuple[float, ...]) -> bool:
    return len(queues_s) <= CLASSES_MAX and all(0.0 <= each <= QUEUE_S_MAX for each in queues_s)


def _nothing(stage: int, queues_s: tuple[float, ...]) -> None:
    """Whoever does not think again need not hear."""


@asynccontextmanager
async def open_session(
    rpc: Rpc,
    returns: Returns,
    opening: SessionOpen,
    prompt: tuple[int, ...],
    observe: Observe,
    heard: Heard = _nothing,
) -> AsyncIterator[Session]:
    """Run a session for as long as the block lasts. Without a prompt it waits for its first token, see `begin`; a chain
    that is joined anew is given all of the text that is known. Raises StageLost, Overloaded, CacheStale or
    Elsewhere."""
    first, last = opening.stages[0].peer, opening.stages[-1].peer
    try:
        with returns.expect(opening.session, "gateway", last, opening.epoch) as tokens:
            async with rpc.open(first, SESSION, opening) as channel, trio.open_nursery() as nursery:
                session = Session(opening, channel, tokens, observe, heard)
                if opening.epoch:
                    nursery.start_soon(session.feed_again, prompt)
                elif prompt:
                    nursery.start_soon(session.feed, prompt)
                nursery.start_soon(session.listen)
                yield session
                nursery.cancel_scope.cancel()
    except (BaseExceptionGroup, RemoteFault) as problem:
        for leaf in leaves(problem):
            if isinstance(leaf, CacheStale | Elsewhere):
                raise leaf from None
            if isinstance(leaf, CallFailed) and (leaf.detail or {}).get("reuse", "").isdecimal():
                kept = int(leaf.detail["reuse"][:9]) // PIECE_TOKENS * PIECE_TOKENS
                raise CacheStale(min(kept, opening.reuse - PIECE_TOKENS)) from None
            if isinstance(leaf, CallFailed) and opening.epoch:
                # Whatever a stage says, another one may take its place.
                raise StageLost((leaf.detail or {}).get("peer", leaf.peer), leaf.message) from None
        raise_as_gateway_error(problem, first)
