"""One request over two chains, from the gateway's side: the first reads the prompt, the second answers.

Both are opened at once, so that room for the answer is sure before the prompt is read. Nothing is shown before the
second chain made a token of its own: until then whatever breaks leaves the request as it was. It chooses nothing and
retries nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from node.serve.protocol import SessionOpen, StageRef, TokenOut
from node.serve.returns import Returns
from node.serve.session import Observe, Session, open_session
from p2p import PeerLost, Rpc


def openings(
    whole: SessionOpen, reading: tuple[StageRef, ...], handover_s: float
) -> tuple[SessionOpen, SessionOpen]:
    """The two sessions of a request: the one that reads over `reading`, and the one that answers over the stages of
    `whole`."""
    source = f"{whole.session}-read"
    first = replace(whole, session=source, stages=reading, new_tokens_max=1, heirs=whole.stages)
    second = replace(whole, marks=(), reuse=0, source=source, sources=reading, handover_s=handover_s)
    return first, second


class Answer:
    """The tokens of both sessions, in order."""

    def __init__(self, begun: list[TokenOut], rest: Session) -> None:
        self._begun = begun
        self._rest = rest

    def __aiter__(self) -> AsyncIterator[TokenOut]:
        return self

    async def __anext__(self) -> TokenOut:
        return self._begun.pop(0) if self._begun else await anext(self._rest)


@asynccontextmanager
async def open_split(
    rpc: Rpc,
    returns: Returns,
    first: SessionOpen,
    second: SessionOpen,
    prompt: tuple[int, ...],
    observe: tuple[Observe, Observe],
    handed_over: Callable[[], None],
) -> AsyncIterator[Answer]:
    """Run both sessions for as long as the block lasts, the first only until its cache is `handed_over`. Raises
    StageLost, Overloaded or CacheStale."""
    async with open_session(rpc, returns, second, (), observe[1]) as answering:
        async with open_session(rpc, returns, first, prompt, observe[0]) as reading:
            token = await _next(reading, first)
            begun = [token]
            if token.finish != "stop":
                begun = [replace(token, finish=None)]
                await answering.begin(token.token, prompt)
                begun.append(await _next(answering, second))
        handed_over()
        yield Answer(begun, answering)


async def _next(session: Session, opening: SessionOpen) -> TokenOut:
    async for token in session:
        return token
    last = opening.stages[-1].peer
    raise PeerLost(last, f"the last stage, {last}, left the session")
