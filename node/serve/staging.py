"""One session's work at one stage: steps into the engine, results onward. It owns no routing and opens nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import trio

from model_shards import WINDOW_ROWS_MAX, Sampling, Step, Window, tensor_from_bytes
from node.serve.compute import Compute
from node.serve.feed import InputChannel, in_time, piece, until_closed
from node.serve.guessing import Asking
from node.serve.handover import Giver, Taking
from node.serve.prefixes import first_mark, next_mark, scope_of, stand_ins, told_mark
from node.serve.protocol import (
    IDLE_S_MAX,
    PIECE_TOKENS,
    TELL_EVERY_TOKENS,
    Activations,
    Guesses,
    SessionNote,
    SessionOpen,
    TokenOut,
)
from node.serve.relay import Above, Onward
from node.serve.returns import Returns
from p2p import EndOfChannel, RpcRefusal


@dataclass(frozen=True, slots=True)
class Plan:
    """What a session's prompt is to this stage's cache: `told` marks of its whole pieces and the ids that stand for
    them, the scope, how many positions to `keep` at the end (None: whatever is cached)."""

    scope: str
    told: tuple[bytes, ...]
    stand_ins: tuple[int, ...]
    keep: int | None

    @classmethod
    def of(cls, request: SessionOpen, compute: Compute) -> Plan:
        scope, marks = scope_of(request.stages, request.index), request.marks
        if not compute.engine.shares_prefixes:
            return cls(scope, (), (), None)
        stage = request.stages[request.index]
        told = tuple(told_mark(scope, stage.start, stage.end, mark) for mark in marks)
        if request.index == 0:
            return cls(scope, told, (), len(marks) * PIECE_TOKENS)
        return cls(scope, told, stand_ins(marks, compute.engine.span.config.vocab), None)


class Stage:
    """One session's work at one stage."""

    def __init__(
        self,
        request: SessionOpen,
        compute: Compute,
        plan: Plan,
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
