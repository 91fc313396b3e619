"""The last stage's way out: its tokens go straight to the first stage and to the gateway. Knows no engine's state."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import trio

from model_shards import Step, StepResult, Verdict, tensor_to_bytes
from model_shards.sampler import Pick
from node.serve.lodger import Lodger
from node.serve.protocol import IDLE_S_MAX, RETURN, Finish, Guesses, ReturnOpen, Role, SessionOpen, TokenOut
from node.serve.relay import Onward
from p2p import Channel, EndOfChannel, PeerLost, Rpc, RpcRefusal, Tensor


class Tail(Onward):
    """The last stage: tokens go straight to the first stage and to the gateway. What was returned stays with the
    lodger, which may have to return it again."""

    def __init__(
        self,
        request: SessionOpen,
        eos_ids: frozenset[int],
        outs: list[Channel[Guesses, TokenOut]],
        lodger: Lodger,
    ) -> None:
        self._request = request
        self._eos_ids = eos_ids
        self._outs = outs
        self._lodger = lodger

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, rpc: Rpc, request: SessionOpen, lodger: Lodger) -> AsyncIterator[Tail]:
        eos_ids = frozenset(() if request.ignore_eos else lodger.compute.engine.span.config.eos_ids)
        async with contextlib.AsyncExitStack() as stack:
            outs = []
            roles: tuple[tuple[str, Role], ...] = (
                (request.stages[0].peer, "stage"),
                (request.gateway, "gateway"),
            )
            for peer, role in roles:
                opening = ReturnOpen(request.session, role, request.epoch)
                outs.append(await stack.enter_async_context(rpc.open(peer, RETURN, opening)))
            yield cls(request, eos_ids, outs, lodger)

    async def again(self) -> None:
        """What was returned under an earlier epoch and the gateway does not know."""
        lodger = self._lodger
        for token in lodger.told[max(0, self._request.made - lodger.told_from) :]:
            await self._return(token)

    async def put(self, step: Step, result: StepResult, sample: bool, tell: bool) -> None:
        if not sample:
            return
        if result.embedding is not None:
            embedding = Tensor(*tensor_to_bytes(result.embedding))
            await self._return(TokenOut(0, 0, finish="stop", embedding=embedding))
            return
        if result.token is None:
            raise RpcRefusal("internal", "the engine gave no token at the last stage")
        verdict = result.verdict or Verdict(
            (Pick(result.token, result.logprob or 0.0, result.top_logprobs),), ()
        )
        tokens: list[TokenOut] = []
        finish: Finish | None = None
        first = step.position + step.certain - self._request.prompt_tokens
        for index, pick in enumerate(verdict.picks, start=first):
            if pick.token in self._eos_ids:
                finish = "stop"
            elif index + 1 >= self._request.new_tokens_max:
                finish = "length"
            tokens.append(TokenOut(index, pick.token, pick.logprob, finish, pick.top, more=True))
            if finish is not None:
                break
        self._lodger.told.extend(replace(token, more=False) for token in tokens)
        tokens[-1] = replace(tokens[-1], more=False, guessed=step.window.rows - 1 if step.window else 0)
        for token in tokens:
            await self._return(token)

    async def _return(self, token: TokenOut) -> None:
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
