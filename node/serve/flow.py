"""The stream of one session's tokens, whatever becomes of its chain: the shell around `failover`.

It opens the first chain, and a further one under the next epoch whenever the core says so; what those lack is fed from
the text, which is known here. Tokens come once each and in order. It ends with its last token, with what its first
chain said before there was one, or with StageLost when nobody could take a lost stage's place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import trio

from node.errors import GatewayError, StageLost
from node.serve.failover import (
    Began,
    Broke,
    Came,
    Choose,
    Close,
    Event,
    Failover,
    GiveUp,
    Instruction,
    Join,
    Joined,
    Mended,
    Patience,
    Probe,
    Reported,
    Tick,
    Unmended,
    Waiting,
)
from node.serve.faults import raise_single
from node.serve.protocol import (
    PROBE,
    RELEASE,
    ProbeAsk,
    ReleaseAsk,
    SessionOpen,
    StageRef,
    StageReport,
    TokenOut,
)
from node.serve.returns import Returns
from node.serve.selection import Choice
from node.serve.session import CacheStale, Elsewhere, Heard, Observe, open_session
from node.serve.split import open_split, openings
from p2p import LocalFault, P2pError, Rpc

log = logging.getLogger("shoal.gateway")
INBOX = 64
RELEASE_S = 2.0
Seek: TypeAlias = Callable[[Choose], Choice | None]


@dataclass(frozen=True, slots=True)
class Stall:
    """A failover: seconds without a token, positions computed again over all stages, whom it replaced."""

    seconds: float
    replayed: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """How a flow reaches the mesh: `observe` gives what is told of a chain's times, `heard` what stages have to do,
    `seek` a chain in place of a broken one, `moved` hears of every new chain, `stalled` of every failover."""

    rpc: Rpc
    returns: Returns
    observe: Callable[[Choice], Observe]
    heard: Heard
    seek: Seek
    moved: Callable[[Choice], None]
    stalled: Callable[[Stall], None]
    handed_over: Callable[[], None]


@dataclass(slots=True)
class _Epoch:
    choice: Choice
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


_News: TypeAlias = "tuple[int, TokenOut | GatewayError | CacheStale | Elsewhere | Event]"


class Flow:
    """The tokens of `opening` over `choice`, and over what takes its place. `whole` runs a session of two chains."""

    def __init__(
        self,
        way: Way,
        opening: SessionOpen,
        choice: Choice,
        prompt: tuple[int, ...],
        patience: Patience,
        handover_s: float,
        nursery: trio.Nursery,
    ) -> None:
        self._way = way
        self._opening = opening
        self._prompt = prompt
        self._handover_s = handover_s
        self._nursery = nursery
        self._made: list[int] = []
        self._core = Failover(len(prompt), patience)
        self._epochs = {0: _Epoch(choice)}
        self._send, self._news = trio.open_memory_channel[_News](INBOX)
        self._last_s = trio.current_time()
        self._replayed = 0
        self._lost: list[str] = []
        self._peers: set[str] = {stage.peer for stage in (*choice.stages, *choice.reading.stages)}
        self._mendable = not opening.pool
        self._ended = False
        self._core.handle(
            Began(choice.stages, choice.first_s, sum(e.token_s + e.hop_s for e in choice.expected)),
            self._last_s,
        )
        nursery.start_soon(self._run, 0, opening)

    @property
    def broken(self) -> bool:
        """Whether some node may hold room for a session that is over."""
        return not self._ended or len(self._epochs) > 1 or self._core.epoch > 0

    @property
    def peers(self) -> set[str]:
        """Every node that took part."""
        return self._peers

    def __aiter__(self) -> AsyncIterator[TokenOut]:
        return self

    async def __anext__(self) -> TokenOut:
        if self._ended:
            raise StopAsyncIteration
        self._do(Waiting())
        while True:
            epoch, news = await self._next()
            if isinstance(news, TokenOut):
                if self._is_next(epoch, news):
                    return news
            elif isinstance(news, Exception):
                self._broke(epoch, news)
            else:
                self._do(news)

    async def _next(self) -> _News:
        with contextlib.suppress(trio.WouldBlock):
            return self._news.receive_nowait()
        with trio.move_on_at(self._core.wake_s):
            return await self._news.receive()
        return self._core.epoch, Tick()

    def _is_next(self, epoch: int, token: TokenOut) -> bool:
        """Whether the token is the stream's next one. One that is ahead tells that the chain lost some."""
        expected = len(self._made)
        if token.index < expected:
            return False
        if token.index > expected:
            if epoch == self._core.epoch:
                self._do(Broke(epoch, self._epochs[epoch].choice.stages[-1].peer))
            return False
        now_s = trio.current_time()
        self._made.append(token.token)
        self._ended = token.finish is not None
        self._do(Came(len(self._made)))
        if self._lost and epoch == self._core.epoch:
            self._way.stalled(Stall(now_s - self._last_s, self._replayed, tuple(self._lost)))
            self._lost, self._replayed = [], 0
        self._last_s = now_s
        return True

    def _broke(self, epoch: int, problem: Exception) -> None:
        """A chain ended before its session did. Raises `problem` where that is not to be mended."""
        if epoch not in self._epochs or epoch < self._core.epoch:
            return
        split = epoch == 0 and self._epochs[0].choice.prefill is not None
        if not isinstance(problem, StageLost) or not self._mendable or (split and not self._made):
            raise problem
        log.warning("session %s: %s", self._opening.session, problem)
        self._do(Broke(epoch, problem.peer), problem)

    def _do(self, event: Event, problem: StageLost | None = None) -> None:
        """Tell the core, and do as it says."""
        todo: list[Instruction] = self._core.handle(event, trio.current_time())
        while todo:
            order = todo.pop(0)
            match order:
                case Probe(epoch, within_s):
                    self._nursery.start_soon(self._probe, epoch, self._core.chain, within_s)
                case Choose():
                    todo += self._core.handle(self._sought(order), trio.current_time())
                case Join(epoch):
                    self._join(epoch)
                case Close(epoch):
                    for old in [number for number in self._epochs if number < epoch]:
                        self._epochs.pop(old).scope.cancel()
                case GiveUp(peer):
                    raise problem or StageLost(peer, "no other node could take its place in time")

    def _sought(self, order: Choose) -> Event:
        before, choice = self._core.chain, self._way.seek(order)
        if choice is None:
            return Unmended()
        self._lost += [s.peer for s in before if s not in order.kept]
        self._epochs[self._core.epoch + 1] = _Epoch(choice)
        known = len(self._prompt) + len(self._made)
        fresh = [e for s, e in zip(choice.stages, choice.expected, strict=True) if s not in order.kept]
        join_s = sum(each.seconds(known) + len(self._made) / 8 * each.token_s for each in fresh)
        return Mended(choice.stages, join_s + sum(each.hop_s for each in choice.expected))

    def _join(self, epoch: int) -> None:
        choice = self._epochs[epoch].choice
        self._peers |= {stage.peer for stage in choice.stages}
        wants = self._opening.sampling
        depends = wants.form or wants.presence_penalty or wants.frequency_penalty
        depends = depends or wants.repetition_penalty != 1.0
        opening = replace(
            self._opening,
            stages=choice.stages,
            marks=(),
            reuse=0,
            heirs=(),
            source="",
            sources=(),
            handover_s=0.0,
            epoch=epoch,
            made=len(self._made),
            said=tuple(self._made) if depends else (),
        )
        self._way.moved(choice)
        self._nursery.start_soon(self._run, epoch, opening)

    async def _run(self, epoch: int, opening: SessionOpen) -> None:
        """One chain's tokens and its end, into the flow's news."""
        own = self._epochs[epoch]
        problem: GatewayError | CacheStale | Elsewhere
        with own.scope:
            try:
                await self._through(epoch, opening, own.choice)
                problem = StageLost(opening.stages[-1].peer, "its tokens ended")
            except (GatewayError, CacheStale, Elsewhere) as why:
                problem = why
            await self._send.send((epoch, problem))

    async def _through(self, epoch: int, opening: SessionOpen, choice: Choice) -> None:
        way = self._way
        if choice.prefill is not None and not epoch:
            chains = openings(opening, choice.prefill.stages, self._handover_s)
            observe = way.observe(choice.prefill), way.observe(choice)
            async with open_split(
                way.rpc, way.returns, *chains, self._prompt, observe, way.handed_over
            ) as answer:
                async for token in answer:
                    await self._send.send((epoch, token))
            return
        text = (*self._prompt, *self._made) if epoch else self._prompt
        observe_one = way.observe(choice)
        async with (
            open_session(way.rpc, way.returns, opening, text, observe_one, way.heard) as session,
            trio.open_nursery() as nursery,
        ):
            if epoch:
                nursery.start_soon(self._tell_joined, epoch, session.joined)
            async for token in session:
                await self._send.send((epoch, token))
            nursery.cancel_scope.cancel()

    async def _tell_joined(self, epoch: int, joined: Callable[[], Awaitable[int]]) -> None:
        self._replayed += await joined()
        await self._send.send((epoch, Joined(epoch)))

    async def _probe(self, epoch: int, chain: tuple[StageRef, ...], within_s: float) -> None:
        reports: dict[int, StageReport | None] = {}
        name = self._opening.session

        async def ask(at: int, stage: StageRef) -> None:
            reports[at] = None
            with contextlib.suppress(P2pError):
                answer = await self._way.rpc.call(stage.peer, PROBE, ProbeAsk(name), deadline_s=within_s)
                found = [one for one in answer.stages if one.start == stage.start]
                reports[at] = found[0] if found else StageReport(stage.start, -1, 0, 0, 0.0)

        async with trio.open_nursery() as nursery:
            for at, stage in enumerate(chain):
                nursery.start_soon(ask, at, stage)
        await self._send.send((epoch, Reported(epoch, reports)))


@contextlib.asynccontextmanager
async def open_flow(
    way: Way,
    opening: SessionOpen,
    choice: Choice,
    prompt: tuple[int, ...],
    patience: Patience,
    handover_s: float,
    release: Callable[[str, set[str]], None],
) -> AsyncIterator[Flow]:
    """Run a session for as long as the block lasts; whoever may still hold room for it is told to `release` it. Raises
    GatewayErrors, CacheStale and Elsewhere."""
    flow: Flow | None = None
    try:
        async with trio.open_nursery() as nursery:
            flow = Flow(way, opening, choice, prompt, patience, handover_s, nursery)
            yield flow
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_single(group)
    finally:
        if flow is not None and flow.broken:
            release(opening.session, flow.peers)


async def release_room(rpc: Rpc, session: str, peers: set[str]) -> None:
    """Tell nodes that a session is over; who does not hear it frees its room by itself after a while."""

    async def tell(peer: str) -> None:
        with contextlib.suppress(P2pError, LocalFault):
            await rpc.call(peer, RELEASE, ReleaseAsk(session), deadline_s=RELEASE_S)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(tell, peer)
