"""The bridge between trio and the engine: one worker thread a device, steps gathered into batches.

Sessions hand in steps and wait for results; whatever is waiting when the device falls free is run together, background
work only where nothing else waits, and it stops between two layers when something else comes. It measures what steps
take and knows nothing of networks or of what a step means.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import trio

from model_shards import Engine, ModelError, Step, StepResult
from node.serve.prefixes import Held
from node.serve.protocol import BACKGROUND, HIGH, NORMAL, PIECE_TOKENS

IDLE_S = 5.0
"""After so long without work a node that got slow measures itself anew."""
SLOWED = 1.3
SMOOTHING = 0.2


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
    priority: int = NORMAL
    done: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None
    problem: Exception | None = None


@dataclass(slots=True)
class _Load:
    """What an open session holds and has yet to read: `tokens` of room over the whole span, prompt tokens to come."""

    priority: int
    tokens: int
    prompt_left: int


class Compute:
    """Runs an engine's steps for many sessions, one batch at a time, on a worker thread.

    `batch_tokens_max` bounds one batch, so that a long prompt delays running decodes by at most that many tokens.
    """

    def __init__(
        self,
        engine: Engine,
        device: trio.CapacityLimiter,
        *,
        batch_tokens_max: int = 512,
        s_per_layer: float = 0.0,
    ) -> None:
        self.engine = engine
        self._device = device
        self._batch_tokens_max = batch_tokens_max
        self._waiting: deque[_Job] = deque()
        self._wake = trio.Event()
        self._idle = trio.Lock()
        self._closed: set[str] = set()
        self._rate_at, self._rate_tokens = time.monotonic(), 0
        self._loads: dict[str, _Load] = {}
        self._background_runs = self._preempt = False
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
                    while not self._waiting:
                        await self._wake.wait()
                        self._wake = trio.Event()
                    async with self._idle:
                        await self._run_batch(self._take())
        finally:
            for job in self._waiting:
                job.problem = Abandoned()
                job.done.set()

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
    ) -> None:
        """Reserve room for a session over layers [start, end), of `prompt_tokens` and up to `tokens_max` in all.

        `prompt`, `reuse` and `scope` are the engine's. Raises model_shards.NoRoom, and Stale where less than `reuse` is
        cached.
        """
        async with self._idle:
            self._closed.discard(session)
            if reuse and (cached := self.engine.cached(start, end, prompt, scope=scope)) < reuse:
                raise Stale(cached)
            self.engine.open(session, start, end, tokens_max, prompt=prompt, reuse=reuse, scope=scope)
            layers = self.engine.span.end - self.engine.span.start
            room = -(-tokens_max * (end - start) // layers)
            self._loads[session] = _Load(priority, room, max(0, prompt_tokens - reuse))

    async def close(self, session: str, keep: int | None = None) -> None:
        """Free a session's room, at once or between the layers of its running step.

        Of what it computed the first `keep` positions (all, where None) stay in the cache for those after it.
        """
        with trio.CancelScope(shield=True):
            self._closed.add(session)
            self._loads.pop(session, None)
            async with self._idle:
                self._closed.discard(session)
                if keep is not None:
                    with contextlib.suppress(ModelError):
                        self.engine.rewind(session, min(keep, self.engine.position(session)))
                self.engine.close(session)

    async def step(self, step: Step, priority: int = NORMAL) -> StepResult:
        """Run one step in some batch and return its result."""
        job = _Job(step, priority)
        self._waiting.append(job)
        self._wake.set()
        if priority < BACKGROUND and self._background_runs:
            self._preempt = True
        try:
            await job.done.wait()
        except trio.Cancelled:
            self._closed.add(step.session)
            raise
        if job.problem is not None:
            raise job.problem
        if job.result is None:
            raise Abandoned
        return job.result

    def queue_by_class_s(self) -> tuple[float, ...]:
        """Seconds of prompts that open sessions have still to read here, by priority, the most urgent first."""
        layers = self.engine.span.end - self.engine.span.start
        token_s = (self.prefill_s_per_layer or self.s_per_layer) * layers
        return tuple(
            token_s * sum(load.prompt_left for load in self._loads.values() if load.priority == priority)
            for priority in (HIGH, NORMAL, BACKGROUND)
        )

    def tokens_yielding(self) -> int:
        """Room over the whole span that background sessions hold and would give to others."""
        return sum(load.tokens for load in self._loads.values() if load.priority == BACKGROUND)

    def kv_usage(self) -> float:
        """The share of the cache that sessions hold, 0 to 1."""
        return 1.0 - self.engine.kv_tokens_free() / self._kv_tokens if self._kv_tokens else 0.0

    def take_rate(self) -> float:
        """Tokens a second through this span since the last call."""
        now, tokens = time.monotonic(), self.tokens
        since_s, before = now - self._rate_at, self._rate_tokens
        self._rate_at, self._rate_tokens = now, tokens
        return (tokens - before) / since_s if since_s > 0 else 0.0

    def _take(self) -> list[_Job]:
        """The next batch: the urgent before others, decodes before prompt pieces, one step a session, within the token
        bound; background work only by itself."""
        order = sorted(self._waiting, key=lambda job: (job.priority, _tokens(job.step) > 1))
        if order and order[0].priority < BACKGROUND:
            order = [job for job in order if job.priority < BACKGROUND or job.step.session in self._closed]
        batch: list[_Job] = []
        sessions: set[str] = set()
        tokens = 0
        for job in order:
            if job.step.session in self._closed:
                self._waiting.remove(job)
                job.done.set()
                continue
            size = _tokens(job.step)
            if job.step.session in sessions or (batch and tokens + size > self._batch_tokens_max):
                continue
            sessions.add(job.step.session)
            tokens += size
            batch.append(job)
            self._waiting.remove(job)
        return batch

    async def _run_batch(self, batch: list[_Job]) -> None:
        if not batch:
            return
        sessions = {job.step.session for job in batch}
        self._background_runs = all(job.priority == BACKGROUND for job in batch)
        self._preempt = False

        def check() -> None:
            if sessions <= self._closed:
                raise Abandoned
            if self._preempt:
                raise _Preempted

        def work() -> tuple[list[StepResult], float]:
            began = time.perf_counter()
            results = self.engine.run([job.step for job in batch], check_cancelled=check)
            return results, time.perf_counter() - began

        try:
            results, took_s = await trio.to_thread.run_sync(work, limiter=self._device)
        except _Preempted:
            self._waiting.extendleft(reversed(batch))
            return
        except Exception as problem:  # noqa: BLE001 - whatever the engine raises belongs to the waiting sessions
            await self._settle(batch, problem)
            return
        finally:
            self._background_runs = False
        self._note_time(batch, took_s)
        for job, result in zip(batch, results, strict=True):
            job.result = result
            job.done.set()

    async def _settle(self, batch: list[_Job], problem: Exception) -> None:
        """A failed batch: alone, a job owns the problem; together, each runs by itself: only the guilty fails."""
        if len(batch) == 1:
            batch[0].problem = problem
            batch[0].done.set()
            return
        for job in batch:
            await self._run_batch([job])

    def _note_time(self, batch: Sequence[_Job], took_s: float) -> None:
        """A batch of single tokens tells what a token waits for a layer, however many share it; one with prompt pieces
        what a prompt's token costs."""
        counts = [_tokens(job.step) for job in batch]
        layers = self.engine.span.end - self.engine.span.start
        if max(counts) == 1:
            self.s_per_layer = _smoothed(self.s_per_layer, took_s / layers)
            self._best_s = min(self._best_s or self.s_per_layer, self.s_per_layer)
        else:
            self.prefill_s_per_layer = _smoothed(self.prefill_s_per_layer, took_s / (sum(counts) * layers))
        for job, count in zip(batch, counts, strict=True):
            load = self._loads.get(job.step.session)
            if load is not None:
                load.prompt_left = max(0, load.prompt_left - count)
        self.tokens += sum(counts)

    async def _look_idle(self) -> None:
        while True:
            before = self.tokens
            await trio.sleep(IDLE_S)
            if self.tokens == before and not self._waiting:
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


def _tokens(step: Step) -> int:
    if step.tokens is not None:
        return len(step.tokens)
    return 0 if step.hidden is None else int(step.hidden.shape[0])
