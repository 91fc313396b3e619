"""The gateway: turns a request into a chain of stages, feeds the prompt in and hands the tokens out.

Any node is one. A request waits for its turn in the intake, gets a chain from the selector and runs there; the last
stage's tokens come straight here. A lost stage becomes one clear StageLost; before the first token another chain is
tried. A background request whose room others need goes on later from where it was.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from model_shards import Tokenizer
from node.adverts import AdapterAdvert, ModelAdvert
from node.atlas import Atlas
from node.errors import (
    ContextTooLong,
    DeadlinePassed,
    GatewayError,
    ModelNotReady,
    Overloaded,
    StageLost,
    UnknownModel,
)
from node.gateway import GenerateRequest, ModelInfo, TokenEvent
from node.metrics import Metrics
from node.serve.booking import booked
from node.serve.choosing import embedding_of, sampling_asked
from node.serve.config import ServeConfig
from node.serve.failover import Choose
from node.serve.faults import raise_single
from node.serve.flow import Flow, Stall, Way, open_flow, release_room
from node.serve.forecast import Pace, seats
from node.serve.intake import Intake, Place
from node.serve.prefixes import marks_of
from node.serve.protocol import (
    BACKGROUND,
    HANDOVER_S_MAX,
    HIGH,
    NORMAL,
    Priority,
    SessionOpen,
)
from node.serve.returns import Returns
from node.serve.selection import Choice, Selector, Wish, as_stages
from node.serve.session import CacheStale, Elsewhere, Observe
from node.serve.work import LiveRequest, Outcome, Stream, Work
from p2p import P2pError, Rpc
from scheduler import (
    Admission,
    Health,
    NoChain,
    NoRoom,
    Rejected,
    Standing,
    Ticket,
)
from scheduler.admission import Capacity
from scheduler.outlook import Aims

if TYPE_CHECKING:
    from node.library import Library

log = logging.getLogger("shoal.gateway")
TRIES_MAX = 3
EVENTS_BUFFERED = 64
CHAIN_WAIT_S = 1.0
BUSY_WAIT_S = 0.2
HANDOVER_SLACK = 4.0
HANDOVER_S_MIN = 5.0
"""A handover may take so many times what it should, and so long in any case."""
PRIORITIES: dict[str, Priority] = {"high": HIGH, "normal": NORMAL, "background": BACKGROUND}
PARALLEL_PRIOR = 4
"""Requests that are supposed not to slow one another down, until it was measured."""
UNKNOWN_TOKENS_PER_S = 50.0


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
        config: ServeConfig | None = None,
    ) -> None:
        self._config = config or ServeConfig()
        self._rpc = rpc
        self._me = me
        self._returns = returns
        self._library = library
        self._atlas = atlas
        self._detail = detail
        self._mesh_json = mesh_json
        self._metrics = metrics
        self._selector = Selector(me, Health(self._config.health), self._config.split_gain)
        self._paces: dict[str, Pace] = {}
        self._priors: dict[str, float] = {}
        self._numbers = itertools.count()
        self._nursery: trio.Nursery | None = None
        self.intake = Intake(self._config.admission, self._capacity)
        self.live: dict[str, LiveRequest] = {}

    def models(self) -> list[ModelInfo]:
        """Every model and adapter that the mesh knows, ready or not."""
        atlas = self._atlas()
        bases = {model.manifest_id: self._info(atlas, model) for model in atlas.models.values()}
        tuned = [_tuned(bases[a.base], a) for a in atlas.adapters.values() if a.base in bases]
        return sorted([*bases.values(), *tuned], key=lambda info: info.name)

    async def tokenizer(self, model: str) -> Tokenizer:
        """The tokenizer, fetched from a peer the first time. Raises UnknownModel, ModelNotReady."""
        advert, _ = self._named(model)
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

    def standings(self) -> dict[str, Standing]:
        """What this gateway thinks of the nodes whose work it saw."""
        return self._selector.health.standings(trio.current_time())

    def lost(self, peer: str) -> None:
        """The connection to a node that serves broke."""
        self._selector.health.failed(peer, trio.current_time())

    def queues(self) -> dict[str, tuple[int, int]]:
        """(running, waiting) requests of this gateway by the models' manifest ids."""
        return self.intake.counts()

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        """Run `request` when its turn comes; leaving the block cancels it on every stage."""
        model, adapter = self._named(request.model)
        needed = len(request.prompt) + request.max_tokens
        if needed > model.context_tokens:
            raise ContextTooLong(model.context_tokens, needed)
        arrived_s = trio.current_time()
        end_s = arrived_s + (float("inf") if request.deadline_s is None else request.deadline_s)
        async with contextlib.AsyncExitStack() as stack:
            with trio.move_on_at(end_s) as overall:
                ticket = self._ticket(request, model, adapter)
                place = await stack.enter_async_context(self.intake.place(model.manifest_id, ticket))
            if overall.cancelled_caught:
                raise DeadlinePassed(request.deadline_s or 0.0)
            patience_s = max(CHAIN_WAIT_S, arrived_s + (ticket.target_s or 0.0) - trio.current_time())
            give_up_s = trio.current_time() + patience_s
            work = Work(request, model, PRIORITIES[request.priority], give_up_s, arrived_s, adapter=adapter)
            work.made += request.made
            send, receive = trio.open_memory_channel[TokenEvent](EVENTS_BUFFERED)
            outcome = Outcome()
            try:
                async with trio.open_nursery() as nursery, receive:
                    nursery.start_soon(self._run, work, place, end_s, send, outcome)
                    yield Stream(receive, outcome)
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                raise_single(group)

    def _ticket(self, request: GenerateRequest, model: ModelAdvert, adapter: str) -> Ticket:
        """What the intake must know. Raises Overloaded where even an idle queue would be too slow."""
        now_s, atlas = trio.current_time(), self._atlas()
        background = request.priority == "background"
        target_s = None if background else self._config.wait_s
        marks = marks_of(request.prompt, adapter)
        wish = self._wish(request, request.prompt, request.max_tokens, marks)
        cached = 0
        with contextlib.suppress(NoChain):
            choice = self._selector.choose(atlas, model, wish, now_s, boundless=True)
            cached = choice.reuse
            tokens = len(request.prompt) + request.max_tokens
            self._priors[model.manifest_id] = tokens / max(1e-6, choice.cost_s) * PARALLEL_PRIOR
            target_s = _wait_that_helps(request, choice, target_s)
        return Ticket(
            request=f"{request.request_id}/{next(self._numbers)}",
            client=request.client,
            prompt_tokens=len(request.prompt),
            new_tokens=request.max_tokens,
            cached_tokens=cached,
            kind="background" if background else "interactive",
            target_s=target_s,
            urgent=request.priority == "high",
        )

    def _capacity(self, manifest_id: str, admission: Admission) -> Capacity:
        """What the mesh can take for a model: room besides what this gateway's requests hold, and at what pace."""
        atlas, now_s = self._atlas(), trio.current_time()
        model = next((m for m in atlas.models.values() if m.manifest_id == manifest_id), None)
        copies = [] if model is None else atlas.copies(model)
        if model is None or min(copies, default=0) == 0:
            return Capacity(1 << 50, UNKNOWN_TOKENS_PER_S)  # let them come and be told what is missing
        pace = self._paces.setdefault(manifest_id, Pace())
        pace.waits(admission.waiting() > 0, now_s)
        rate = pace.tokens_per_s(self._priors.get(manifest_id, UNKNOWN_TOKENS_PER_S), now_s)
        room = self._selector.room(atlas, model, now_s)
        return Capacity(admission.tokens_running() + room, rate, seats(copies, model.concurrency))

    async def _run(
        self,
        work: Work,
        place: Place,
        end_s: float,
        send: trio.MemorySendChannel[TokenEvent],
        outcome: Outcome,
    ) -> None:
        """Fill the request's stream; whatever ends it early becomes its outcome."""
        async with send:
            with trio.move_on_at(end_s) as overall:
                try:
                    await self._turns(work, place, send)
                except GatewayError as problem:
                    outcome.problem = problem
            if overall.cancelled_caught:
                outcome.problem = DeadlinePassed(work.request.deadline_s or 0.0)

    async def _turns(self, work: Work, place: Place, send: trio.MemorySendChannel[TokenEvent]) -> None:
        """Work in turns: background requests give their room away whenever others need it."""
        while True:
            busy: Overloaded | None = None
            with place.turn() as turn:
                try:
                    await self._attempts(work, send)
                except Overloaded as full:
                    if work.priority != BACKGROUND:
                        raise
                    busy = full
            if busy is not None or turn.cancelled_caught:
                self._metrics.count_preemption(work.model.name)
            if busy is not None:
                await self.intake.elsewhere(place, work.model.manifest_id, busy.retry_after_s)
            elif turn.cancelled_caught:
                log.info("request %s gives way", work.request.request_id)
                await place.again()
            else:
                return

    async def _attempts(self, work: Work, send: trio.MemorySendChannel[TokenEvent]) -> None:
        """Tokens from one chain; another chain is tried while nothing has been shown yet."""
        spare: list[Choice] = []
        attempt = 1
        while True:
            choice = spare.pop(0) if spare else await self._choose(work)
            shown = len(work.made)
            try:
                await self._through(work, choice, send)
                return
            except CacheStale as stale:
                self._selector.finder.gone(choice.reading.stages)
                spare = [choice.reusing(max(0, stale.tokens)), *spare]
                continue
            except Elsewhere as better:
                work.left += 1
                spare = [better.choice, *spare]
                continue
            except StageLost as lost:
                log.warning("request %s: %s", work.request.request_id, lost)
                self._selector.health.failed(lost.peer, trio.current_time())
                if choice.prefill is not None and len(work.made) == shown:
                    self._selector.split_failed(trio.current_time())
                if len(work.made) > shown or attempt == TRIES_MAX:
                    raise
                work.excluded.add(lost.peer)
                spare = [c for c in choice.alternates if all(s.peer not in work.excluded for s in c.stages)]
            except Overloaded:
                if work.priority == BACKGROUND or attempt == TRIES_MAX or len(work.made) > shown:
                    raise
                await trio.sleep(BUSY_WAIT_S * attempt)
            attempt += 1

    async def _through(self, work: Work, choice: Choice, send: trio.MemorySendChannel[TokenEvent]) -> None:
        """Tokens through one chain."""
        request, prompt = work.request, work.prompt
        before, pace = len(work.made), self._paces.setdefault(work.model.manifest_id, Pace())
        passed = 0
        async with self._session(work, choice, prompt) as (tokens, live):
            async for token in tokens:
                index = before + token.index
                if token.index == 0:
                    self._metrics.count_prefix(request.model, len(prompt), choice.reading.reuse)
                    if choice.prefill is not None:
                        self._metrics.count_split(request.model)
                    pace.worked(len(prompt), trio.current_time())
                    self._selector.finder.sent(choice.reading.stages, marks_of(prompt, work.adapter))
                if not token.more and not request.pool:
                    right = token.index - passed
                    passed = token.index + 1
                    self._metrics.count_pass(request.model, token.guessed, min(right, token.guessed))
                live.tokens = index + 1
                embedding = embedding_of(token, choice.stages[-1].peer) if request.pool else None
                await send.send(
                    TokenEvent(token.token, index, token.logprob, token.finish, token.top, embedding)
                )
                work.made.append(token.token)
                ended = token.finish is not None
                pace.worked(request.max_tokens - index if ended else 1, trio.current_time())
                if ended:
                    return

    async def _choose(self, work: Work) -> Choice:
        """Phase 2. Right after a loss the view may lag, so an uncovered model is asked about again for a moment; for
        room one waits as long as the request may."""
        # A mean needs every row: nothing may come from a cache.
        marks = () if work.request.pool == "mean" else marks_of(work.prompt, work.adapter)
        began_s = trio.current_time()
        while True:
            now_s, atlas = trio.current_time(), self._atlas()
            wish = self._wish_of(work, marks)
            try:
                return self._selector.choose(atlas, work.model, wish, now_s)
            except Rejected as late:
                raise Overloaded(max(1.0, late.retry_after_s), str(late)) from None
            except NoRoom as full:
                if now_s >= work.give_up_s:
                    raise Overloaded(full.retry_after_s, str(full)) from None
            except NoChain:
                if work.excluded and now_s >= began_s + CHAIN_WAIT_S / 2:
                    # Nobody else has these layers: whoever failed may have come back meanwhile.
                    work.excluded.clear()
                if now_s >= began_s + CHAIN_WAIT_S:
                    detail = self._info(atlas, work.model).detail
                    raise ModelNotReady(detail or f"{work.model.name} is not served completely now") from None
            await trio.sleep(0.05)

    def _wish_of(self, work: Work, marks: tuple[bytes, ...]) -> Wish:
        wish = self._wish(work.request, work.prompt, work.tokens_left, marks, frozenset(work.excluded))
        return replace(wish, aims=work.aims(trio.current_time()))

    def _wish(
        self,
        request: GenerateRequest,
        prompt: tuple[int, ...],
        new_tokens: int,
        marks: tuple[bytes, ...],
        exclude: frozenset[str] = frozenset(),
    ) -> Wish:
        return Wish(
            prompt_tokens=len(prompt),
            new_tokens=new_tokens,
            marks=marks,
            priority=PRIORITIES[request.priority],
            exclude=exclude,
            seed=secrets.randbits(32) | 1,
            likely_tokens=request.likely_tokens,
        )

    @contextlib.asynccontextmanager
    async def _session(
        self, work: Work, choice: Choice, prompt: tuple[int, ...]
    ) -> AsyncIterator[tuple[Flow, LiveRequest]]:
        """One session over one chain and those that take its place, as its stream of tokens. Raises StageLost,
        Overloaded or CacheStale."""
        request, name = work.request, secrets.token_hex(12)
        opening = SessionOpen(
            session=name,
            manifest_id=work.model.manifest_id,
            stages=choice.stages,
            index=0,
            gateway=self._me,
            prompt_tokens=len(prompt),
            new_tokens_max=work.tokens_left,
            ignore_eos=request.ignore_eos,
            sampling=sampling_asked(request, tuple(work.made)),
            marks=() if request.pool == "mean" else marks_of(prompt, work.adapter),
            reuse=choice.reading.reuse,
            priority=work.priority,
            pool=request.pool,
            adapter=work.adapter,
            window=self._config.window,
        )
        live = LiveRequest(
            request.request_id,
            request.model,
            choice.stages,
            time.time(),
            reused=choice.reading.reuse,
            priority=request.priority,
            prefill=choice.prefill.stages if choice.prefill is not None else (),
        )
        self.live[name] = live
        booking = booked(
            self._selector.ledger, name, work.model.manifest_id, choice,
            prompt_tokens=len(prompt), new_tokens=work.tokens_left, priority=work.priority,
        )  # fmt: skip
        with booking as handed_over:
            way = self._way(work, choice, name, live, handed_over)
            within_s = min(HANDOVER_S_MAX, max(HANDOVER_S_MIN, HANDOVER_SLACK * choice.handover_s))
            try:
                patience = self._config.patience
                async with open_flow(way, opening, choice, prompt, patience, within_s, self._release) as flow:
                    yield flow, live
            finally:
                del self.live[name]

    def _way(
        self, work: Work, choice: Choice, session: str, live: LiveRequest, handed_over: Callable[[], None]
    ) -> Way:
        """How one session of a request finds the mesh, and this gateway hears of it."""

        def heard(stage: int, queues_s: tuple[float, ...]) -> None:
            if self._selector.ledger.heard(session, stage, queues_s):
                self._think_again(session, work, choice)

        def moved(other: Choice) -> None:
            live.chain, live.prefill = other.stages, ()
            handed_over()
            self._selector.ledger.closed(session, trio.current_time())
            self._selector.ledger.opened(
                session,
                work.model.manifest_id,
                as_stages(other.stages),
                tokens=len(work.prompt) + work.tokens_left,
                prompt_tokens=0,
                priority=work.priority,
                now_s=trio.current_time(),
            )

        def stalled(stall: Stall) -> None:
            model, told = work.model.name, ", ".join(stall.peers)
            log.info(
                "request %s: %s replaced after %.3f s, %d positions computed again",
                work.request.request_id, told, stall.seconds, stall.replayed,
            )  # fmt: skip
            self._metrics.count_failover(model, stall.seconds, stall.replayed)

        return Way(
            self._rpc, self._returns, self._observing, heard, partial(self._seek, work), moved, stalled, handed_over
        )  # fmt: skip

    def _seek(self, work: Work, order: Choose) -> Choice | None:
        """Phase 2 for a chain that lost stages. Who is to be avoided failed just now."""
        now_s = trio.current_time()
        for peer in order.avoid - work.excluded:
            self._selector.health.failed(peer, now_s)
        work.excluded |= order.avoid
        wish = replace(self._wish_of(work, ()), exclude=order.avoid, aims=Aims())
        try:
            return self._selector.mend(self._atlas(), work.model, wish, order.kept, now_s)
        except (NoChain, NoRoom, Rejected):
            return None

    def _release(self, session: str, peers: set[str]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(release_room, self._rpc, session, peers)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What goes on beside requests, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def _observing(self, choice: Choice) -> Observe:
        def observe(stage: int, tokens: int, seconds: float) -> None:
            self._selector.observe(choice, stage, tokens, seconds, trio.current_time())

        return observe

    def _think_again(self, session: str, work: Work, choice: Choice) -> None:
        """Every stage has said how much work it had. Raises Elsewhere where another chain should be taken, Overloaded
        where none would keep what the client asked for."""
        now_s, wish = trio.current_time(), self._wish_of(work, marks_of(work.prompt, work.adapter))
        try:
            better = self._selector.instead(
                self._atlas(), work.model, wish, session, choice, now_s, work.left
            )
        except Rejected as late:
            raise Overloaded(max(1.0, late.retry_after_s), str(late)) from None
        if better is not None:
            log.info("request %s leaves a chain whose stages have much to do", work.request.request_id)
            raise Elsewhere(better)

    def _named(self, name: str) -> tuple[ModelAdvert, str]:
        """The model that a request is for, and the manifest id of the adapter it names, or none."""
        found = self._atlas().served_as(name)
        if found is None:
            raise UnknownModel(name)
        model, adapter = found
        return model, "" if adapter is None else adapter.manifest_id

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


def _tuned(base: ModelInfo, adapter: AdapterAdvert) -> ModelInfo:
    """An adapter as clients see it: its base, under names of its own."""
    return replace(
        base,
        name=adapter.name,
        manifest_id=adapter.manifest_id,
        created_s=adapter.created_s,
        parent=base.name,
        aliases=(f"{base.name}:{adapter.name}",),
    )


def _wait_that_helps(request: GenerateRequest, choice: Choice, wait_s: float | None) -> float | None:
    """The longest wait after which the request could still keep its times. Raises Overloaded where there is none."""
    limits = [] if wait_s is None else [wait_s]
    if request.first_token_s is not None:
        limits.append(request.first_token_s - choice.first_s)
    if request.deadline_s is not None:
        limits.append(request.deadline_s - choice.whole_s)
    least = min(limits, default=None)
    if least is not None and least < 0:
        late = f"even served at once it would take {-least:.1f} s longer than it may"
        raise Overloaded(min(60.0, max(1.0, -least)), late)
    return least
