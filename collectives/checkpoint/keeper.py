"""Checkpoints beside the work: the newest state that was offered is written by a thread, and old ones are let go.

A state that nobody has begun to write when a newer one is offered is not written at all, so that a slow disk holds
nobody up. It does not know when a state is worth keeping.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from collectives.checkpoint import files
from collectives.checkpoint.files import Loaded, Meta
from collectives.errors import CheckpointProblem, LocalFault
from collectives.state import Snapshot

log = logging.getLogger("shoal.checkpoint")


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest `last` stay, and of the others those whose epoch is a multiple of `every` (0: none)."""

    last: int = 3
    every: int = 0

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise LocalFault(f"Retention: last must be at least 1 and every at least 0, got {self}")

    def surplus(self, epochs: Sequence[int]) -> list[int]:
        """Which places in `epochs`, newest first, hold what may go."""
        kept_for_good = {e for e in epochs if self.every and e % self.every == 0}
        return [place for place, e in enumerate(epochs) if place >= self.last and e not in kept_for_good]


@dataclass(frozen=True, slots=True)
class Saved:
    """What was written last, and how long it took (seconds)."""

    epoch: int
    path: Path
    took_s: float


class _Stopped(Exception):
    """The keeper is being left: the writer gives up, and what it has written goes."""


class Keeper:
    """Of one folder, which no other writes to. `saved` and `problem` say how the last write ended; `skipped` counts
    states that a newer one overtook."""

    def __init__(self, root: Path, retention: Retention | None = None) -> None:
        self.root = root
        self.saved: Saved | None = None
        self.problem: CheckpointProblem | None = None
        self.skipped = 0
        self._retention = retention or Retention()
        self._waiting: tuple[Snapshot, Meta] | None = None
        self._writing = False
        self._changed = trio.Event()
        self._stop = threading.Event()

    def newest(self) -> Loaded | None:
        """The newest whole checkpoint; what a killed writer left is removed first. Before `run`."""
        files.clean(self.root)
        return files.newest(self.root)

    def offer(self, snapshot: Snapshot, meta: Meta) -> None:
        """Have this written as soon as the disk is free, unless a newer one comes before. Returns at once."""
        if self._waiting is not None:
            self.skipped += 1
        self._waiting = snapshot, dict(meta)
        self._wake()

    async def flush(self) -> None:
        """Until everything offered is on the disk. Raises CheckpointProblem if the last could not be written."""
        while self._waiting is not None or self._writing:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        if self.problem is not None:
            raise self.problem

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled. A write under way is then given up, and leaves no trace."""
        task_status.started()
        try:
            while True:
                if self._waiting is None:
                    await self._changed.wait()
                    continue
                (snapshot, meta), self._waiting, self._writing = self._waiting, None, True
                try:
                    work = partial(self._write, snapshot, meta)
                    self.saved = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
                    self.problem = None
                except CheckpointProblem as problem:
                    log.error("the state of epoch %s is not on this disk: %s", snapshot.epoch, problem)
                    self.problem = problem
                finally:
                    self._writing = False
                    self._wake()
        finally:
            self._stop.set()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _write(self, snapshot: Snapshot, meta: Meta) -> Saved:
        began_s = time.monotonic()
        path = files.write(self.root, snapshot, meta, self._between)
        prune(self.root, self._retention, keep=path)
        return Saved(snapshot.epoch, path, time.monotonic() - began_s)

    def _between(self) -> None:
        if self._stop.is_set():
            raise _Stopped


def prune(root: Path, retention: Retention, keep: Path) -> None:
    """Remove what need not stay; never `keep`. Raises CheckpointProblem."""
    paths = files.folders(root)
    for place in retention.surplus([files.epoch_of(path) for path in paths]):
        if paths[place] != keep:
            try:
                files.remove(paths[place])
            except OSError as error:
                raise CheckpointProblem(
                    paths[place], f"cannot be removed: {error.strerror or error}"
                ) from error
