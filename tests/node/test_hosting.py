"""What a node holds on its devices: never more than it lends, one span a model and device, with measured times."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trio

from model_shards import CheckpointIndex, ModelConfig, Step
from node import embedded, hosting
from node.adverts import host_name
from node.config import DaemonConfig
from node.hardware import DeviceFigures
from node.hosting import Host
from node.offers import model_advert
from p2p import RpcRefusal
from scheduler import memory_needed

ONE, TWO = "ab" * 32, "cd" * 32


@pytest.fixture(scope="module")
def files():
    torch.set_num_threads(1)
    directory = embedded.path()
    return SimpleNamespace(
        tokenizer=None,
        directory=directory,
        config=ModelConfig.from_dir(directory),
        index=CheckpointIndex.open(directory),
    )


@pytest.fixture
def models(files):
    settings = DaemonConfig(Path("unused"), concurrency=1)
    one = model_advert(
        files.config, files.index, settings, name="one", manifest_id=ONE, created_s=1, copies=1
    )
    one = replace(one, context_tokens=128)
    return one, replace(one, name="two", manifest_id=TWO)


class Library:
    """Has everything at once."""

    def __init__(self, files):
        self._files = files

    async def files(self, manifest_id):
        return self._files

    async def weights(self, files, start, end, progress):
        progress(1, 1)
        return 1


class Watched:
    """A host, what it published, and how full its devices were each time it said something."""

    def __init__(self, files, *memory_bytes):
        figures = [DeviceFigures("cpu", size, 1e12, 1e11) for size in memory_bytes]
        self.host = Host(Library(files), figures, self._publish)
        self.said = []
        self.loaded = []
        self._news = trio.Event()

    def _publish(self, name, advert):
        self.said.append((name, None if advert is None else advert.state))
        self.loaded.append(
            sum(memory_needed(h.model.shape(), h.start, h.end) for h in self.host.hostings.values())
        )
        self._news.set()
        self._news = trio.Event()

    async def until(self, name, state):
        with trio.fail_after(30):
            while (name, state) not in self.said:
                await self._news.wait()


@asynccontextmanager
async def hosted(files, *memory_bytes):
    watched = Watched(files, *memory_bytes)
    async with trio.open_nursery() as nursery:
        await nursery.start(watched.host.run)
        yield watched
        nursery.cancel_scope.cancel()


async def test_a_span_that_takes_the_place_of_another_model_s_waits_until_that_is_gone(
    files, models, monkeypatch
):
    monkeypatch.setattr(hosting, "DROP_AFTER_S", 0.2)
    one, two = models
    size = memory_needed(one.shape(), 2, 5)
    async with hosted(files, int(1.5 * size)) as watched:
        watched.host.want(one, 0, (2, 5), 1)
        await watched.until(ONE, "ready")
        watched.host.want(one, 0, None, 2)
        watched.host.want(two, 0, (2, 5), 1)
        await watched.until(TWO, "ready")
        assert watched.said.index((ONE, None)) < watched.said.index((TWO, "ready"))
        assert max(watched.loaded) == size


async def test_each_device_holds_a_span_of_its_own_and_sessions_find_it(files, models):
    one, _ = models
    async with hosted(files, 1 << 30, 1 << 30) as watched:
        watched.host.want(one, 0, (2, 4), 1)
        watched.host.want(one, 1, (4, 6), 1)
        for device in (0, 1):
            await watched.until(host_name(ONE, device), "ready")
        host = watched.host
        assert host.hosts(ONE)
        assert not host.hosts(TWO)
        assert host.compute(ONE, 2, 4) is not host.compute(ONE, 4, 6)
        assert host.compute(ONE, 5, 6) is host.compute(ONE, 4, 6)
        for manifest_id, start, end in ((ONE, 3, 5), (ONE, 0, 1), (TWO, 2, 4)):
            with pytest.raises(RpcRefusal):
                host.compute(manifest_id, start, end)


async def test_the_cache_is_kept_as_the_model_says(files, models):
    one, _ = models
    narrow = replace(
        one, kv_quant="int8", kv_bytes_per_token_per_layer=one.kv_bytes_per_token_per_layer * 9 // 16
    )
    async with hosted(files, 1 << 30) as watched:
        watched.host.want(narrow, 0, (2, 4), 1)
        await watched.until(host_name(ONE, 0), "ready")
        engine = watched.host.compute(ONE, 2, 4).engine
        engine.open("s", 2, 4, 16)
        heads, key_width, value_width = files.config.kv_shape
        assert engine.kv_bytes_used() == 2 * 16 * heads * (key_width + value_width + 4)


async def test_measured_times_reach_the_advert(files, models, monkeypatch):
    monkeypatch.setattr(hosting, "PUBLISH_EVERY_S", 0.02)
    one, _ = models
    async with hosted(files, 1 << 30) as watched:
        watched.host.want(one, 0, (0, 2), 1)
        await watched.until(ONE, "ready")
        first = watched.host.adverts[ONE]
        roofline_s = one.layer_bytes / 1e11
        assert first.decode_s_per_layer > 0
        assert first.plan_s_per_layer > roofline_s
        assert 0 < first.prefill_s_per_token_per_layer < first.decode_s_per_layer
        compute = watched.host.compute(ONE, 0, 2)
        await compute.open("s", 0, 2, 64)
        await compute.step(Step("s", 0, tuple(range(32))))
        with trio.fail_after(30):
            before = first.prefill_s_per_token_per_layer
            while watched.host.adverts[ONE].prefill_s_per_token_per_layer == before:
                await watched._news.wait()
        assert watched.host.adverts[ONE].sessions == 1
