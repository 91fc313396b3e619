"""One session's work at one stage: steps into the engine, results onward. It owns no routing and opens nothing."""

from __future__ import annotations

import contextlib

import torch
import trio

from model_shards import WINDOW_ROWS_MAX, Sampling, Step, Window, tensor_from_bytes
from node.serve.choosing import known_tokens
from node.serve.feed import InputChannel, in_time, piece, until_closed
from node.serve.guessing import Asking
from node.serve.handover import Giver, Taking
from node.serve.lineage import Footing, answered_to, boundary, footing
from node.serve.lodger import Lodger
from node.serve.prefixes import first_mark, next_mark
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
from node.serve.relay import UNASKED, Above, Onward, Relay
from node.serve.returns import Returns
from node.serve.tail import Tail
from p2p import EndOfChannel, RpcRefusal


class Stage:
    """One session's work at one stage."""

    def __init__(
        self,
        request: SessionOpen,
        lodger: Lodger,
        onward: Onward,
        above: Above,
        giver: Giver | None = None,
        taking: Taking | None = None,
        sampling: Sampling | None = None,
        returns: Returns | None = None,
    ) -> None:
        self._request = request
        self._lodger = lodger
        self._compute = lodger.compute
        self._returns = returns
        self._onward = onward
        self._above = above
        self._giver = giver
        self._taking = taking
        self._sampling = sampling
        self._last = request.index == len(request.stages) - 1
        self._reach = 0
        self._guessed: tuple[int, ...] = ()

    async def rejoin(self) -> int:
        """Find the place in a chain that was joined anew, say it above and feed the stage below what it lacks; the
        position that comes next. Raises ModelError, OSError."""
        request, lodger, onward = self._request, self._lodger, self._onward
        position = await self._compute.settle(lodger.name)
        prompt = request.prompt_tokens
        if isinstance(onward, Relay):
            note = await onward.joined()
            own = boundary(min(position, lodger.history.end), prompt)
            foot = footing(own, lodger.history.start, note.want, prompt)
            self._reach = max(own, note.reach)
        else:
            own = answered_to(position, prompt, lodger.told_from + len(lodger.told))
            foot, self._reach = Footing(own, own), own
        await self._compute.rewind(lodger.name, foot.want)
        lodger.history.truncate(foot.want)
        del lodger.text[foot.want :]
        lodger.given = lodger.done = foot.want
        if foot.want < prompt:
            lodger.plan = lodger.plan.again()
        if self._last:
            self._recall()
        lodger.stands()
        await self._above.say(SessionNote(request.index, UNASKED, want=foot.want, reach=self._reach))
        if isinstance(onward, Relay):
            await onward.replay(foot.resend, foot.want, prompt, request.known)
        elif isinstance(onward, Tail):
            await onward.again()
        return foot.want

    def _recall(self) -> None:
        """What the choice of tokens depends on, and what of it is told again."""
        request, lodger = self._request, self._lodger
        if lodger.told_from + len(lodger.told) < request.made:
            lodger.told, lodger.told_from = [], request.made
        if self._sampling is not None and self._sampling.wants_history:
            later = [token.token for token in lodger.told[max(0, request.made - lodger.told_from) :]]
            answer = [*known_tokens(request.said, self._compute), *later]
            prompt = lodger.text[: request.prompt_tokens]
            unknown = [-1] * (request.prompt_tokens - len(prompt))
            self._compute.engine.recall(lodger.name, [*prompt, *unknown, *answer], request.prompt_tokens)

    async def lead(
        self,
        channel: InputChannel,
        returned: trio.MemoryReceiveChannel[TokenOut],
        prompt: tuple[int, ...],
    ) -> None:
        """The first stage: what the gateway knows of the text from there, then each token as the last stage returns
        it."""
        request, lodger = self._request, self._lodger
        ends = frozenset(() if request.ignore_eos else self._compute.engine.span.config.eos_ids)
        if request.epoch:
            position = await self.rejoin()
            position = await self._read_again(channel, position)
            asking = Asking(request, ends, self._compute.window_rows, position - request.prompt_tokens)
            asking.read(lodger.text)
        else:
            asking = Asking(request, ends, self._compute.window_rows)
            position = await self._read(asking, channel, prompt)
        await self._answer(asking, returned, position)
        await until_closed(channel)

    async def _read(self, asking: Asking, channel: InputChannel, prompt: tuple[int, ...]) -> int:
        """The prompt, or the first token of an answer whose prompt was read elsewhere; where the next one stands."""
        request, text = self._request, self._lodger.text
        position, mark = 0, first_mark(request.adapter)
        if self._taking is not None:
            while request.window > 1 and position < request.prompt_tokens:
                tokens = await piece(channel, position, request.prompt_tokens)
                asking.read(tokens)
                text.extend(tokens)
                position += len(tokens)
            position = request.prompt_tokens
            first = await piece(channel, position, position + 1, IDLE_S_MAX)
            asking.read(first)
            # What this step takes is mostly waiting for the cache, and says nothing of the stage.
            await self._step(position, True, tokens=first, tell=False)
            return position + 1
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
            else:
                text.extend(tokens)
            position = end
        return position

    async def _read_again(self, channel: InputChannel, position: int) -> int:
        """The text as far as the gateway knows it; where the first token stands that must be returned."""
        request, kept = self._request, tuple[int, ...]()
        while position < request.known:
            tokens = await piece(channel, position, request.known)
            end, window = position + len(tokens), None
            if position >= request.prompt_tokens and len(tokens) > 1:
                if len(tokens) > WINDOW_ROWS_MAX or end >= request.known:
                    raise RpcRefusal("invalid", f"{len(tokens)} tokens of the answer at position {position}")
                window = Window.line(tokens)
            await self._step(
                position, end >= request.known, tokens=tokens, tell=False, window=window, kept=kept
            )
            kept = tuple(range(1, len(tokens))) if window is not None else ()
            position = end
        return position

    async def _answer(
        self, asking: Asking, returned: trio.MemoryReceiveChannel[TokenOut], position: int
    ) -> None:
        """The tokens of each pass, as they return, into the next one, whose first one stands at `position`."""
        came: list[TokenOut] = []
        prompt_tokens = self._request.prompt_tokens
        async for token in returned:
            if token.index < position - prompt_tokens and self._request.epoch:
                if token.finish is not None:
                    return
                continue
            if token.index != position - prompt_tokens + len(came) and self._request.epoch:
                last = self._request.stages[-1].peer
                raise RpcRefusal(
                    "unavailable", f"{last} returned token {token.index} out of turn", detail={"peer": last}
                )
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
            if position < self._reach:
                # Below, what is certain is not computed twice, and guesses cannot be told apart from it.
                window = Window.line(window.tokens[:1])
            guesses = window if window.rows > 1 else None
            if guesses is not None and not self._last and self._returns is not None:
                guessed = Guesses(position, window.tokens)
                await self._returns.guess(self._request.session, guessed, self._request.epoch)
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
        if self._request.epoch:
            await self.rejoin()
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
        tells = self._last and given.sample
        return Window(given.parents, await self._onward.guesses(given.position) if tells else ())

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
        lodger, pool = self._lodger, self._request.pool
        name = lodger.name
        if self._last and pool:
            # A mean is the sum of every piece's rows.
            step = Step(name, position, tokens, hidden, pool=pool if sample or pool == "mean" else None)
        else:
            sampling = self._sampling if sample and self._last else None
            step = Step(name, position, tokens, hidden, sampling, window=window, kept=kept)
        if self._taking is not None:
            await self._taking.wait()
        lodger.given, lodger.busy_from_s = position + step.count, trio.current_time()
        result = await self._compute.step(step)
        if self._giver is not None:
            self._giver.filled(position + step.count)
        if tokens is not None:
            self._note(step)
        await self._onward.put(step, result, sample, tell)
        lodger.done, lodger.busy_from_s = position + step.count, None
        told = lodger.plan.told
        if told and position + step.count == len(told) * PIECE_TOKENS:
            self._compute.held.use(told)
        if tell:
            where = position if noted is None else noted
            await self._above.say(SessionNote(self._request.index, where, step.certain))

    def _note(self, step: Step) -> None:
        """The first stage's text, as far as it is certain."""
        text, tokens = self._lodger.text, step.tokens or ()
        if self._guessed and len(text) + len(step.kept) == step.position:
            text.extend(self._guessed[row] for row in step.kept)
        self._guessed = tokens if step.window is not None else ()
        if len(text) == step.position:
            text.extend(tokens[: step.certain])
