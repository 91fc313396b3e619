"""The bridge between trio and the engine: one worker thread a device, steps gathered into batches.

Sessions hand in steps and wait for results; whatever is waiting when the device falls free is run together. It knows
nothing of networks or of what a step means.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
import trio

from model_shards import Engine, Step, StepResult


class Abandoned(Exception):
    """Every session of the running batch was closed: the engine stops between two layers."""


@dataclass(slots=True)
class _Job:
    step: Step
    done: trio.Event = field(default_factory=trio.Event)
    result: StepResult | None = None
    problem: Exception | None = None


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
        s_per_token_layer: float = 0.0,
    ) -> None:
        self.engine = engine
        self._device = device
        self._batch_tokens_max = batch_tokens_max
        self._waiting: deque[_Job] = deque()
        self._wake = trio.Event()
        self._idle = trio.Lock()
        self._closed: set[str] = set()
        self._rate_at, self._rate_tokens = time.monotonic(), 0
        self.tokens = 0
        self.s_per_token_layer = s_per_token_layer

    async def run(self) -> None:
        """Serve batches until cancelled."""
        try:
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

    async def open(self, session: str, start: int, end: int, tokens_max: int) -> None:
        """Reserve room for a session over layers [start, end). Raises model_shards.NoRoom."""
        async with self._idle:
            self._closed.discard(session)
            self.engine.open(session, start, end, tokens_max)

    async def close(self, session: str) -> None:
        """Free a session's room, at once or between the layers of its running step."""
        with trio.CancelScope(shield=True):
            self._closed.add(session)
            async with self._idle:
                self._closed.discard(session)
                self.engine.close(session)

    async def step(self, step: Step) -> StepResult:
        """Run one step in some batch and return its result."""
        job = _Job(step)
        self._waiting.append(job)
        self._wake.set()
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

    def queue_s(self) -> float:
        """How long a new step would wait, from the recent time a token and what is waiting."""
        tokens = sum(_tokens(job.step) for job in self._waiting)
        return tokens * self.s_per_token_layer * (self.engine.span.end - self.engine.span.start)

    def take_rate(self) -> float:
        """Tokens a second through this span since the last call."""
        now, tokens = time.monotonic(), self.tokens
        since_s, before = now - self._rate_at, self._rate_tokens
        self._rate_at, self._rate_tokens = now, tokens
        return (tokens - before) / since_s if since_s > 0 else 0.0

    def _take(self) -> list[_Job]:
        """The next batch: decodes before prompt chunks, one step a session, within the token bound."""
        order = sorted(self._waiting, key=lambda job: _tokens(job.step) > 1)
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

        def check() -> None:
            if sessions <= self._closed:
                raise Abandoned

        def work() -> tuple[list[StepResult], float]:
            began = time.perf_counter()
            results = self.engine.run([job.step for job in batch], check_cancelled=check)
            return results, time.perf_counter() - began

        try:
            results, took_s = await trio.to_thread.run_sync(work, limiter=self._device)
        except Exception as problem:  # noqa: BLE001 - whatever the engine raises belongs to the waiting sessions
            await self._settle(batch, problem)
            return
        tokens = sum(_tokens(job.step) for job in batch)
        self._note_time(tokens, took_s)
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

    def _note_time(self, tokens: int, took_s: float) -> None:
        layers = self.engine.span.end - self.engine.span.start
        observed = took_s / (tokens * layers)
        self.s_per_token_layer += (observed - self.s_per_token_layer) * 0.2
        self.tokens += tokens


def warm_up(engine: Engine, steps: int = 4) -> float:
    """Run a few decode steps and return seconds a token and layer, so that the first plan and chain use measured times.

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
