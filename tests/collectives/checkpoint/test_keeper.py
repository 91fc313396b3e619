"""Checkpoints are written beside the work, and old ones go."""

import threading

import pytest
import torch
import trio

from collectives import Snapshot
from collectives.checkpoint import Keeper, Retention, files
from collectives.errors import CheckpointProblem, LocalFault


def at(epoch):
    return Snapshot.take({"x": torch.full((4,), float(epoch))}, epoch)


def epochs(root):
    return [files.epoch_of(path) for path in files.folders(root)]


async def test_the_newest_stay_and_every_tenth(tmp_path):
    keeper = Keeper(tmp_path, Retention(last=2, every=10))
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        for epoch in range(8, 24):
            keeper.offer(at(epoch), {"epoch": epoch})
            await keeper.flush()
        nursery.cancel_scope.cancel()
    assert epochs(tmp_path) == [23, 22, 20, 10]
    assert keeper.saved.epoch == 23
    assert Keeper(tmp_path).newest().meta == {"epoch": 23}


async def test_what_a_slow_disk_has_not_begun_is_overtaken(tmp_path):
    keeper = Keeper(tmp_path)
    for epoch in range(1, 6):
        keeper.offer(at(epoch), {})
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        await keeper.flush()
        nursery.cancel_scope.cancel()
    assert epochs(tmp_path) == [5]
    assert keeper.skipped == 4


async def test_a_failed_write_is_told_and_the_next_one_works(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(files.os, "fsync", _full)
        async with trio.open_nursery() as nursery:
            await nursery.start(keeper.run)
            keeper.offer(at(1), {})
            with pytest.raises(CheckpointProblem, match="No space left"):
                await keeper.flush()
            broken.undo()
            keeper.offer(at(2), {})
            await keeper.flush()
            nursery.cancel_scope.cancel()
    assert keeper.problem is None
    assert epochs(tmp_path) == [2]


def _full(number):
    raise OSError(28, "No space left on device")


async def test_a_keeper_that_is_left_gives_up_and_leaves_no_trace(tmp_path, monkeypatch):
    began, go_on = trio.Event(), []
    token = trio.lowlevel.current_trio_token()
    real = Keeper._between

    def between(self):
        if not go_on:
            go_on.append(True)
            trio.from_thread.run_sync(began.set, trio_token=token)
            self._stop.wait(10)
        real(self)

    tidied, rmtree = threading.Event(), files.shutil.rmtree

    def tidy(path, **how):
        rmtree(path, **how)
        tidied.set()

    monkeypatch.setattr(files.shutil, "rmtree", tidy)
    monkeypatch.setattr(Keeper, "_between", between)
    keeper = Keeper(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        keeper.offer(at(1), {})
        await began.wait()
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(tidied.wait, 10)  # the thread does it by itself
    assert not any(tmp_path.iterdir())


async def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".new-000000000009-0123456789abcdef-01020304").mkdir(parents=True)
    (tmp_path / ".old-000000000001-0123456789abcdef-01020304").mkdir()
    files.write(tmp_path, at(3), {})
    assert Keeper(tmp_path).newest().epoch == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": -1}])
def test_a_retention_that_cannot_be_is_refused(wrong):
    with pytest.raises(LocalFault):
        Retention(**wrong)
