"""Hosts the spans that the plan gives this node: fetch, load, serve, move, drop.

One task a model brings the hosted span in line with the wanted one and publishes how it stands. The old span serves on
until the new one is ready where memory allows both. It does not plan and knows nothing of requests but their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import trio

from model_shards import Engine, ModelError, load_span
from node.adverts import HostAdvert, ModelAdvert
from node.library import Library, ModelFiles
from node.serve.compute import Compute, warm_up
from p2p import P2pError, RpcRefusal
from scheduler import memory_needed

log = logging.getLogger("shoal.hosting")
RETRY_S = 2.0
PUBLISH_EVERY_S = 1.0
DROP_AFTER_S = 5.0


@dataclass(slots=True)
class Hosting:
    """A loaded span and the scope of the task that serves its batches."""

    compute: Compute
    start: int
    end: int
    scope: trio.CancelScope


class Host:
    """The spans of this node. `publish(manifest_id, advert or None)` tells the mesh."""

    def __init__(
        self,
        library: Library,
        device: str,
        memory_bytes: int,
        publish: Callable[[str, HostAdvert | None], None],
    ) -> None:
        self._library = library
        self._device = device
        self._memory_bytes = memory_bytes
        self._publish = publish
        self._limiter = trio.CapacityLimiter(1)
        self._wanted: dict[str, tuple[ModelAdvert, tuple[int, int] | None, int]] = {}
        self._wake: dict[str, trio.Event] = {}
        self.hostings: dict[str, Hosting] = {}
        self.adverts: dict[str, HostAdvert] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Host until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(PUBLISH_EVERY_S)
                for manifest_id in list(self.hostings):
                    self._refresh(manifest_id)

    def want(self, model: ModelAdvert, span: tuple[int, int] | None, epoch: int) -> None:
        """Host `span` of `model` from now on (None: drop it)."""
        manifest_id = model.manifest_id
        before = self._wanted.get(manifest_id)
        if before is not None and before[1:] == (span, epoch):
            return
        if before is None and span is None:
            return
        self._wanted[manifest_id] = (model, span, epoch)
        if manifest_id not in self._wake:
            self._wake[manifest_id] = trio.Event()
            self._nursery.start_soon(self._keep, manifest_id)
        self._wake[manifest_id].set()

    def keep_only(self, known: Collection[str]) -> None:
        """Drop the models that the mesh has no longer."""
        for manifest_id, (model, span, epoch) in list(self._wanted.items()):
            if manifest_id not in known and span is not None:
                self.want(model, None, epoch)

    def compute(self, manifest_id: str, start: int, end: int) -> Compute:
        """The Compute that holds layers [start, end). Raises RpcRefusal where this node does not."""
        hosting = self.hostings.get(manifest_id)
        if hosting is None or not hosting.start <= start < end <= hosting.end:
            raise RpcRefusal(
                "not_found", f"this node does not host layers {start} to {end} of {manifest_id[:12]}"
            )
        return hosting.compute

    async def _keep(self, manifest_id: str) -> None:
        """Bring one model in line with what is wanted, for ever."""
        while True:
            self._wake[manifest_id] = trio.Event()
            model, span, epoch = self._wanted[manifest_id]
            hosting = self.hostings.get(manifest_id)
            have = None if hosting is None else (hosting.start, hosting.end)
            if span is None:
                await self._leave(manifest_id)
            elif span == have:
                self._say(manifest_id, replace(self.adverts[manifest_id], epoch=epoch))
            else:
                await self._move(model, span, epoch)
            await self._wake[manifest_id].wait()

    async def _leave(self, manifest_id: str) -> None:
        """Serve a little longer, so that whoever takes over is ready, then drop the span."""
        with trio.move_on_after(DROP_AFTER_S):
            await self._wake[manifest_id].wait()
            return
        self._drop(manifest_id)
        self.adverts.pop(manifest_id, None)
        self._publish(manifest_id, None)

    async def _move(self, model: ModelAdvert, span: tuple[int, int], epoch: int) -> None:
        """Fetch and load a span, trying again while it stays wanted."""
        manifest_id = model.manifest_id
        async with trio.open_nursery() as nursery:

            async def superseded() -> None:
                await self._wake[manifest_id].wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(superseded)
            while True:
                try:
                    await self._bring(model, span, epoch)
                    break
                except (P2pError, ModelError, OSError) as problem:
                    log.warning("layers %d:%d of %s: %s", *span, model.name, problem)
                    if manifest_id not in self.hostings:
                        self._say(manifest_id, HostAdvert(*span, "failed", epoch, detail=str(problem)[:500]))
                    await trio.sleep(RETRY_S)
            nursery.cancel_scope.cancel()

    async def _bring(self, model: ModelAdvert, span: tuple[int, int], epoch: int) -> None:
        manifest_id = model.manifest_id
        advert = HostAdvert(*span, "fetching", epoch)
        serving = manifest_id in self.hostings
        here_bytes: int | None = None

        def report(done: int, total: int) -> None:
            nonlocal advert, here_bytes
            here_bytes = done if here_bytes is None else here_bytes  # what was on this disk before
            fetched = done - here_bytes
            advert = replace(advert, progress=done / max(total, 1), bytes_fetched=fetched, bytes_wanted=total)
            if not serving:
                self._say(manifest_id, advert, quietly=True)

        if not serving:
            self._say(manifest_id, advert)
        files = await self._library.files(manifest_id)
        await self._library.weights(files, *span, progress=report)
        advert = replace(advert, state="loading", progress=1.0)
        if serving and not self._fits_beside(model, span):
            self._drop(manifest_id)
            serving = False
        if not serving:
            self._say(manifest_id, advert)
        engine, s_per_token_layer = await self._load(model, files, span)
        self._drop(manifest_id)
        compute = Compute(engine, self._limiter, s_per_token_layer=s_per_token_layer)
        scope = trio.CancelScope()
        self.hostings[manifest_id] = Hosting(compute, *span, scope)
        self._nursery.start_soon(_run_in, scope, compute)
        self._say(manifest_id, replace(advert, state="ready"))
        log.info("ready: layers %d:%d of %s", *span, model.name)

    async def _load(
        self, model: ModelAdvert, files: ModelFiles, span: tuple[int, int]
    ) -> tuple[Engine, float]:
        """An engine for the span and its measured seconds a token and layer."""
        kv_bytes = (
            model.kv_bytes_per_token_per_layer
            * (span[1] - span[0])
            * model.context_tokens
            * model.concurrency
        )
        load = partial(
            load_span, files.directory, files.index, files.config, *span,
            device=self._device, dtype=model.dtype, quant=model.quant,
        )  # fmt: skip

        def work() -> tuple[Engine, float]:
            engine = Engine(load(), kv_bytes_max=kv_bytes)
            return engine, warm_up(engine)

        return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)

    def _fits_beside(self, model: ModelAdvert, span: tuple[int, int]) -> bool:
        shape = model.shape()
        hosting = self.hostings[model.manifest_id]
        both = memory_needed(shape, *span) + memory_needed(shape, hosting.start, hosting.end)
        others = sum(
            memory_needed(self._wanted[other][0].shape(), held.start, held.end)
            for other, held in self.hostings.items()
            if other != model.manifest_id
        )
        return both + others <= self._memory_bytes

    def _drop(self, manifest_id: str) -> None:
        hosting = self.hostings.pop(manifest_id, None)
        if hosting is not None:
            hosting.scope.cancel()

    def _refresh(self, manifest_id: str) -> None:
        """Publish a ready span's load where it changed."""
        hosting, advert = self.hostings[manifest_id], self.adverts[manifest_id]
        if advert.state != "ready":
            return
        compute = hosting.compute
        fresh = replace(
            advert,
            sessions=compute.engine.sessions(),
            kv_tokens_free=compute.engine.kv_tokens_free(),
            s_per_layer=round(compute.s_per_token_layer, 7),
            queue_s=round(compute.queue_s(), 4),
            tokens_per_s=round(compute.take_rate(), 2),
        )
        if fresh != advert:
            self._say(manifest_id, fresh)

    def _say(self, manifest_id: str, advert: HostAdvert, *, quietly: bool = False) -> None:
        hosting = self.hostings.get(manifest_id)
        if hosting is not None:
            advert = replace(advert, kv_tokens_free=hosting.compute.engine.kv_tokens_free())
        before = self.adverts.get(manifest_id)
        self.adverts[manifest_id] = advert
        small = before is not None and int(before.progress * 20) == int(advert.progress * 20)
        if quietly and small and before is not None and before.state == advert.state:
            return
        self._publish(manifest_id, advert)


async def _run_in(scope: trio.CancelScope, compute: Compute) -> None:
    with scope:
        await compute.run()
