"""A stage of a session on this node: takes activations in, hands activations or tokens on.

It owns no routing: the chain comes with the request. Whatever ends the session (the gateway leaving, a neighbour
dying, a bad message) frees its KV room here and cancels the stages behind it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import torch
import trio

from model_shards import ModelError, NoRoom, Sampling, Step, StepResult, tensor_from_bytes, tensor_to_bytes
from node.serve.compute import Abandoned, Compute
from node.serve.faults import leaves
from node.serve.protocol import (
    CHUNK_TOKENS_MAX,
    ID_CHARS_MAX,
    IDLE_S_MAX,
    PROMPT_WAIT_S,
    RETURN,
    SESSION,
    STAGES_MAX,
    TOKENS_MAX,
    Activations,
    Finish,
    ReturnDone,
    ReturnOpen,
    Role,
    SessionInput,
    SessionNote,
    SessionOpen,
    StageRef,
    TokenOut,
)
from node.serve.returns import Returns
from p2p import Call, CallFailed, Channel, EndOfChannel, PeerLost, RemoteFault, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.serve")
InputChannel: TypeAlias = Channel[SessionInput, SessionNote]
OnwardChannel: TypeAlias = Channel[SessionNote, SessionInput]
Lookup = Callable[[str, int, int], Compute]


class StageService:
    """Serves SESSION: `lookup(manifest_id, start, end)` gives the Compute that hosts the span, or raises RpcRefusal."""

    def __init__(self, rpc: Rpc, me: str, returns: Returns, lookup: Lookup) -> None:
        self._rpc = rpc
        self._me = me
        self._returns = returns
        self._lookup = lookup
        self.sessions = 0
        rpc.serve_channel(SESSION, self._serve)

    async def _serve(self, call: Call, request: SessionOpen, channel: InputChannel) -> None:
        stage = _check(request, self._me)
        compute = self._lookup(request.manifest_id, stage.start, stage.end)
        tokens_max = request.prompt_tokens + request.new_tokens_max
        try:
            await compute.open(request.session, stage.start, stage.end, tokens_max)
        except NoRoom as full:
            raise RpcRefusal("busy", str(full), retry_after_s=full.retry_after_s) from None
        except ModelError as problem:
            raise RpcRefusal("invalid", str(problem)) from None
        self.sessions += 1
        try:
            await self._run(request, compute, channel)
        except (BaseExceptionGroup, RemoteFault, ModelError, Abandoned) as problem:
            refusal = _refusal(problem)
            if refusal is None:
                raise
            raise refusal from None
        finally:
            self.sessions -= 1
            await compute.close(request.session)

    async def _run(self, request: SessionOpen, compute: Compute, channel: InputChannel) -> None:
        last = request.index == len(request.stages) - 1
        async with contextlib.AsyncExitStack() as stack:
            # Waiting starts before the chain behind is opened: its last stage may answer at once.
            tokens = (
                stack.enter_context(self._returns.expect(request.session, "stage", request.stages[-1].peer))
                if request.index == 0
                else None
            )
            if last:
                onward: _Onward = await stack.enter_async_context(_Tail.open(self._rpc, request, compute))
            else:
                onward = await stack.enter_async_context(_Relay.open(self._rpc, request))
            stage = _Stage(request, compute, onward)
            if tokens is not None:
                await stage.lead(channel, tokens)
            else:
                await stage.follow(channel)


class _Onward:
    """Where a stage's results go."""

    async def put(self, position: int, result: StepResult, sample: bool) -> None:
        raise LookupError("an abstract onward path was used")


class _Relay(_Onward):
    """To the next stage of the chain, watching that it stays alive."""

    def __init__(self, channel: OnwardChannel) -> None:
        self._channel = channel

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, rpc: Rpc, request: SessionOpen) -> AsyncIterator[_Relay]:
        follower = request.stages[request.index + 1].peer
        onward = SessionOpen(
            session=request.session,
            manifest_id=request.manifest_id,
            stages=request.stages,
            index=request.index + 1,
            gateway=request.gateway,
            prompt_tokens=request.prompt_tokens,
            new_tokens_max=request.new_tokens_max,
            ignore_eos=request.ignore_eos,
            sampling=request.sampling,
        )
        async with rpc.open(follower, SESSION, onward) as channel, trio.open_nursery() as nursery:
            nursery.start_soon(_watch, channel, follower)
            yield cls(channel)
            nursery.cancel_scope.cancel()

    async def put(self, position: int, result: StepResult, sample: bool) -> None:
        if result.hidden is None:
            raise RpcRefusal("internal", "the engine gave no activations for the next stage")
        dtype, shape, data = tensor_to_bytes(result.hidden)
        message = Activations(position, Tensor(dtype, shape, data), sample)
        await self._channel.send(SessionInput(activations=message))


class _Tail(_Onward):
    """The last stage: tokens go straight to the first stage and to the gateway."""

    def __init__(
        self, request: SessionOpen, eos_ids: frozenset[int], outs: list[Channel[ReturnDone, TokenOut]]
    ) -> None:
        self._request = request
        self._eos_ids = eos_ids
        self._outs = outs
        self._sent = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, rpc: Rpc, request: SessionOpen, compute: Compute) -> AsyncIterator[_Tail]:
        eos_ids = frozenset(() if request.ignore_eos else compute.engine.span.config.eos_ids)
        async with contextlib.AsyncExitStack() as stack:
            outs = []
            roles: tuple[tuple[str, Role], ...] = (
                (request.stages[0].peer, "stage"),
                (request.gateway, "gateway"),
            )
            for peer, role in roles:
                opening = ReturnOpen(request.session, role)
                outs.append(await stack.enter_async_context(rpc.open(peer, RETURN, opening)))
            yield cls(request, eos_ids, outs)

    async def put(self, position: int, result: StepResult, sample: bool) -> None:
        if not sample:
            return
        if result.token is None:
            raise RpcRefusal("internal", "the engine gave no token at the last stage")
        finish: Finish | None = None
        if result.token in self._eos_ids:
            finish = "stop"
        elif self._sent + 1 >= self._request.new_tokens_max:
            finish = "length"
        token = TokenOut(self._sent, result.token, result.logprob, finish)
        self._sent += 1
        for out in self._outs:
            await out.send(token)


class _Stage:
    """One session's work at one stage."""

    def __init__(self, request: SessionOpen, compute: Compute, onward: _Onward) -> None:
        self._request = request
        self._compute = compute
        self._onward = onward
        sampling = request.sampling
        self._sampling = Sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=sampling.seed
        )
        self._last = request.index == len(request.stages) - 1

    async def lead(self, channel: InputChannel, returned: trio.MemoryReceiveChannel[TokenOut]) -> None:
        """The first stage: the prompt from the gateway, then each token as the last stage returns it."""
        position = 0
        while position < self._request.prompt_tokens:
            prompt = (await _in_time(channel, PROMPT_WAIT_S)).prompt
            if prompt is None or prompt.position != position:
                raise RpcRefusal("invalid", f"expected the prompt from position {position}")
            tokens = _token_ids(prompt.tokens, self._request.prompt_tokens - position)
            end = position + len(tokens)
            await self._step(position, end == self._request.prompt_tokens, tokens=tokens)
            position = end
        async for token in returned:
            if token.finish is not None:
                break
            await self._step(position, True, tokens=(token.token,))
            position += 1
        await _until_closed(channel)

    async def follow(self, channel: InputChannel) -> None:
        """A later stage: activations until the one before closes."""
        device = self._compute.engine.span.device
        with contextlib.suppress(EndOfChannel):
            while True:
                given = (await _in_time(channel, IDLE_S_MAX)).activations
                if given is None:
                    raise RpcRefusal("invalid", "expected activations")
                hidden = tensor_from_bytes(given.hidden.dtype, given.hidden.shape, given.hidden.data)
                await self._step(given.position, given.sample, hidden=hidden.to(device))

    async def _step(
        self,
        position: int,
        sample: bool,
        tokens: tuple[int, ...] | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        sampling = self._sampling if sample and self._last else None
        step = Step(
            session=self._request.session, position=position, tokens=tokens, hidden=hidden, sample=sampling
        )
        result = await self._compute.step(step)
        await self._onward.put(position, result, sample)


def _check(request: SessionOpen, me: str) -> StageRef:
    """The request's own stage; refuses what no honest gateway sends."""
    if not 0 <= request.index < len(request.stages) <= STAGES_MAX:
        raise RpcRefusal("invalid", f"stage {request.index} of {len(request.stages)}")
    names = (request.session, request.gateway, *(stage.peer for stage in request.stages))
    if not all(0 < len(name) <= ID_CHARS_MAX for name in names):
        raise RpcRefusal("invalid", f"names have 1 to {ID_CHARS_MAX} characters")
    if request.prompt_tokens < 1 or request.new_tokens_max < 1:
        raise RpcRefusal("invalid", "a session needs at least one prompt token and one new token")
    if request.prompt_tokens + request.new_tokens_max > TOKENS_MAX:
        raise RpcRefusal("invalid", f"more than {TOKENS_MAX} tokens")
    edges = [0, *(stage.end for stage in request.stages)]
    if any(s.start != edge or s.end <= s.start for s, edge in zip(request.stages, edges, strict=False)):
        raise RpcRefusal("invalid", "the stages do not follow one another from layer 0")
    stage = request.stages[request.index]
    if stage.peer != me:
        raise RpcRefusal("invalid", f"stage {request.index} is not on this node")
    return stage


def _token_ids(tensor: Tensor, most: int) -> tuple[int, ...]:
    ids = tensor_from_bytes(tensor.dtype, tensor.shape, tensor.data)
    if ids.dtype != torch.int32 or ids.ndim != 1 or not 0 < ids.numel() <= min(most, CHUNK_TOKENS_MAX):
        raise RpcRefusal("invalid", f"expected 1 to {min(most, CHUNK_TOKENS_MAX)} token ids as int32")
    return tuple(ids.tolist())


async def _in_time(channel: InputChannel, wait_s: float) -> SessionInput:
    """What comes next. A session that nobody feeds must not keep its room for ever."""
    with trio.move_on_after(wait_s):
        return await channel.receive()
    raise RpcRefusal("unavailable", f"nothing came for this session within {wait_s:g} s")


async def _until_closed(channel: InputChannel) -> None:
    """Keep the session's room until the gateway has read its last token and leaves."""
    with contextlib.suppress(EndOfChannel):
        while True:
            await _in_time(channel, IDLE_S_MAX)


async def _watch(channel: OnwardChannel, peer: str) -> None:
    """A stage that ends before its session does is a fault, even when it says goodbye politely."""
    with contextlib.suppress(EndOfChannel):
        while True:
            await channel.receive()
    raise PeerLost(peer, f"stage on {peer} left the session")


def _refusal(problem: BaseException) -> RpcRefusal | None:
    """What to tell the stage before (and through it the gateway) about the first fault in `problem`."""
    for leaf in leaves(problem):
        if isinstance(leaf, RpcRefusal):
            return leaf
        if isinstance(leaf, CallFailed):
            return RpcRefusal(
                leaf.code, leaf.message, leaf.retry_after_s, detail=leaf.detail or {"peer": leaf.peer}
            )
        if isinstance(leaf, PeerLost):
            return RpcRefusal("unavailable", str(leaf), detail={"peer": leaf.peer})
        if isinstance(leaf, RemoteFault):
            return RpcRefusal("unavailable", str(leaf))
        if isinstance(leaf, ModelError | Abandoned):
            return RpcRefusal("invalid", str(leaf))
    return None
