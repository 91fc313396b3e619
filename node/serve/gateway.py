"""The gateway: turns a request into a chain of stages, feeds the prompt in and hands the tokens out.

Any node is one. It chooses the chain with phase 2 from its own view, opens the session at the first stage and listens
for the last stage's tokens. A lost stage becomes one clear StageLost; before the first token another chain is tried.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import trio

from model_shards import Tokenizer, tensor_to_bytes
from node.adverts import ModelAdvert
from node.atlas import Atlas
from node.errors import ContextTooLong, GatewayError, ModelNotReady, Overloaded, StageLost, UnknownModel
from node.gateway import GenerateRequest, ModelInfo, TokenEvent
from node.metrics import Metrics
from node.serve.faults import raise_as_gateway_error, raise_single
from node.serve.protocol import (
    CHUNK_TOKENS_MAX,
    SESSION,
    Prompt,
    SamplingSpec,
    SessionInput,
    SessionNote,
    SessionOpen,
    StageRef,
    TokenOut,
)
from node.serve.returns import Returns
from p2p import Channel, EndOfChannel, P2pError, PeerLost, RemoteFault, Rpc, Tensor
from scheduler import Chain, ChainRequest, NoChain, NoRoom, choose_chain

if TYPE_CHECKING:
    from node.library import Library

log = logging.getLogger("shoal.gateway")
TRIES_MAX = 3
EVENTS_BUFFERED = 64
CHAIN_WAIT_S = 1.0


@dataclass(slots=True)
class LiveRequest:
    """A request under way: what the dashboard and the metrics show."""

    request_id: str
    model: str
    chain: tuple[StageRef, ...]
    began_s: float
    tokens: int = 0


@dataclass(slots=True)
class _Outcome:
    """How a stream ended, when it did not end by its last token."""

    problem: GatewayError | None = None


class MeshGateway:
    """node.gateway.Gateway over the mesh. `atlas()` gives the current view, `mesh_json()` what /mesh shows."""

    def __init__(
        self,
        rpc: Rpc,
        me: str,
        returns: Returns,
        library: Library,
        atlas: Callable[[], Atlas],
        detail: Callable[[ModelAdvert], str],
        mesh_json: Callable[[], dict[str, Any]],
        metrics: Metrics,
    ) -> None:
        self._rpc = rpc
        self._me = me
        self._returns = returns
        self._library = library
        self._atlas = atlas
        self._detail = detail
        self._mesh_json = mesh_json
        self._metrics = metrics
        self.live: dict[str, LiveRequest] = {}

    def models(self) -> list[ModelInfo]:
        """Every model that the mesh knows, ready or not."""
        atlas = self._atlas()
        return [self._info(atlas, model) for model in sorted(atlas.models.values(), key=lambda m: m.name)]

    async def tokenizer(self, model: str) -> Tokenizer:
        """The tokenizer, fetched from a peer the first time. Raises UnknownModel, ModelNotReady."""
        advert = self._named(model)
        known = self._library.tokenizer(advert.manifest_id)
        if known is not None:
            return known
        try:
            return (await self._library.files(advert.manifest_id)).tokenizer
        except P2pError as problem:
            raise ModelNotReady(f"the tokenizer of {model} cannot be fetched: {problem}") from None

    def mesh(self) -> dict[str, Any]:
        """This node's view of the mesh, JSON-able."""
        return self._mesh_json()

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """Run `request`; leaving the block cancels it on every stage."""
        model = self._named(request.model)
        needed = len(request.prompt) + request.max_tokens
        if needed > model.context_tokens:
            raise ContextTooLong(model.context_tokens, needed)
        send, receive = trio.open_memory_channel[TokenEvent](EVENTS_BUFFERED)
        outcome = _Outcome()
        try:
            async with trio.open_nursery() as nursery, receive:
                nursery.start_soon(self._run, request, model, send, outcome)
                yield _Stream(receive, outcome)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_single(group)

    async def _run(
        self,
        request: GenerateRequest,
        model: ModelAdvert,
        send: trio.MemorySendChannel[TokenEvent],
        outcome: _Outcome,
    ) -> None:
        """Fill the request's stream; whatever ends it early becomes its outcome."""
        deadline_s = float("inf") if request.deadline_s is None else request.deadline_s
        async with send:
            with trio.move_on_after(deadline_s) as overall:
                try:
                    await self._attempts(request, model, send)
                except GatewayError as problem:
                    outcome.problem = problem
            if overall.cancelled_caught:
                outcome.problem = ModelNotReady(f"the request's deadline of {deadline_s:g} s passed")

    async def _attempts(
        self, request: GenerateRequest, model: ModelAdvert, send: trio.MemorySendChannel[TokenEvent]
    ) -> None:
        """Tokens from one chain; another chain is tried while nothing has been shown yet."""
        excluded: set[str] = set()
        shown = False
        for attempt in range(1, TRIES_MAX + 1):
            chain = await self._chain(request, model, excluded)
            try:
                async with self._session(request, model, chain) as (tokens, live):
                    async for token in tokens:
                        shown = True
                        live.tokens += 1
                        await send.send(TokenEvent(token.token, token.index, token.logprob, token.finish))
                        if token.finish is not None:
                            return
            except StageLost as lost:
                log.warning("request %s: %s", request.request_id, lost)
                if shown or attempt == TRIES_MAX:
                    raise
                excluded.add(lost.peer)
            except Overloaded:
                if attempt == TRIES_MAX:
                    raise
                await trio.sleep(0.2 * attempt)

    async def _chain(self, request: GenerateRequest, model: ModelAdvert, excluded: set[str]) -> Chain:
        """Phase 2. Right after a loss the view may lag, so an uncovered model is asked about again for a moment."""
        wish = ChainRequest(
            layers=model.layers,
            tokens=len(request.prompt) + request.max_tokens,
            prompt_tokens=len(request.prompt),
            hidden_bytes=model.hidden_bytes,
            gateway=self._me,
            exclude=frozenset(excluded),
            seed=secrets.randbits(32),
        )
        give_up_s = trio.current_time() + CHAIN_WAIT_S
        while True:
            atlas = self._atlas()
            try:
                return choose_chain(atlas.hosted(model), atlas.links(), wish)
            except NoRoom as full:
                problem: GatewayError = Overloaded(getattr(full, "retry_after_s", 1.0))
            except NoChain:
                if excluded and trio.current_time() >= give_up_s - CHAIN_WAIT_S / 2:
                    # Nobody else has these layers: whoever failed may have come back meanwhile.
                    excluded.clear()
                    wish = replace(wish, exclude=frozenset())
                problem = ModelNotReady(
                    self._info(atlas, model).detail or f"{model.name} is not served completely now"
                )
            if trio.current_time() >= give_up_s:
                raise problem
            await trio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def _session(
        self, request: GenerateRequest, model: ModelAdvert, chain: Chain
    ) -> AsyncIterator[tuple[trio.MemoryReceiveChannel[TokenOut], LiveRequest]]:
        """One session over one chain, as its stream of tokens. Raises StageLost or Overloaded."""
        session = secrets.token_hex(12)
        stages = tuple(StageRef(s.node, s.start, s.end) for s in chain.stages)
        opening = SessionOpen(
            session=session,
            manifest_id=model.manifest_id,
            stages=stages,
            index=0,
            gateway=self._me,
            prompt_tokens=len(request.prompt),
            new_tokens_max=request.max_tokens,
            ignore_eos=request.ignore_eos,
            sampling=SamplingSpec(request.temperature, request.top_p, request.top_k, request.seed),
        )
        live = LiveRequest(request.request_id, model.name, stages, time.time())
        self.live[session] = live
        first = stages[0].peer
        try:
            with self._returns.expect(session, "gateway", stages[-1].peer) as tokens:
                async with self._rpc.open(first, SESSION, opening) as channel, trio.open_nursery() as nursery:
                    nursery.start_soon(_feed, channel, request.prompt)
                    nursery.start_soon(_watch, channel, first)
                    yield tokens, live
                    nursery.cancel_scope.cancel()
        except (BaseExceptionGroup, RemoteFault) as problem:
            raise_as_gateway_error(problem, first)
        finally:
            del self.live[session]

    def _named(self, name: str) -> ModelAdvert:
        model = self._atlas().model_named(name)
        if model is None:
            raise UnknownModel(name)
        return model

    def _info(self, atlas: Atlas, model: ModelAdvert) -> ModelInfo:
        ready = min(atlas.copies(model), default=0) > 0
        return ModelInfo(
            name=model.name,
            manifest_id=model.manifest_id,
            created_s=model.created_s,
            context_tokens=model.context_tokens,
            layers=model.layers,
            ready=ready,
            detail="" if ready else self._detail(model),
        )


async def _feed(channel: Channel[SessionNote, SessionInput], prompt: tuple[int, ...]) -> None:
    """The prompt into the first stage, a chunk at a time."""
    for position in range(0, len(prompt), CHUNK_TOKENS_MAX):
        ids = torch.tensor(prompt[position : position + CHUNK_TOKENS_MAX], dtype=torch.int32)
        await channel.send(SessionInput(prompt=Prompt(position, Tensor(*tensor_to_bytes(ids)))))


async def _watch(channel: Channel[SessionNote, SessionInput], peer: str) -> None:
    """The chain says nothing while it works; an end before the gateway leaves is a fault."""
    with contextlib.suppress(EndOfChannel):
        while True:
            await channel.receive()
    raise PeerLost(peer, f"the first stage, {peer}, left the session")


class _Stream:
    """Plain iteration: no cancel scope is held between two events, so a fault reaches the reader as an exception."""

    def __init__(self, receive: trio.MemoryReceiveChannel[TokenEvent], outcome: _Outcome) -> None:
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
