"""The way of a prompt's cache from the stages that read it to those that go on with it.

A prefill session names its heirs; their stages ask for the layers they need and get the rows in bounded parts as the
prompt's pieces are done, so that most of the way lies beside the reading. A stage that is in both chains hands over in
its own memory. Knows sessions and their rows; who prefills and who decodes is the gateway's choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import trio

from model_shards import StateError
from node.serve.compute import Compute
from node.serve.protocol import (
    HANDOVER,
    HANDOVER_S_MAX,
    HandoverOpen,
    HandoverPart,
    SessionOpen,
    StageRef,
)
from p2p import Call, Channel, Rpc, RpcRefusal, Tensor

PARTS_AT_ONCE = 2
GIVER_WAIT_S = 10.0
"""How long an heir may ask before its source has opened the session."""
Put = Callable[[bytes | memoryview], Awaitable[None]]


def common(stages: Sequence[StageRef], start: int, end: int) -> list[StageRef]:
    """The parts of `stages` within layers [start, end)."""
    found = [StageRef(s.peer, max(s.start, start), min(s.end, end)) for s in stages]
    return [part for part in found if part.start < part.end]


class Giver:
    """One prefill session of this node: whoever it names may have the rows of its `tokens` positions."""

    def __init__(self, request: SessionOpen, compute: Compute, copies: trio.CapacityLimiter) -> None:
        stage = request.stages[request.index]
        self._session = request.session
        self._compute = compute
        self._copies = copies
        self._heirs = common(request.heirs, stage.start, stage.end)
        self._tokens = request.prompt_tokens
        self._filled = request.reuse
        self._news = trio.Event()
        self._turn = trio.Lock()
        self._ended: RpcRefusal | None = None

    def filled(self, position: int) -> None:
        """All rows below `position` are there."""
        self._filled = max(self._filled, min(position, self._tokens))
        self._wake()

    async def end(self, why: RpcRefusal) -> None:
        """Give nothing more: the session's room is about to be freed. Returns when nobody reads there any more."""
        self._ended = why
        self._wake()
        with trio.CancelScope(shield=True):
            async with self._turn:
                pass

    async def give(self, peer: str, start: int, end: int, put: Put) -> None:
        """Hand the rows of layers [start, end) to `put` as they come to be there. Raises RpcRefusal."""
        if not any(s.peer == peer and s.start <= start < end <= s.end for s in self._heirs):
            raise RpcRefusal("denied", f"{peer} is no heir to layers {start}:{end} of this session")
        sent = 0
        while sent < self._tokens:
            while self._filled == sent and self._ended is None:
                await self._news.wait()
            self._check_open()
            upto = self._filled
            parts = self._compute.engine.export_session(self._session, start, end, first=sent, last=upto)
            while (part := await self._next(parts)) is not None:
                await put(part)
            sent = upto

    async def _next(self, parts: Iterator[memoryview]) -> memoryview | None:
        async with self._turn:
            self._check_open()
            return await trio.to_thread.run_sync(next, parts, None, limiter=self._copies)

    def _check_open(self) -> None:
        why = self._ended
        if why is not None:
            raise RpcRefusal(why.code, why.message, why.retry_after_s, detail=why.detail)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


class Handovers:
    """Serves HANDOVER for this node's prefill sessions, and fetches for its decode sessions."""

    def __init__(self, rpc: Rpc, me: str) -> None:
        self._rpc = rpc
        self._me = me
        self._givers: dict[str, Giver] = {}
        self._came = trio.Event()
        self._copies = trio.CapacityLimiter(PARTS_AT_ONCE)
        rpc.serve_channel(HANDOVER, self._serve)

    def __len__(self) -> int:
        return len(self._givers)

    @contextlib.asynccontextmanager
    async def giving(
        self, request: SessionOpen, compute: Compute, why: Callable[[BaseException], RpcRefusal | None]
    ) -> AsyncIterator[Giver | None]:
        """Give the session's rows to its heirs, if it names any, for as long as the block lasts. `why` words what ends
        it for them."""
        if not request.heirs:
            yield None
            return
        if request.session in self._givers:
            raise RpcRefusal("invalid", f"session {request.session} is already open here")
        giver = self._givers[request.session] = Giver(request, compute, self._copies)
        self._came.set()
        self._came = trio.Event()
        ended = RpcRefusal("unavailable", "the session that read the prompt has ended")
        try:
            yield giver
        except BaseException as problem:  # whatever it is, the heirs hear of it too
            ended = why(problem) or ended
            raise
        finally:
            del self._givers[request.session]
            await giver.end(ended)

    async def _serve(self, call: Call, request: HandoverOpen, channel: Channel[None, HandoverPart]) -> None:
        async def put(part: bytes | memoryview) -> None:
            await channel.send(HandoverPart(Tensor("uint8", (len(part),), part)))

        giver = await self._giver(request.session)
        await giver.give(call.peer, request.start, request.end, put)

    async def _giver(self, session: str) -> Giver:
        """The session's giver, which may still be on its way."""
        with trio.move_on_after(GIVER_WAIT_S):
            while session not in self._givers:
                await self._came.wait()
            return self._givers[session]
        raise RpcRefusal("not_found", f"nobody here reads a prompt for session {session}")

    async def take(self, request: SessionOpen, compute: Compute, source: StageRef, turn: trio.Lock) -> None:
        """Fetch the rows of the layers of `source`, a part of one stage of the request's sources, into its session.
        Raises RpcRefusal that names the source where it is to blame."""

        async def put(part: bytes | memoryview) -> None:
            async with turn:
                await trio.to_thread.run_sync(take_over, part, limiter=self._copies)

        def take_over(part: bytes | memoryview) -> int:
            return compute.engine.import_part(request.session, part, start=source.start, end=source.end)

        try:
            if source.peer == self._me:
                giver = await self._giver(request.source)
                await giver.give(self._me, source.start, source.end, put)
            else:
                wanted = HandoverOpen(request.source, source.start, source.end)
                async with self._rpc.open(source.peer, HANDOVER, wanted) as channel:
                    async for part in channel:
                        await put(part.rows.data)
        except StateError as wrong:
            raise RpcRefusal("invalid", str(wrong), detail={"peer": source.peer}) from None
        reached = compute.engine.reached(request.session, source.start, source.end)
        if reached != request.prompt_tokens:
            told = f"the cache of {reached} positions came from {source.peer}, not of {request.prompt_tokens}"
            raise RpcRefusal("invalid", told, detail={"peer": source.peer})


class Taking:
    """A decode session's rows on their way from the stages that read the prompt."""

    def __init__(self, handovers: Handovers, request: SessionOpen, compute: Compute) -> None:
        stage = request.stages[request.index]
        self._handovers = handovers
        self._request = request
        self._compute = compute
        self._missing = common(request.sources, stage.start, stage.end)
        self._done = trio.Event()

    async def run(self) -> None:
        """Fetch from all sources at once."""
        turn = trio.Lock()
        async with trio.open_nursery() as nursery:
            for source in list(self._missing):
                nursery.start_soon(self._take, source, turn)
        self._done.set()

    async def _take(self, source: StageRef, turn: trio.Lock) -> None:
        await self._handovers.take(self._request, self._compute, source, turn)
        self._missing.remove(source)

    async def wait(self) -> None:
        """Until all rows are there; the prompt has been read by now, so that they must come soon. Raises RpcRefusal."""
        with trio.move_on_after(min(self._request.handover_s, HANDOVER_S_MAX)):
            await self._done.wait()
            return
        slow = self._missing[0].peer if self._missing else self._request.sources[0].peer
        raise RpcRefusal(
            "unavailable",
            f"{slow} did not hand its cache over within {self._request.handover_s:g} s",
            detail={"peer": slow},
        )
