"""A stage of a session on this node: takes activations in, hands activations or tokens on.

It owns no routing: the chain comes with the request. Whatever ends the session (the gateway leaving, a neighbour
dying, a bad message, other work that needs the room of a background session) frees its KV room here and cancels the
stages behind it. It times the stage behind it and says up the chain what it saw.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from model_shards import ModelError, NoRoom
from node.serve.choosing import sampling_of
from node.serve.compute import Abandoned, Compute, Stale
from node.serve.faults import refusal_of
from node.serve.feed import InputChannel, whole_prompt
from node.serve.handover import Handovers, Taking
from node.serve.opening import checked
from node.serve.protocol import BACKGROUND, PIECE_TOKENS, SESSION, SessionNote, SessionOpen
from node.serve.relay import UNASKED, Above, Onward, Relay
from node.serve.returns import Returns
from node.serve.staging import Plan, Stage
from node.serve.tail import Tail
from p2p import Call, RemoteFault, Rpc, RpcRefusal

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
        stage = checked(request, self._me, call.peer)
        compute = self._lookup(request.manifest_id, stage.start, stage.end)
        prompt = await whole_prompt(request, channel) if request.reuse and request.index == 0 else ()
        plan = Plan.of(request, compute)
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
            refusal = refusal_of(problem)
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
        self, compute: Compute, request: SessionOpen, plan: Plan, prompt: tuple[int, ...]
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
        plan: Plan,
        channel: InputChannel,
        prompt: tuple[int, ...],
        queues_s: tuple[float, ...],
    ) -> None:
        last = request.index == len(request.stages) - 1
        above = Above(channel)
        await above.say(SessionNote(request.index, UNASKED, queues_s=queues_s))
        async with contextlib.AsyncExitStack() as stack:
            giver = await stack.enter_async_context(self.handovers.giving(request, compute, refusal_of))
            # Waiting starts before the chain behind is opened: its last stage may answer at once.
            tokens = (
                stack.enter_context(self._returns.expect(request.session, "stage", request.stages[-1].peer))
                if request.index == 0
                else None
            )
            if last:
                onward: Onward = await stack.enter_async_context(Tail.open(self._rpc, request, compute))
            else:
                onward = await stack.enter_async_context(Relay.open(self._rpc, request, above))
            taking = Taking(self.handovers, request, compute) if request.sources else None
            sampling = await sampling_of(request.sampling, compute if last else None)
            stage = Stage(request, compute, plan, onward, above, giver, taking, sampling, self._returns)
            async with trio.open_nursery() as nursery:
                if taking is not None:
                    nursery.start_soon(taking.run)
                if tokens is not None:
                    await stage.lead(channel, tokens, prompt)
                else:
                    await stage.follow(channel)
                nursery.cancel_scope.cancel()
