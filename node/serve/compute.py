"""The bridge between trio and the engine: one worker thread a device, steps gathered into batches.

Sessions hand in steps and wait for results. What runs together, what stops between two layers, who is parked and who
may come in is decided by the batcher of `model_shards`; this file performs it. It measures what steps take and knows
nothing of networks or of what a step means.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import trio

from model_shards import (
    BLOCK_TOKENS,
    Batcher,
    BatchLimits,
    Engine,
    Grammar,
    GrammarError,
    Grammars,
    ModelError,
    NoRoom,
    Resume,
    Run,
    Step,
    StepError,
    StepResult,
)
from node.serve.prefixes import Held
from node.serve.protocol import BACKGROUND, HIGH, NORMAL, PIECE_TOKENS

IDLE_S = 5.0
"""After so long without work a node that got slow measures itself anew."""
SLOWED = 1.3
SMOOTHING = 0.2
PASS_ROWS = 16
"""Rows that a pass computes for hardly more than one: weights are read once for all of them."""
LIMITS = BatchLimits(chunk_tokens_max=PIECE_TOKENS, yields_from=BACKGROUND)


class Stale(Exception):
    """The cache holds only the first `tokens` of what a session wanted to take over."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"only the first {tokens} positions are cached")
        self.tokens = tokens


class _Preempted(Exception):
    """The running batch is background work, and other work came."""


class Abandoned(Exception):
    """Every session of the running batch was closed: the engine stops between two layers."""


@dataclass(slots=True)
class _Job:
    step: Step
    done: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None
    problem: Exception | None = None

    def fail(self, problem: Exception) -> None:
        self.problem = problem
        self.done.set()


class Compute:
    """Runs an engine's steps for many sessions, one batch at a time, on a worker thread.

    A long prompt runs in pieces of PIECE_TOKENS, whatever came as one message: it delays running decodes by at most one
    of them.
    """

    def __init__(
        self,
        engine: Engine,
        device: trio.CapacityLimiter,
        *,
        s_per_layer: float = 0.0,
        grammars: Callable[[], Grammars] | None = None,
        holding: Callable[[str], contextlib.AbstractAsyncContextManager[None]] | None = None,
    ) -> None:
        self.engine = engine
        self._holding = holding
        self._grammars = grammars
        self._compiler: Grammars | None = None
        self._device = device
        self._batcher = Batcher(engine.kv_blocks, LIMITS)
        self._jobs: dict[int, _Job] = {}
        self._wake = trio.Event()
        self._idle = trio.Lock()
        self._stop = ""
        self._rate_at, self._rate_tokens = time.monotonic(), 0
        self.tokens = 0
        self.s_per_layer = self._best_s = s_per_layer
        self.prefill_s_per_layer = 0.0
        self._kv_tokens = engine.kv_tokens_free()
        self.held = Held(self._kv_tokens // PIECE_TOKENS)

    async def run(self) -> None:
        """Serve batches until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_idle)
                while True:
                    wake = self._wake
                    async with self._idle:
                        acted = await self._act()
                    if not acted:
                        await wake.wait()
        finally:
            for job in self._jobs.values():
                job.fail(Abandoned())

    async def open(
        self,
        session: str,
        start: int,
        end: int,
        tokens_max: int,
        *,
        priority: int = NORMAL,
        prompt_tokens: int = 0,
        prompt: Sequence[int] = (),
        reuse: int = 0,
        scope: str = "",
        adapter: str = "",
    ) -> None:
        """Reserve room for a session over layers [start, end), of `prompt_tokens` and up to `tokens_max` in all. Where
        there is none, background sessions are parked for one that is not.

        `prompt`, `reuse`, `scope` and `adapter` are the engine's; the adapter is brought where it is missing. Raises
        model_shards.NoRoom, which says when to come again, Stale where less than `reuse` is cached, and what bringing
        an adapter raises.
        """
        tuned = contextlib.nullcontext() if not adapter or self._holding is None else self._holding(adapter)
        async with tuned, self._idle:
            if reuse:
                cached = self.engine.cached(start, end, prompt, scope=scope, adapter=adapter)
                if cached < reuse:
                    raise Stale(cached)
            while True:
                blocks = self.engine.blocks_wanted(
                    start, end, tokens_max, prompt=prompt, reuse=reuse, scope=scope, adapter=adapter
                )
                # A model's context or a wrong layer is told before anybody is parked for it.
                if blocks > self.engine.kv_blocks:
                    break
                room = self._batcher.room(priority, blocks, self.engine.kv_blocks_free, trio.current_time())
                if room.refused_s is not None:
                    free = f"{self.engine.kv_blocks_free} of {self.engine.kv_blocks} are free"
                    raise NoRoom(f"{blocks} KV blocks wanted, {free}", room.refused_s)
                if not room.parked:
                    break
                for guest in room.parked:
                    needed = await trio.to_thread.run_sync(self.engine.park, guest, limiter=self._device)
                    self._batcher.parked(guest, needed)
            self.engine.open(
                session, start, end, tokens_max, prompt=prompt, reuse=reuse, scope=scope, adapter=adapter
            )
            now_s = trio.current_time()
            unread = max(0, prompt_tokens - reuse)
            self._batcher.opened(session, priority, blocks, unread, tokens_max - reuse, now_s)

    async def close(self, session: str, keep: int | None = None) -> None:
        """Free a session's room, at once or between the layers of its running step.

        Of what it computed the first `keep` positions (all, where None) stay in the cache for those after it.
        """
        with trio.CancelScope(shield=True):
            self._forget(self._batcher.closed(session))
            async with self._idle:
                if keep is not None:
                    with contextlib.suppress(ModelError):
                        self.engine.rewind(session, min(keep, self.engine.position(session)))
                self.engine.close(session)
            self._nudge()

    async def settle(self, session: str) -> int:
        """How many positions an open session holds once nothing of it is at work any more; what waited is dropped.
        Raises ModelError."""
        self._forget(self._batcher.dropped(session))
        async with self._idle:
            return self.engine.position(session)

    async def rewind(self, session: str, position: int) -> None:
        """The session goes on at `position`; guesses beyond what it holds are forgotten. Raises ModelError."""
        async with self._idle:
            self.engine.rewind(session, position)

    async def step(self, step: Step) -> StepResult:
        """Run one step, in pieces if it is long, each in some batch, and return its result."""
        found = [await self._part(part) for part in _pieces(step)]
        hidden = [result.hidden for result in found if result.hidden is not None]
        return replace(found[-1], hidden=torch.cat(hidden)) if len(hidden) > 1 else found[-1]

    async def _part(self, step: Step) -> StepResult:
        if step.session not in self._batcher:
            raise StepError(step.session, "is not open")
        if step.count < 1:
            raise StepError(step.session, "holds no positions")
        job = _Job(step)
        rows = 1 if step.window is None else step.window.rows
        number = self._batcher.submitted(step.session, step.certain, trio.current_time(), rows=rows)
        self._jobs[number] = job
        self._nudge()
        try:
            await job.done.wait()
        except trio.Cancelled:
            self._forget(self._batcher.dropped(step.session))
            raise
        finally:
            self._jobs.pop(number, None)
        if job.problem is not None:
            raise job.problem
        if job.result is None:
            raise Abandoned
        return job.result

    async def grammar(self, form: str, text: str) -> Grammar:
        """What keeps one session's answer to a form. Raises ModelError."""
        if self._grammars is None:
            raise GrammarError(form, "this node cannot keep answers to a form")
        make = self._grammars

        def compiled() -> Grammar:
            if self._compiler is None:
                self._compiler = make()
            return self._compiler.compile(form, text)

        return await trio.to_thread.run_sync(compiled)

    def window_rows(self) -> int:
        """How many rows a session's window may have, so that all that decode here fill a pass and not more."""
        return max(1, PASS_ROWS // max(1, self._batcher.decoding()))

    def queue_by_class_s(self) -> tuple[float, ...]:
        """Seconds of prompts that open sessions have still to read here, by priority, the most urgent first."""
        layers = self.engine.span.end - self.engine.span.start
        token_s = (self.prefill_s_per_layer or self.s_per_layer) * layers
        return tuple(token_s * self._batcher.prompt_left(at) for at in (HIGH, NORMAL, BACKGROUND))

    def tokens_yielding(self) -> int:
        """Room over the whole span that background sessions hold and would give to others."""
        layers = self.engine.span.end - self.engine.span.start
        return self._batcher.blocks_yielding() // layers * BLOCK_TOKENS

    def kv_usage(self) -> float:
        """The share of the cache that sessions hold, 0 to 1."""
        return 1.0 - self.engine.kv_tokens_free() / self._kv_tokens if self._kv_tokens else 0.0

    def take_rate(self) -> float:
        """Tokens a second through this span since the last call."""
        now, tokens = time.monotonic(), self.tokens
        since_s, before = now - self._rate_at, self._rate_tokens
        self._rate_at, self._rate_tokens = now, tokens
        return (tokens - before) / since_s if since_s > 0 else 0.0

    def _nudge(self) -> None:
        """Something changed: the loop looks again, a running batch may have to stop."""
        self._stop = self._batcher.stop
        self._wake.set()
        self._wake = trio.Event()

    def _forget(self, numbers: Sequence[int]) -> None:
        """Work that will not run."""
        for number in numbers:
            if number in self._jobs:
                self._jobs[number].done.set()
        self._nudge()

    async def _act(self) -> bool:
        """Do the next thing; whether there was one."""
        chosen = self._batcher.next(self.engine.kv_blocks_free, trio.current_time())
        if isinstance(chosen, Run):
            await self._run_batch(chosen)
        elif isinstance(chosen, Resume):
            await self._resume(chosen.session)
        return chosen is not None

    async def _resume(self, session: str) -> None:
        try:
            await trio.to_thread.run_sync(self.engine.unpark, session, limiter=self._device)
        except (ModelError, OSError) as problem:
            # Its cache cannot be had again: whoever waits for the session hears it, all others go on.
            for number in self._batcher.dropped(session):
                self._jobs[number].fail(StepError(session, f"cannot be brought back: {problem}"))
            return
        self._batcher.resumed(session, trio.current_time())

    async def _run_batch(self, chosen: Run) -> None:
        self._stop = self._batcher.stop
        again = False
        try:
            again = not await self._compute([self._jobs[n] for n in chosen.work if n in self._jobs])
        finally:
            self._batcher.finished(trio.current_time(), again=again)

    async def _compute(self, batch: list[_Job], *, stoppable: bool = True) -> bool:
        """Results for a batch; False where it was stopped for other work and has to run again."""

        def check() -> None:
            if stoppable and self._stop:
                raise Abandoned if self._stop == "abandoned" else _Preempted

        def work() -> tuple[list[StepResult], float]:
            began = time.perf_counter()
            results = self.engine.run([job.step for job in batch], check_cancelled=check)
            return results, time.perf_counter() - began

        try:
            results, took_s = await trio.to_thread.run_sync(work, limiter=self._device)
        except _Preempted:
            return False
        except Exception as problem:  # noqa: BLE001 - whatever the engine raises belongs to the waiting sessions
            if len(batch) == 1 or isinstance(problem, Abandoned):
                for job in batch:
                    job.fail(problem)
                return True
            for job in batch:  # each by itself: only the guilty fails
                await self._compute([job], stoppable=False)
            return True
        self._note_time([job.step.certain for job in batch], took_s)
        self.tokens += sum(len(job.step.kept) for job in batch)
        for job, result in zip(batch, results, strict=True):
            job.result = result
            job.done.set()
        return True

    def _note_time(self, counts: Sequence[int], took_s: float) -> None:
        """A batch of single tokens tells what a token waits for a layer, however many share it; a piece of a prompt
        what a prompt's token costs."""
        layers = self.engine.span.end - self.engine.span.start
        if max(counts) == 1:
            self.s_per_layer = _smoothed(self.s_per_layer, took_s / layers)
            self._best_s = min(self._best_s or self.s_per_layer, self.s_per_layer)
        else:
            self.prefill_s_per_layer = _smoothed(self.prefill_s_per_layer, took_s / (sum(counts) * layers))
        self.tokens += sum(counts)

    async def _look_idle(self) -> None:
        while True:
            before = self.tokens
            await trio.sleep(IDLE_S)
            if self.tokens == before and not self._batcher.waiting():
                await self._measure_anew()

    async def _measure_anew(self) -> None:
        """Nobody asks a node that said it was slow: without work it finds out by itself whether it still is."""
        if self.s_per_layer <= self._best_s * SLOWED:
            return
        async with self._idle:
            try:
                now_s = await trio.to_thread.run_sync(warm_up, self.engine, 2, limiter=self._device)
            except ModelError:
                return
        if now_s < self.s_per_layer:
            self.prefill_s_per_layer *= now_s / self.s_per_layer
            self.s_per_layer = now_s


def _smoothed(before: float, observed: float) -> float:
    return before + (observed - before) * SMOOTHING if before else observed


def warm_up(engine: Engine, steps: int = 4) -> float:
    """Run a few decode steps and return seconds a step and layer, so that the first plan and chain use measured times.

    The fastest step counts: the first ones pay for the kernels' own set-up. Called on the worker thread.
    """
    span, best_s = engine.span, float("inf")
    first = span.start == 0
    engine.open("warm-up", span.start, span.end, steps)
    try:
        for position in range(steps):
            hidden = (
                None if first else torch.zeros(1, span.config.hidden, dtype=span.dtype, device=span.device)
            )
            step = Step("warm-up", position, (0,) if first else None, hidden, None)
            began = time.perf_counter()
            engine.run([step])
            best_s = min(best_s, time.perf_counter() - began)
    finally:
        engine.close("warm-up")
    return best_s / (span.end - span.start)


def warm_up_prompt(engine: Engine, times: int = 2) -> float:
    """Run a piece of a prompt a few times and return seconds a token and layer; 0 where there is no room for a piece.

    Without it a node that computes fast but decodes slowly would hardly be given a prompt, and stay unknown.
    """
    span, best_s = engine.span, float("inf")
    count = min(PIECE_TOKENS, span.config.context_tokens)
    if engine.kv_tokens_free() < count:
        return 0.0
    tokens = (0,) * count if span.start == 0 else None
    engine.open("warm-up", span.start, span.end, count)
    try:
        for _ in range(times):
            hidden = None
            if tokens is None:
                hidden = torch.zeros(count, span.config.hidden, dtype=span.dtype, device=span.device)
            began = time.perf_counter()
            engine.run([Step("warm-up", 0, tokens, hidden, None)])
            best_s = min(best_s, time.perf_counter() - began)
            engine.rewind("warm-up", 0)
    finally:
        engine.close("warm-up")
    return best_s / (count * (span.end - span.start))


def _pieces(step: Step) -> list[Step]:
    """The step cut where pieces of a prompt end, whatever came as one message: what is computed together must depend on
    positions alone. A window's rows are computed as if alone. Only the last part samples, and pools what is no sum."""
    if step.window is not None or step.position % PIECE_TOKENS + step.count <= PIECE_TOKENS:
        return [step]
    found, first = [], 0
    while first < step.count:
        at = step.position + first
        end = min(step.count, first + PIECE_TOKENS - at % PIECE_TOKENS)
        last = end == step.count
        found.append(
            Step(
                step.session,
                at,
                step.tokens[first:end] if step.tokens is not None else None,
                step.hidden[first:end] if step.hidden is not None else None,
                step.sample if last else None,
                step.pool if last or step.pool == "mean" else None,
            )
        )
        first = end
    return found
