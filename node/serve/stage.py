"""Stages of sessions on this node: who may open one, which node's memory holds it, when its room is free again.

It owns no routing: the chain comes with the request. A session ends when its gateway leaves, and frees its KV room here
and on the stages behind it. Where its chain only broke it stays for a while, and goes on when the chain is joined anew
under a higher epoch; whoever fed it before is not heard any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import trio

from model_shards import ModelError, NoRoom
from node.serve.choosing import sampling_of
from node.serve.compute import Compute, Stale
from node.serve.faults import leaves, refusal_of
from node.serve.feed import InputChannel, whole_prompt
from node.serve.handover import Giver, Handovers, Taking
from node.serve.history import Shelf
from node.serve.lodger import Lodger, Plan, Stay
from node.serve.opening import checked
from node.serve.protocol import (
    BACKGROUND,
    PIECE_TOKENS,
    PROBE,
    RELEASE,
    SESSION,
    ProbeAnswer,
    ProbeAsk,
    ReleaseAsk,
    Released,
    SessionNote,
    SessionOpen,
    TokenOut,
)
from node.serve.relay import UNASKED, Above, Onward, Relay
from node.serve.returns import Returns
from node.serve.staging import Stage
from node.serve.tail import Tail
from p2p import Call, RemoteFault, Rpc, RpcRefusal

log = logging.getLogger("shoal.serve")
YIELDED_RETRY_S = 1.0
KEEP_S = 30.0
"""So long a session whose chain broke waits here to be joined anew."""
Lookup = Callable[[str, int, int], Compute]


class StageService:
    """Serves SESSION while `run` runs: `lookup(manifest_id, start, end)` gives the Compute that hosts the span, or
    raises RpcRefusal. What stages hand on is kept on the `shelf`."""

    def __init__(
        self,
        rpc: Rpc,
        me: str,
        returns: Returns,
        lookup: Lookup,
        shelf: Shelf | None = None,
        *,
        keep_s: float = KEEP_S,
    ) -> None:
        self._rpc = rpc
        self._me = me
        self._returns = returns
        self._lookup = lookup
        self._shelf = shelf or Shelf()
        self._keep_s = keep_s
        self.handovers = Handovers(rpc, me)
        self._lodgers: dict[tuple[str, int, int], Lodger] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        rpc.serve_channel(SESSION, self._serve)
        rpc.serve(PROBE, self._probe)
        rpc.serve(RELEASE, self._release)

    @property
    def sessions(self) -> int:
        """Sessions that hold room here, those whose chain broke included."""
        return len(self._lodgers)

    @property
    def kept_bytes(self) -> tuple[int, int]:
        """What live sessions handed on, in memory and on the disk."""
        return self._shelf.memory_bytes, self._shelf.disk_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold sessions until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            task_status.started()
            await trio.sleep_forever()

    async def _serve(self, call: Call, request: SessionOpen, channel: InputChannel) -> None:
        stage = checked(request, self._me, call.peer)
        compute = self._lookup(request.manifest_id, stage.start, stage.end)
        await self._running.wait()
        stay = Stay(request, channel)
        prompt: tuple[int, ...] = ()
        queues_s = compute.queue_by_class_s()
        lodger = self._lodgers.get((request.session, stage.start, stage.end))
        if lodger is None or lodger.compute is not compute:
            prompt = await whole_prompt(request, channel) if request.reuse and request.index == 0 else ()
            lodger = await self._open(compute, request, prompt)
        self._may_enter(lodger, request)
        before = lodger.enter(stay)
        if self._nursery is None:
            raise RpcRefusal("unavailable", "this node ends its sessions")
        try:
            self._nursery.start_soon(self._live, lodger, stay, before, prompt, queues_s)
        except RuntimeError:  # trio's for a nursery that is closing: this node ends
            raise RpcRefusal("unavailable", "this node ends its sessions") from None
        try:
            await stay.finished.wait()
        finally:
            if not stay.finished.is_set():
                _unfed(lodger, stay)
        if stay.refusal is not None:
            raise stay.refusal

    def _may_enter(self, lodger: Lodger, request: SessionOpen) -> None:
        known = lodger.request
        if lodger.current is None:
            return
        if request.epoch <= known.epoch:
            raise RpcRefusal("invalid", f"session {request.session} is open here under epoch {known.epoch}")
        same = (known.gateway, known.prompt_tokens, known.new_tokens_max, known.adapter, known.sampling)
        if same != (
            request.gateway, request.prompt_tokens, request.new_tokens_max, request.adapter, request.sampling
        ):  # fmt: skip
            raise RpcRefusal("denied", f"session {request.session} is another one here")

    async def _open(self, compute: Compute, request: SessionOpen, prompt: tuple[int, ...]) -> Lodger:
        """Reserve a session's room, that of others if need be. Raises RpcRefusal."""
        stage, plan = request.stages[request.index], Plan.of(request, compute)
        # A node may have a session's layers twice, or have them still from an earlier chain.
        name = f"{request.session}#{request.epoch}:{stage.start}" if request.epoch else request.session
        while True:
            try:
                await compute.open(
                    name,
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
                break
            except NoRoom as full:
                if not await self._send_away(compute, request.priority):
                    raise RpcRefusal("busy", str(full), retry_after_s=full.retry_after_s) from None
            except Stale as stale:
                pieces = stale.tokens // PIECE_TOKENS
                compute.held.drop(plan.told[pieces:])
                detail = {"reuse": str(pieces * PIECE_TOKENS)}
                raise RpcRefusal("unavailable", str(stale), detail=detail) from None
            except ModelError as problem:
                raise RpcRefusal("invalid", str(problem)) from None
        compute.held.use(plan.told[: request.reuse // PIECE_TOKENS])
        if request.index == len(request.stages) - 1 and not prompt and not request.sources:
            # Stand-ins only name the cache: to a sampler the prompt's tokens here are unknown.
            compute.engine.recall(name, [-1] * request.prompt_tokens, request.prompt_tokens)
        lodger = Lodger(name, compute, plan, self._shelf.open(), request)
        lodger.told_from = request.made or bool(request.sources)
        before = self._lodgers.pop(lodger.key, None)
        self._lodgers[lodger.key] = lodger
        if before is not None and before.current is not None:
            before.current.stop("evicted")
        return lodger

    async def _send_away(self, compute: Compute, priority: int) -> bool:
        """End a session that nobody feeds, or for one that is not background the latest background session; whether
        there was one."""
        here = [one for one in reversed(self._lodgers.values()) if one.compute is compute]
        waiting = [one for one in here if one.waiting and one.current is not None]
        guests = [one for one in here if one.request.priority == BACKGROUND and priority < BACKGROUND]
        for lodger in (*waiting, *guests):
            if lodger.current is not None and lodger.current.why != "evicted":
                busy = "background work gave its room to other work"
                lodger.current.refusal = RpcRefusal("busy", busy, YIELDED_RETRY_S)
                lodger.current.stop("evicted")
                await lodger.left.wait()
                return True
        return False

    async def _live(
        self,
        lodger: Lodger,
        stay: Stay,
        before: Stay | None,
        prompt: tuple[int, ...],
        queues_s: tuple[float, ...],
    ) -> None:
        """One stay from its beginning to its end, and the session's end where it is the last stay."""
        try:
            with stay.whole:
                if before is not None:
                    await before.stopped.wait()
                try:
                    await self._run(lodger, stay, prompt, queues_s)
                except Exception as problem:  # noqa: BLE001 - a session's fault ends that session: it is told above
                    self._failed(lodger, stay, problem)
                stay.stopped.set()
                stay.finished.set()
                if stay.why in ("lost", "superseded"):
                    with trio.move_on_after(self._keep_s):
                        await stay.release.wait()
        except Exception as problem:  # noqa: BLE001 - a fault in one session that came as the session was cancelled
            self._failed(lodger, stay, problem)
        except BaseExceptionGroup as group:
            # The same while this node ends: whoever cancelled must see the cancellation alone.
            faults, cancelled = group.split(Exception)
            if faults is not None:
                self._failed(lodger, stay, faults)
            if cancelled is not None:
                raise cancelled from None
        finally:
            stay.stopped.set()
            stay.finished.set()
            if lodger.current is stay:
                await self._leave(lodger)

    def _failed(self, lodger: Lodger, stay: Stay, problem: Exception) -> bool:
        """What the stage above is told of a fault; whether it is the doing of another node."""
        refusal = refusal_of(problem)
        if refusal is None:
            log.error("session %s failed here", stay.request.session, exc_info=problem)
            refusal = RpcRefusal("internal", "the stage failed")
        stay.refusal = stay.refusal or refusal
        remote = any(isinstance(leaf, RemoteFault) for leaf in leaves(problem))
        if remote and not stay.why and refusal.code != "busy" and lodger.mendable:
            stay.why = "lost"
        return remote

    async def _leave(self, lodger: Lodger) -> None:
        """The session's room is free."""
        if self._lodgers.get(lodger.key) is lodger:
            del self._lodgers[lodger.key]
        lodger.stands()
        lodger.history.close()
        # Only positions that came in whole pieces stay: whoever takes them over computes as if it were alone.
        await lodger.compute.close(lodger.name, lodger.plan.keep)
        lodger.left.set()

    async def _run(
        self, lodger: Lodger, stay: Stay, prompt: tuple[int, ...], queues_s: tuple[float, ...]
    ) -> None:
        request, channel = stay.request, stay.channel
        last = request.index == len(request.stages) - 1
        above = Above(channel)
        await above.say(SessionNote(request.index, UNASKED, queues_s=queues_s))
        async with contextlib.AsyncExitStack() as stack:
            giver = await stack.enter_async_context(
                self.handovers.giving(request, lodger.compute, refusal_of)
            )
            # Waiting starts before the chain behind is opened: its last stage may answer at once.
            tokens = None
            if request.index == 0:
                source = request.stages[-1].peer
                tokens = stack.enter_context(
                    self._returns.expect(request.session, "stage", source, request.epoch)
                )
            onward: Onward
            if last:
                onward = await stack.enter_async_context(Tail.open(self._rpc, request, lodger))
            else:
                onward = await stack.enter_async_context(
                    Relay.open(self._rpc, request, above, lodger.history)
                )
            try:
                with stay.work, _upstream(lodger, stay):
                    await self._work(lodger, stay, onward, above, giver, tokens, prompt)
            except Exception as problem:  # what is not handled here is raised again
                if not lodger.mendable or self._failed(lodger, stay, problem):
                    raise
                # The fault is here, and what the stages below have is still good: only this one's place is lost.
                await self._leave(lodger)
                stay.why = "lost"
            lodger.busy_from_s = None
            if stay.why in ("lost", "superseded"):
                # Whoever is below keeps what it has for as long as this way to it is open.
                stay.stopped.set()
                stay.finished.set()
                with trio.move_on_after(self._keep_s):
                    await stay.release.wait()
                stay.release.set()

    async def _work(
        self,
        lodger: Lodger,
        stay: Stay,
        onward: Onward,
        above: Above,
        giver: Giver | None,
        tokens: trio.MemoryReceiveChannel[TokenOut] | None,
        prompt: tuple[int, ...],
    ) -> None:
        request = stay.request
        last = request.index == len(request.stages) - 1
        taking = Taking(self.handovers, request, lodger.compute) if request.sources else None
        sampling = await sampling_of(request.sampling, lodger.compute if last else None)
        stage = Stage(request, lodger, onward, above, giver, taking, sampling, self._returns)
        async with trio.open_nursery() as nursery:
            if taking is not None:
                nursery.start_soon(taking.run)
            if tokens is not None:
                await stage.lead(stay.channel, tokens, prompt)
            else:
                await stage.follow(stay.channel)
            nursery.cancel_scope.cancel()

    async def _probe(self, call: Call, request: ProbeAsk) -> ProbeAnswer:
        now_s = trio.current_time()
        mine = [one for one in self._lodgers.values() if one.request.session == request.session]
        if any(one.request.gateway != call.peer for one in mine):
            raise RpcRefusal("denied", "only its gateway may ask for a session")
        return ProbeAnswer(tuple(one.report(now_s) for one in mine))

    async def _release(self, call: Call, request: ReleaseAsk) -> Released:
        mine = [
            one
            for one in self._lodgers.values()
            if one.request.session == request.session and one.request.gateway == call.peer
        ]
        for lodger in mine:
            if lodger.current is not None:
                lodger.current.stop("left")
        return Released(len(mine))


def _unfed(lodger: Lodger, stay: Stay) -> None:
    """Nobody feeds the stay any more: its session ends, or waits to be joined anew."""
    stay.stop("lost" if lodger.mendable and not stay.channel.left else "left")


@contextlib.contextmanager
def _upstream(lodger: Lodger, stay: Stay) -> Iterator[None]:
    """Whoever feeds the stay may be gone before its call is told so: that is no fault of the session's."""
    try:
        yield
    except (BaseExceptionGroup, RemoteFault):
        if not (stay.channel.left or stay.channel.lost):
            raise
        _unfed(lodger, stay)
