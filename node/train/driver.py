"""One member in one generation of a run: the inner loop on a thread, rounds beside it, what they decide taken up.

Between two slices of inner steps the tensors belong to the event loop, which makes offers and merges means. Nothing
trained is lost: what a round did not count goes into the next offer. It knows rounds and the worker, but neither the
mesh nor files: `on_round` hears of every committed round, with the state that all its members hold.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import trio

from collectives import Behind, Diverged, Excluded, NoQuorum, Reduced, RoundFailed, Run, Snapshot
from collectives.codecs import codec
from collectives.outer import Offer, Outer, OuterError
from collectives.reduce.feedback import Feedback
from collectives.reduce.layout import Layout
from collectives.state_rpc import aside
from node.train.recipe import Recipe
from node.train.worker import Worker

log = logging.getLogger("shoal.train")
T = TypeVar("T")
SLICE_S = 0.05
ORPHAN_S = 4.0
FETCH_S = 60.0
ROUND_S = 120.0
EPOCH_KEY, TOKENS_KEY = "run.epoch", "run.tokens"
"""Beside the parameters in the state that members share: outer steps and tokens since the run was created."""


class Orphaned(Exception):
    """Too few members of this generation are left to decide anything, or nobody gives its state."""


@dataclass(slots=True)
class Progress:
    """What there is to see; sums since this member started. Seconds, bytes, tokens."""

    loss: float = math.nan
    val_loss: float = math.nan
    tokens: float = 0.0
    computing_s: float = 0.0
    waiting_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    rounds: int = 0
    failed: int = 0
    members: tuple[str, ...] = ()
    problem: str = ""
    began_s: float = field(default_factory=time.monotonic)

    @property
    def computing(self) -> float:
        """The share of the time spent on inner steps."""
        both = self.computing_s + self.waiting_s
        return self.computing_s / both if both else 0.0

    @property
    def tokens_per_s(self) -> float:
        both = self.computing_s + self.waiting_s
        return self.tokens / both if both else 0.0


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A committed round, as this member saw it."""

    tag: str
    reduced: Reduced
    snapshot: Snapshot
    epoch: int
    loss: float


class Driver:
    """`mates()`: who else is there and takes part in this generation. `snapshots`: by tag the last
    state that is shared with them."""

    def __init__(
        self,
        run: Run,
        worker: Worker,
        outer: Outer,
        recipe: Recipe,
        progress: Progress,
        mates: Callable[[], set[str]],
        on_round: Callable[[RoundDone], Awaitable[None]],
    ) -> None:
        self.run = run
        self.outer = outer
        self.worker = worker
        self.progress = progress
        self.stuck = False
        self.snapshots: dict[str, Snapshot] = {}
        self._recipe = recipe
        self._mates = mates
        self._on_round = on_round
        self._base = dict.fromkeys(outer.tags, 0)
        self._tokens = dict.fromkeys(outer.tags, 0.0)
        self._feedback: dict[str, Feedback] = {}
        self._tensors = trio.Lock()
        self._nbytes = 4 * worker.model.count
        self._settled = trio.Event()
        self._losses: list[float] = []
        self._nursery: trio.Nursery | None = None
        self._gradients: dict[str, list[torch.Tensor]] = {}

    # ---- to begin with

    async def found(self, tokens: Mapping[str, float]) -> None:
        """Publish the state that `outer` has as the beginning of this generation; `tokens` by tag."""
        for tag in self.outer.tags:
            self._base[tag] = self.outer.epoch(tag)
            self._tokens[tag] = tokens.get(tag, 0.0)
            self.snapshots[tag] = await self._publish(tag, 0)

    async def join(self, *, keep: bool) -> None:
        """Take up what the members hold. Raises Orphaned where nobody gives it."""
        for tag in self.outer.tags:
            await self._fetch(tag, keep=keep, counted=None)

    @property
    def tokens(self) -> float:
        """That the state has seen since the run was created."""
        return max(self._tokens.values())

    @property
    def rounds(self) -> int:
        """Of each fragment, in the whole run."""
        return self._recipe.inner.steps // self.outer.strategy.inner_steps

    @property
    def done(self) -> bool:
        """Whether every fragment has had its last round: at the same epoch for all members."""
        return all(self.outer.epoch(tag) >= self.rounds for tag in self.outer.tags)

    def _due(self) -> list[str]:
        return [tag for tag in self.outer.due() if self.outer.epoch(tag) < self.rounds]

    # ---- to go on

    async def train(self) -> None:
        """Until the run's steps are done. Raises Orphaned, NonFinite."""
        try:
            await self._train()
        finally:
            for tag in self.outer.tags:
                self.outer.failed(tag)  # what was on its way belongs to the next generation's offers

    async def _train(self) -> None:
        async with trio.open_nursery() as self._nursery:
            nursery = self._nursery
            while not self.done:
                for tag in self._due():
                    offer = await self.between(partial(self.outer.offer, tag, self._gradients.pop(tag, None)))
                    nursery.start_soon(self._round, offer)
                if self.outer.waiting:
                    self._settled = trio.Event()
                    began_s = time.monotonic()
                    await self._settled.wait()
                    self.progress.waiting_s += time.monotonic() - began_s
                else:
                    await self._train_on()

    async def _train_on(self) -> None:
        waited_s = time.monotonic()
        async with self._tensors:
            began_s = time.monotonic()
            self.progress.waiting_s += began_s - waited_s
            await trio.to_thread.run_sync(self._slice)  # to its end: nobody else may touch the tensors before
            self.progress.computing_s += time.monotonic() - began_s
        if self._losses:
            self.progress.loss = self._losses[-1]

    def _slice(self) -> None:
        """Some inner steps, on a thread."""
        outer, until_s = self.outer, time.monotonic() + SLICE_S
        while True:
            if outer.strategy.gradients:
                names = tuple(name for tag in outer.tags for name in outer.names(tag))
                report, gradients = self.worker.gradient_step(names)
                by_name = dict(zip(names, gradients, strict=True))
                self._gradients = {tag: [by_name[name] for name in outer.names(tag)] for tag in outer.tags}
            else:
                report = self.worker.step(outer.clock)
            outer.trained(report.tokens, self.worker.nominal(report, self._recipe.outer))
            self.progress.tokens += report.tokens
            self._losses.append(report.loss)
            if self._due() or self.done or time.monotonic() >= until_s:
                return

    # ---- rounds

    async def _round(self, offer: Offer) -> None:
        tag = offer.tag
        try:
            async with self.run.round(tag, deadline_s=ROUND_S) as attempt:
                feedback = self._feedback_of(tag, offer)
                reduced = await attempt.reduce(offer.tensors, offer.weight, feedback=feedback)
            await self._take(reduced)
            self.stuck = False
        except (Behind, Diverged) as problem:
            self._note(problem)
            await self._catch_up(offer, problem)
        except RoundFailed as problem:
            self._note(problem)
            async with self._tensors:
                self.outer.failed(tag)
            self._settled.set()
            await self._late(tag)
            if isinstance(problem, NoQuorum):
                await self._no_quorum(problem)
            elif isinstance(problem, Excluded) and problem.why == "late":
                await self._offer_again(tag)
        finally:
            self._settled.set()

    def _note(self, problem: RoundFailed) -> None:
        log.info("a round gave no result here: %s", problem)
        self.progress.failed += 1
        self.progress.problem = str(problem)

    async def _no_quorum(self, problem: NoQuorum) -> None:
        """Where all who are missing are gone, not only slow, this generation ends."""
        self.stuck = True
        await trio.sleep(ORPHAN_S)
        if not problem.missing or self._mates() & set(problem.missing):
            return
        raise Orphaned(str(problem))

    def _feedback_of(self, tag: str, offer: Offer) -> Feedback | None:
        if not self.outer.strategy.feedback:
            return None
        if tag not in self._feedback:
            self._feedback[tag] = Feedback(Layout.of(list(offer.tensors)))
        return self._feedback[tag]

    async def _take(self, reduced: Reduced) -> None:
        tag = reduced.tag
        mine = next((m.weight for m in reduced.members if m.peer == self.run.me), None)
        epoch = self._base[tag] + reduced.epoch
        async with self._tensors:
            await aside(self._nbytes, lambda: self.outer.take(tag, epoch, reduced.tensors, weight=mine))
            self._tokens[tag] += reduced.weight
            self.snapshots[tag] = snapshot = await self._publish(tag, reduced.epoch)
        progress = self.progress
        progress.rounds += 1
        progress.members = reduced.peers
        progress.problem = ""
        progress.bytes_sent += reduced.bytes_sent
        progress.bytes_received += reduced.bytes_received
        losses, self._losses = self._losses, []
        loss = sum(losses) / len(losses) if losses else progress.loss
        await self._on_round(RoundDone(tag, reduced, snapshot, self.outer.epoch(tag), loss))

    async def _late(self, tag: str) -> int:
        """Results that were decided after an error was told here; how many there were."""
        found = self.run.catch_up(tag)
        for reduced in found:
            await self._take(reduced)
        return len(found)

    async def _catch_up(self, offer: Offer, problem: RoundFailed) -> None:
        tag = offer.tag
        async with self._tensors:
            self.outer.failed(tag)
        feedback = self._feedback.get(tag)
        if await self._late(tag):
            if feedback is not None and getattr(problem, "counted", None):
                feedback.commit(offer.tensors, codec(self.run.config.codec))
            if self.outer.epoch(tag) - self._base[tag] >= self.run.committed(tag):
                await self._offer_again(tag)
                return
        counted = offer.weight if getattr(problem, "counted", None) else None
        await self._fetch(tag, keep=True, counted=counted)
        await self._offer_again(tag)

    async def _offer_again(self, tag: str) -> None:
        """What was too late for its round goes into the next one, and need not wait for this member's next turn."""
        if self.outer.strategy.gradients or not self.outer.untold(tag) or self._nursery is None or self.done:
            return
        with contextlib.suppress(OuterError):  # its next turn has come meanwhile
            self._nursery.start_soon(self._round, await self.between(partial(self.outer.offer, tag)))

    async def _fetch(self, tag: str, *, keep: bool, counted: float | None) -> None:
        snapshot: Snapshot | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._while_somebody_is_there, nursery.cancel_scope)
            with contextlib.suppress(NoQuorum):
                snapshot = await self.run.fetch_state(tag, deadline_s=FETCH_S)
            nursery.cancel_scope.cancel()
        if snapshot is None:
            raise Orphaned("nobody is left who gives the newest state")
        total = int(snapshot.tensors[EPOCH_KEY])
        async with self._tensors:
            self._base[tag] = total - snapshot.epoch
            self._tokens[tag] = float(snapshot.tensors[TOKENS_KEY])
            self.snapshots[tag] = snapshot
            load = partial(self.outer.load, tag, snapshot.tensors, total, keep=keep, counted=counted)
            await aside(self._nbytes, load)

    async def _while_somebody_is_there(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` once this member has been the only one for a while."""
        alone_s = 0.0
        while alone_s < ORPHAN_S:
            await trio.sleep(ORPHAN_S / 8)
            alone_s = 0.0 if self._mates() else alone_s + ORPHAN_S / 8
        scope.cancel()

    async def _publish(self, tag: str, epoch: int) -> Snapshot:
        total = torch.tensor(self.outer.epoch(tag))
        tokens = torch.tensor(self._tokens[tag], dtype=torch.float64)
        state = {**self.outer.state(tag), EPOCH_KEY: total, TOKENS_KEY: tokens}
        return await self.run.publish(state, epoch, tag)

    async def evaluate(self, windows: torch.Tensor) -> None:
        """The loss on these windows, of this member's parameters as they are, into `progress`."""
        async with self._tensors:
            self.progress.val_loss = await trio.to_thread.run_sync(self.worker.evaluate, windows)

    async def between(self, work: Callable[[], T]) -> T:
        """What `work` makes of worker and tensors, between two slices of training."""
        async with self._tensors:
            return await aside(self._nbytes, work)
