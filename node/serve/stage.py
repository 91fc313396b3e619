"""A stage of a session on this node: takes activations in, hands activations or tokens on.

It owns no routing: the chain comes with the request. Whatever ends the session (the gateway leaving, a neighbour
dying, a bad message, other work that needs the room of a background session) frees its KV room here and cancels the
stages behind it. It times the stage behind it and says up the chain what it saw.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import torch
import trio

from model_shards import (
    WINDOW_ROWS_MAX,
    ModelError,
    NoRoom,
    Sampling,
    Step,
    StepResult,
    Verdict,
    Window,
    tensor_from_bytes,
    tensor_to_bytes,
)
from model_shards.sampler import Pick
from node.adverts import MANIFEST_ID
from node.serve.choosing import sampling_of
from node.serve.compute import Abandoned, Compute, Stale
from node.serve.faults import leaves
from node.serve.feed import InputChannel, in_time, piece, until_closed, whole_prompt
from node.serve.guessing import Asking
from node.serve.handover import Giver, Handovers, Taking
from node.serve.prefixes import first_mark, next_mark, scope_of, stand_ins, told_mark
from node.serve.protocol import (
    BACKGROUND,
    HANDOVER_S_MAX,
    ID_CHARS_MAX,
    IDLE_S_MAX,
    MARK_BYTES,
    PIECE_TOKENS,
    RETURN,
    SESSION,
    STAGES_MAX,
    TELL_EVERY_TOKENS,
    TOKENS_MAX,
    Activations,
    Finish,
    Guesses,
    ReturnOpen,
    Role,
    SessionNote,
    SessionOpen,
    StageRef,
    TokenOut,
)
from node.serve.relay import UNASKED, Above, Onward, Relay
from node.serve.returns import Returns
from p2p import Call, CallFailed, Channel, EndOfChannel, PeerLost, RemoteFault, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.serve")
YIELDED_RETRY_S = 1.0
Lookup = Callable[[str, int, int], Compute]


@dataclass(slots=True)
class _Guest:
    """A background session: whoever needs its room cancels `scope` and waits until it `left`."""

    compute: Compute
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    left: trio.Event = field(default_factory=trio.Event)


class StageService:
    """Serves SESSION: `lookup(manifest_id, start, end)` gives the Compute that hosts the span, or raises RpcRefusal."""

    def __init__(self, rpc: Rpc, me: str, returns: Returns, lookup: Lookup) -> None:
        self._rpc = rpc
        self._me = me
        self._returns = returns
        self._lookup = lookup
        self.handovers = Handovers(rpc, me)
        self._guests: list[_Guest] = []
        self.sessions = 0
        rpc.serve_channel(SESSION, self._serve)

    async def _serve(self, call: Call, request: SessionOpen, channel: InputChannel) -> None:
        stage = _check(request, self._me, call.peer)
        compute = self._lookup(request.manifest_id, stage.start, stage.end)
        prompt = await whole_prompt(request, channel) if request.reuse and request.index == 0 else ()
        plan = _Plan.of(request, compute)
        queues_s = compute.queue_by_class_s()
        await self._open(compute, request, plan, prompt)
        self.sessions += 1
        guest = _Guest(compute)
        if request.priority == BACKGROUND:
            self._guests.append(guest)
        try:
            with guest.scope:
                await self._run(request, compute, plan, channel, prompt, queues_s)
            if guest.scope.cancelled_caught:
                raise RpcRefusal("busy", "background work gave its room to other work", YIELDED_RETRY_S)
        except (BaseExceptionGroup, RemoteFault, ModelError, Abandoned) as problem:
            refusal = _refusal(problem)
            if refusal is None:
                raise
            raise refusal from None
        finally:
            self.sessions -= 1
            # Only positions that came in whole pieces stay: whoever takes them over computes as if it were alone.
            await compute.close(request.session, plan.keep)
            guest.left.set()
            if guest in self._guests:
                self._guests.remove(guest)

    async def _open(
        self, compute: Compute, request: SessionOpen, plan: _Plan, prompt: tuple[int, ...]
    ) -> None:
        """Reserve the session's room, that of background sessions if need be. Raises RpcRefusal."""
        stage = request.stages[request.index]
        while True:
            try:
                await compute.open(
                    request.session,
                    stage.start,
                    stage.end,
                    request.prompt_tokens + request.new_tokens_max,
                    priority=request.priority,
                    prompt_tokens=0 if request.sources else request.prompt_tokens,
                    prompt=prompt or plan.stand_ins,
                    reuse=request.reuse,
                    scope=plan.scope,
                    adapter=request.adapter,
                )
                compute.held.use(plan.told[: request.reuse // PIECE_TOKENS])
                if request.index == len(request.stages) - 1 and not prompt and not request.sources:
                    # Stand-ins only name the cache: to a sampler the prompt's tokens here are unknown.
                    compute.engine.recall(
                        request.session, [-1] * request.prompt_tokens, request.prompt_tokens
                    )
                return
            except NoRoom as full:
                if request.priority == BACKGROUND or not await self._send_away(compute):
                    raise RpcRefusal("busy", str(full), retry_after_s=full.retry_after_s) from None
            except Stale as stale:
                pieces = stale.tokens // PIECE_TOKENS
                compute.held.drop(plan.told[pieces:])
                detail = {"reuse": str(pieces * PIECE_TOKENS)}
                raise RpcRefusal("unavailable", str(stale), detail=detail) from None
            except ModelError as problem:
                raise RpcRefusal("invalid", str(problem)) from None

    async def _send_away(self, compute: Compute) -> bool:
        """End the latest background session; whether there was one."""
        for guest in reversed(self._guests):
            if guest.compute is compute and not guest.left.is_set():
                guest.scope.cancel()
                await guest.left.wait()
                return True
        return False

    async def _run(
        self,
        request: SessionOpen,
        compute: Compute,
        plan: _Plan,
        channel: InputChannel,
        prompt: tuple[int, ...],
        queues_s: tuple[float, ...],
    ) -> None:
        last = request.index == len(request.stages) - 1
        above = Above(channel)
        await above.say(SessionNote(request.index, UNASKED, queues_s=queues_s))
        async with contextlib.AsyncExitStack() as stack:
            giver = await stack.enter_async_context(self.handovers.giving(request, compute, _refusal))
            # Waiting starts before the chain behind is opened: its last stage may answer at once.
            tokens = (
                stack.enter_context(self._returns.expect(request.session, "stage", request.stages[-1].peer))
                if request.index == 0
                else None
            )
            if last:
                onward: Onward = await stack.enter_async_context(_Tail.open(self._rpc, request, compute))
            else:
                onward = await stack.enter_async_context(Relay.open(self._rpc, request, above))
            taking = Taking(self.handovers, request, compute) if request.sources else None
            sampling = await sampling_of(request.sampling, compute if last else None)
            stage = _Stage(request, compute, plan, onward, above, giver, taking, sampling, self._returns)
            async with trio.open_nursery() as nursery:
                if taking is not None:
                    nursery.start_soon(taking.run)
                if tokens is not None:
                    await stage.lead(channel, tokens, prompt)
                else:
                    await stage.follow(channel)
                nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a session's prompt is to this stage's cache: `told` marks of its whole pieces and the ids that stand for
    them, the scope, how many positions to `keep` at the end (None: whatever is cached)."""

    scope: str
    told: tuple[bytes, ...]
    stand_ins: tuple[int, ...]
    keep: int | None

    @classmethod
    def of(cls, request: SessionOpen, compute: Compute) -> _Plan:
        scope, marks = scope_of(request.stages, request.index), request.marks
        if not compute.engine.shares_prefixes:
            return cls(scope, (), (), None)
        stage = request.stages[request.index]
        told = tuple(told_mark(scope, stage.start, stage.end, mark) for mark in marks)
        if request.index == 0:
            return cls(scope, told, (), len(marks) * PIECE_TOKENS)
        return cls(scope, told, stand_ins(marks, compute.engine.span.config.vocab), None)


class _Tail(Onward):
    """The last stage: tokens go straight to the first stage and to the gateway."""

    def __init__(
        self, request: SessionOpen, eos_ids: frozenset[int], outs: list[Channel[Guesses, TokenOut]]
    ) -> None:
        self._request = request
        self._eos_ids = eos_ids
        self._outs = outs
        # The token that follows the prompt comes from the session that read it.
        self._sent = 1 if request.sources else 0

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

    async def put(self, step: Step, result: StepResult, sample: bool, tell: bool) -> None:
        if not sample:
            return
        if result.embedding is not None:
            embedding = Tensor(*tensor_to_bytes(result.embedding))
            for out in self._outs:
                await out.send(TokenOut(0, 0, finish="stop", embedding=embedding))
            return
        if result.token is None:
            raise RpcRefusal("internal", "the engine gave no token at the last stage")
        verdict = result.verdict or Verdict(
            (Pick(result.token, result.logprob or 0.0, result.top_logprobs),), ()
        )
        tokens: list[TokenOut] = []
        finish: Finish | None = None
        for pick in verdict.picks:
            if pick.token in self._eos_ids:
                finish = "stop"
            elif self._sent + 1 >= self._request.new_tokens_max:
                finish = "length"
            tokens.append(TokenOut(self._sent, pick.token, pick.logprob, finish, pick.top, more=True))
            self._sent += 1
            if finish is not None:
                break
        tokens[-1] = replace(tokens[-1], more=False, guessed=step.window.rows - 1 if step.window else 0)
        for token in tokens:
            for out in self._outs:
                await out.send(token)

    async def guesses(self, position: int) -> tuple[int, ...]:
        with trio.move_on_after(IDLE_S_MAX):
            try:
                told = await self._outs[0].receive()
            except EndOfChannel:
                raise PeerLost(self._request.stages[0].peer, "the first stage left the session") from None
            if told.position != position:
                raise RpcRefusal("invalid", f"guesses for position {told.position}, expected {position}")
            return told.tokens
        raise RpcRefusal("unavailable", f"no guesses came within {IDLE_S_MAX:g} s")


class _Stage:
    """One session's work at one stage."""

    def __init__(
        self,
        request: SessionOpen,
        compute: Compute,
        plan: _Plan,
        onward: Onward,
        above: Above,
        giver: Giver | None = None,
        taking: Taking | None = None,
        sampling: Sampling | None = None,
        returns: Returns | None = None,
    ) -> None:
        self._request = request
        self._compute = compute
        self._returns = returns
        self._plan = plan
        self._onward = onward
        self._above = above
        self._giver = giver
        self._taking = taking
        self._sampling = sampling
        self._last = request.index == len(request.stages) - 1

    async def lead(
        self,
        channel: InputChannel,
        returned: trio.MemoryReceiveChannel[TokenOut],
        prompt: tuple[int, ...],
    ) -> None:
        """The first stage: the prompt from the gateway, then each token as the last stage returns it."""
        request = self._request
        position, mark = 0, first_mark(request.adapter)
        ends = frozenset(() if request.ignore_eos else self._compute.engine.span.config.eos_ids)
        asking = Asking(request, ends, self._compute.window_rows)
        if self._taking is not None:
            while request.window > 1 and position < request.prompt_tokens:
                tokens = await piece(channel, position, request.prompt_tokens)
                asking.read(tokens)
                position += len(tokens)
            position = request.prompt_tokens
            first = await piece(channel, position, position + 1, IDLE_S_MAX)
            asking.read(first)
            # What this step takes is mostly waiting for the cache, and says nothing of the stage.
            await self._step(position, True, tokens=first, tell=False)
            position += 1
        while position < request.prompt_tokens:
            if position < len(prompt):
                tokens = prompt[position : position + PIECE_TOKENS]
            else:
                tokens = await piece(channel, position, request.prompt_tokens)
            mark = self._checked(position, tokens, mark)
            end = position + len(tokens)
            asking.read(tokens)
            if position >= request.reuse:
                await self._step(position, end == request.prompt_tokens, tokens=tokens, tell=True)
            position = end
        await self._answer(asking, returned, position)
        await until_closed(channel)

    async def _answer(
        self, asking: Asking, returned: trio.MemoryReceiveChannel[TokenOut], position: int
    ) -> None:
        """The tokens of each pass, as they return, into the next one, whose first one stands at `position`."""
        came: list[TokenOut] = []
        async for token in returned:
            came.append(token)
            if token.finish is not None:
                return
            if token.more and len(came) < WINDOW_ROWS_MAX:
                continue
            window, kept = asking.after([one.token for one in came], trio.current_time())
            if len(kept) != len(came) - 1:
                last = self._request.stages[-1].peer
                raise RpcRefusal(
                    "unavailable", f"{last} returned tokens that nobody guessed", detail={"peer": last}
                )
            position += len(kept)
            guesses = window if window.rows > 1 else None
            if guesses is not None and not self._last and self._returns is not None:
                await self._returns.guess(self._request.session, Guesses(position, window.tokens))
            told = next((one.index for one in came if one.index % TELL_EVERY_TOKENS == 0), None)
            # The gateway has a watch on the token itself, which need not be the pass's last one.
            noted = None if told is None else self._request.prompt_tokens + told
            await self._step(
                position,
                True,
                tokens=window.tokens,
                tell=told is not None,
                window=guesses,
                kept=kept,
                noted=noted,
            )
            position, came = position + 1, []

    def _checked(self, position: int, tokens: tuple[int, ...], before: bytes) -> bytes:
        """The mark of a piece. No later stage sees the tokens: what goes there under a mark must be its piece."""
        marks, number = self._request.marks, position // PIECE_TOKENS
        if number >= len(marks):
            return b""
        mark = next_mark(before, tokens)
        if position % PIECE_TOKENS or len(tokens) != PIECE_TOKENS or mark != marks[number]:
            raise RpcRefusal("invalid", f"the mark of the prompt's piece {number} is not that of its tokens")
        return mark

    async def follow(self, channel: InputChannel) -> None:
        """A later stage: activations until the one before closes."""
        device = self._compute.engine.span.device
        with contextlib.suppress(EndOfChannel):
            while True:
                given = (await in_time(channel, IDLE_S_MAX)).activations
                if given is None:
                    raise RpcRefusal("invalid", "expected activations")
                hidden = tensor_from_bytes(given.hidden.dtype, given.hidden.shape, given.hidden.data)
                window = await self._window(given)
                await self._step(
                    given.position,
                    given.sample,
                    hidden=hidden.to(device),
                    tell=given.tell,
                    window=window,
                    kept=given.kept,
                )

    async def _window(self, given: Activations) -> Window | None:
        """The window that came. Only the last stage needs to know its tokens."""
        if not given.parents:
            return None
        if max(len(given.parents), len(given.kept)) > WINDOW_ROWS_MAX:
            raise RpcRefusal("invalid", f"a window has up to {WINDOW_ROWS_MAX} rows")
        return Window(given.parents, await self._onward.guesses(given.position) if self._last else ())

    async def _step(
        self,
        position: int,
        sample: bool,
        tokens: tuple[int, ...] | None = None,
        hidden: torch.Tensor | None = None,
        *,
        tell: bool,
        window: Window | None = None,
        kept: tuple[int, ...] = (),
        noted: int | None = None,
    ) -> None:
        name, pool = self._request.session, self._request.pool
        if self._last and pool:
            # A mean is the sum of every piece's rows.
            step = Step(name, position, tokens, hidden, pool=pool if sample or pool == "mean" else None)
        else:
            sampling = self._sampling if sample and self._last else None
            step = Step(name, position, tokens, hidden, sampling, window=window, kept=kept)
        if self._taking is not None:
            await self._taking.wait()
        result = await self._compute.step(step)
        if self._giver is not None:
            self._giver.filled(position + step.count)
        await self._onward.put(step, result, sample, tell)
        told = self._plan.told
        if told and position + step.count == len(told) * PIECE_TOKENS:
            self._compute.held.use(told)
        if tell:
            where = position if noted is None else noted
            await self._above.say(SessionNote(self._request.index, where, step.certain))


def _check(request: SessionOpen, me: str, caller: str) -> StageRef:
    """The request's own stage; refuses what no honest gateway sends."""
    if not 0 <= request.index < len(request.stages) <= STAGES_MAX:
        raise RpcRefusal("invalid", f"stage {request.index} of {len(request.stages)}")
    names = (
        request.session,
        request.gateway,
        request.source or request.session,
        *(stage.peer for stage in (*request.stages, *request.heirs, *request.sources)),
    )
    if not all(0 < len(name) <= ID_CHARS_MAX for name in names):
        raise RpcRefusal("invalid", f"names have 1 to {ID_CHARS_MAX} characters")
    if request.adapter and not MANIFEST_ID.fullmatch(request.adapter):
        raise RpcRefusal("invalid", "an adapter is named by its manifest's id")
    if request.prompt_tokens < 1 or request.new_tokens_max < 1:
        raise RpcRefusal("invalid", "a session needs at least one prompt token and one new token")
    if request.prompt_tokens + request.new_tokens_max > TOKENS_MAX:
        raise RpcRefusal("invalid", f"more than {TOKENS_MAX} tokens")
    pieces = (request.prompt_tokens - 1) // PIECE_TOKENS
    if len(request.marks) > pieces or any(len(mark) != MARK_BYTES for mark in request.marks):
        raise RpcRefusal("invalid", f"a prompt of {request.prompt_tokens} tokens has up to {pieces} marks")
    if request.reuse % PIECE_TOKENS or not 0 <= request.reuse <= len(request.marks) * PIECE_TOKENS:
        raise RpcRefusal("invalid", f"cannot reuse {request.reuse} positions of {len(request.marks)} pieces")
    for stages in (request.stages, request.heirs, request.sources):
        edges = [0, *(stage.end for stage in stages)]
        if any(s.start != edge or s.end <= s.start for s, edge in zip(stages, edges, strict=False)):
            raise RpcRefusal("invalid", "the stages do not follow one another from layer 0")
        if stages and stages[-1].end != request.stages[-1].end:
            raise RpcRefusal("invalid", f"stages end at {stages[-1].end} and {request.stages[-1].end}")
    _check_handover(request)
    if request.pool:
        _check_pool(request)
    stage = request.stages[request.index]
    if stage.peer != me:
        raise RpcRefusal("invalid", f"stage {request.index} is not on this node")
    if request.index and request.stages[request.index - 1].peer != caller:
        raise RpcRefusal("denied", f"{caller} is not the stage before this one")
    return stage


def _check_pool(request: SessionOpen) -> None:
    if request.new_tokens_max != 1 or request.heirs or request.sources:
        raise RpcRefusal("invalid", "a session that pools makes one embedding on one chain")
    if request.reuse and request.pool == "mean":
        raise RpcRefusal("invalid", "a mean needs every position: none can be reused")


def _check_handover(request: SessionOpen) -> None:
    """Refuse what no honest gateway sends of chains that hand over."""
    if max(len(request.heirs), len(request.sources)) > STAGES_MAX:
        raise RpcRefusal("invalid", f"more than {STAGES_MAX} stages to hand over")
    if request.heirs and (request.sources or request.new_tokens_max != 1):
        raise RpcRefusal("invalid", "a session with heirs reads a prompt and makes one token")
    if bool(request.sources) != bool(request.source) or request.source == request.session:
        raise RpcRefusal("invalid", "a cache comes from the stages of another session")
    if request.sources and (request.marks or request.reuse or request.new_tokens_max < 2):
        raise RpcRefusal("invalid", "a session that takes a cache over reads no prompt")
    if request.priority == BACKGROUND and (request.heirs or request.sources):
        raise RpcRefusal("invalid", "background sessions may be parked and hand nothing over")
    if not 0 <= request.window <= WINDOW_ROWS_MAX:
        raise RpcRefusal("invalid", f"window is {request.window}, expected 0 to {WINDOW_ROWS_MAX}")
    if not 0.0 <= request.handover_s <= HANDOVER_S_MAX:
        raise RpcRefusal("invalid", f"handover_s is {request.handover_s:g}, expected 0 to {HANDOVER_S_MAX:g}")


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
