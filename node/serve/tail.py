"""The last stage's way out: its tokens go straight to the first stage and to the gateway. Knows no engine's state."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import trio

from model_shards import Step, StepResult, Verdict, tensor_to_bytes
from model_shards.sampler import Pick
from node.serve.compute import Compute
from node.serve.protocol import IDLE_S_MAX, RETURN, Finish, Guesses, ReturnOpen, Role, SessionOpen, TokenOut
from node.serve.relay import Onward
from p2p import Channel, EndOfChannel, PeerLost, Rpc, RpcRefusal, Tensor


class Tail(Onward):
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
    async def open(cls, rpc: Rpc, request: SessionOpen, compute: Compute) -> AsyncIterator[Tail]:
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
