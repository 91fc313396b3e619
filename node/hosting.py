"""Hosts the spans that the plan gives this node: fetch, load, serve, move, drop.

One task a model and device brings the hosted span in line with the wanted one and publishes how it stands. The old span
serves on until the new one is ready where memory allows both. It compares what steps took with what the device should
need, so that plans use real times. It does not plan and knows nothing of requests but their number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import trio

from model_shards import Grammars, ModelError, ParkingLot, WeightCache, load_span
from node.adverts import AdapterAdvert, HostAdvert, ModelAdvert, host_name
from node.hardware import DeviceFigures
from node.library import Library, ModelFiles
from node.serve.compute import Compute, warm_up, warm_up_prompt
from node.timed import TimedEngine, Took
from node.tuning import Ahead, Tuning
from p2p import P2pError, RpcRefusal
from scheduler import Corrections, NodeShape, Observation, memory_needed

log = logging.getLogger("shoal.hosting")
RETRY_S = 2.0
PUBLISH_EVERY_S = 1.0
DROP_AFTER_S = 5.0
ROOM_WAIT_S = 3 * DROP_AFTER_S
ROOM_LOOK_S = 0.5
PARKING_SHARE = 2
"""Times the KV cache that parked sessions may take on the disk."""
QUANTISED_BYTES_MAX = 32 << 30
WARM_UP_WEIGHT = 4
"""The measure taken after loading counts as so many steps."""


@dataclass(slots=True)
class Hosting:
    """A loaded span and the scope of the task that serves its batches."""

    model: ModelAdvert
    compute: Compute
    engine: TimedEngine
    start: int
    end: int
    scope: trio.CancelScope
    looked_s: float
    tuning: Tuning
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Wish:
    model: ModelAdvert
    device: int
    span: tuple[int, int] | None
    epoch: int


class Host:
    """The spans of this node, one a model and device. `publish(name, advert or None)` tells the mesh; names of records,
    hostings and adverts are those of `adverts.host_name`. In `scratch` lie quantised weights, which load at once the
    next time, and nameless files of parked sessions and looked-up tables."""

    def __init__(
        self,
        library: Library,
        devices: Sequence[DeviceFigures],
        publish: Callable[[str, HostAdvert | None], None],
        clock: Callable[[], float] = time.perf_counter,
        scratch: Path | None = None,
    ) -> None:
        self._library = library
        self._scratch = scratch
        self._quantised = None
        if scratch is not None:
            self._quantised = WeightCache(scratch / "quantised", QUANTISED_BYTES_MAX)
        self._devices = devices
        self._publish = publish
        self._clock = clock
        self._limiters = [trio.CapacityLimiter(1) for _ in devices]
        self._tuning_turns = [trio.Lock() for _ in devices]
        self._loading: dict[str, int] = {}
        self._wanted: dict[str, _Wish] = {}
        self._wake: dict[str, trio.Event] = {}
        self._dropped = trio.Event()
        self._corrections = Corrections()
        self.hostings: dict[str, Hosting] = {}
        self.adverts: dict[str, HostAdvert] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Host until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._ahead = Ahead(nursery.start_soon)
            task_status.started()
            while True:
                await trio.sleep(PUBLISH_EVERY_S)
                for name in list(self.hostings):
                    self._refresh(name)

    def want(self, model: ModelAdvert, device: int, span: tuple[int, int] | None, epoch: int) -> None:
        """Host `span` of `model` on a device from now on (None: drop it)."""
        name = host_name(model.manifest_id, device)
        before = self._wanted.get(name)
        if before is not None and (before.span, before.epoch) == (span, epoch):
            return
        if before is None and span is None:
            return
        self._wanted[name] = _Wish(model, device, span, epoch)
        if name not in self._wake:
            self._wake[name] = trio.Event()
            self._nursery.start_soon(self._keep, name)
        self._wake[name].set()

    def keep_only(self, known: Collection[str]) -> None:
        """Drop the models that the mesh has no longer."""
        for wish in list(self._wanted.values()):
            if wish.model.manifest_id not in known and wish.span is not None:
                self.want(wish.model, wish.device, None, wish.epoch)

    def tune(self, known: Collection[AdapterAdvert]) -> None:
        """Have the adapters of the mesh whose bases are hosted here, and let go of others."""
        self._ahead.look([hosting.tuning for hosting in self.hostings.values()], known)

    def hosts(self, manifest_id: str) -> bool:
        """Whether any device holds a span of the model."""
        return any(hosting.model.manifest_id == manifest_id for hosting in self.hostings.values())

    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """By manifest id what is held, or wanted here."""
        found: dict[str, list[tuple[int, int]]] = {}
        for hosting in self.hostings.values():
            found.setdefault(hosting.model.manifest_id, []).append((hosting.start, hosting.end))
        for wish in self._wanted.values():
            if wish.span is not None:
                found.setdefault(wish.model.manifest_id, []).append(wish.span)
        return found

    def compute(self, manifest_id: str, start: int, end: int) -> Compute:
        """The Compute that holds layers [start, end). Raises RpcRefusal where this node has none."""
        for hosting in self.hostings.values():
            if hosting.model.manifest_id == manifest_id and hosting.start <= start < end <= hosting.end:
                return hosting.compute
        raise RpcRefusal(
            "not_found", f"this node does not host layers {start} to {end} of {manifest_id[:12]}"
        )

    async def _keep(self, name: str) -> None:
        """Bring one model on one device in line with what is wanted, for ever."""
        while True:
            self._wake[name] = trio.Event()
            wish, hosting = self._wanted[name], self.hostings.get(name)
            have = None if hosting is None else (hosting.start, hosting.end)
            if wish.span is None:
                await self._leave(name)
            elif wish.span == have:
                self._say(name, replace(self.adverts[name], epoch=wish.epoch))
            else:
                await self._move(name, wish, wish.span)
            await self._wake[name].wait()

    async def _leave(self, name: str) -> None:
        """Serve a little longer, so that whoever takes over is ready, then drop the span."""
        with trio.move_on_after(DROP_AFTER_S):
            await self._wake[name].wait()
            return
        self._drop(name)
        self.adverts.pop(name, None)
        self._publish(name, None)

    async def _move(self, name: str, wish: _Wish, span: tuple[int, int]) -> None:
        """Fetch and load a span, trying again while it stays wanted."""
        async with trio.open_nursery() as nursery:

            async def superseded() -> None:
                await self._wake[name].wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(superseded)
            while True:
                try:
                    await self._bring(name, wish, span)
                    break
                except (P2pError, ModelError, OSError) as problem:
                    log.warning("layers %d:%d of %s: %s", *span, wish.model.name, problem)
                    if name not in self.hostings:
                        self._say(name, HostAdvert(*span, "failed", wish.epoch, detail=str(problem)[:500]))
                    await trio.sleep(RETRY_S)
            nursery.cancel_scope.cancel()

    async def _bring(self, name: str, wish: _Wish, span: tuple[int, int]) -> None:
        model = wish.model
        advert = HostAdvert(*span, "fetching", wish.epoch)
        serving = name in self.hostings
        here_bytes: int | None = None

        def report(done: int, total: int) -> None:
            nonlocal advert, here_bytes
            here_bytes = done if here_bytes is None else here_bytes  # what was on this disk before
            fetched = done - here_bytes
            advert = replace(advert, progress=done / max(total, 1), bytes_fetched=fetched, bytes_wanted=total)
            if not serving:
                self._say(name, advert, quietly=True)

        if not serving:
            self._say(name, advert)
        files = await self._library.files(model.manifest_id)
        await self._library.weights(files, *span, progress=report)
        advert = replace(advert, state="loading", progress=1.0)
        if serving and not self._fits_beside(name, wish, span):
            self._drop(name)
            serving = False
        if not serving:
            self._say(name, advert)
        await self._others_gone(name, wish, span)
        self._loading[name] = memory_needed(model.shape(), *span)
        try:
            engine, s_per_layer, prefill_s = await self._load(wish, files, span)
        finally:
            del self._loading[name]
        self._drop(name)
        tuning = Tuning(
            self._library, model, engine,
            partial(self._spare, wish.device), self._tuning_turns[wish.device],
        )  # fmt: skip
        compute = Compute(
            engine,
            self._limiters[wish.device],
            s_per_layer=s_per_layer,
            grammars=partial(Grammars, files.tokenizer, files.config.vocab, files.config.eos_ids),
            holding=tuning.holding,
        )
        compute.prefill_s_per_layer = prefill_s
        scope = trio.CancelScope()
        self.hostings[name] = Hosting(model, compute, engine, *span, scope, self._clock(), tuning)
        self._nursery.start_soon(_run_in, scope, compute)
        engine.take()  # the first steps paid for the kernels' own set-up
        layers = span[1] - span[0]
        for _ in range(WARM_UP_WEIGHT):
            self._observe(name, Took("decode", layers, 1, s_per_layer * layers, False))
        measured = replace(
            advert,
            s_per_layer=s_per_layer,
            decode_s_per_layer=s_per_layer,
            prefill_s_per_token_per_layer=round(prefill_s, 9),
            plan_s_per_layer=self._for_plans(name),
        )
        self._say(name, replace(measured, state="ready"))
        log.info("ready: layers %d:%d of %s", *span, model.name)

    async def _load(
        self, wish: _Wish, files: ModelFiles, span: tuple[int, int]
    ) -> tuple[TimedEngine, float, float]:
        """An engine for the span, its measured seconds a decode step and layer, and a prompt's token and layer."""
        model = wish.model
        kv_bytes = model.shape().kv_bytes_per_layer * (span[1] - span[0])
        load = partial(
            load_span, files.directory, files.index, files.config, *span,
            device=self._devices[wish.device].device, dtype=model.dtype, quant=model.quant,
            cache=self._quantised, scratch=self._scratch,
        )  # fmt: skip

        def work() -> tuple[TimedEngine, float, float]:
            lot = ParkingLot(PARKING_SHARE * kv_bytes, self._scratch)
            engine = TimedEngine(
                load(),
                kv_bytes_max=kv_bytes,
                parking=lot,
                identity=model.manifest_id,
                kv_quant=model.kv_quant,
            )
            return engine, warm_up(engine), warm_up_prompt(engine)

        limiter = self._limiters[wish.device]
        return await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)

    def _fits_beside(self, name: str, wish: _Wish, span: tuple[int, int]) -> bool:
        """Whether the new span has room beside all that is loaded on the device; adapters that nobody uses give way."""
        needed = memory_needed(wish.model.shape(), *span)
        for hosting in self._on(wish.device):
            hosting.tuning.shed(needed)
        return needed <= self._spare(wish.device)

    def _on(self, device: int) -> list[Hosting]:
        return [h for name, h in self.hostings.items() if self._wanted[name].device == device]

    def _spare(self, device: int) -> int:
        """Bytes of the device's memory that no span, loaded or loading, and no adapter takes."""
        taken = sum(_size(hosting) + hosting.engine.adapter_bytes for hosting in self._on(device))
        coming = sum(size for name, size in self._loading.items() if self._wanted[name].device == device)
        return self._devices[device].memory_bytes - taken - coming

    async def _others_gone(self, name: str, wish: _Wish, span: tuple[int, int]) -> None:
        """Where the device is full of spans that are about to go, or of adapters in use, wait for them: never more than
        is lent is loaded."""
        with trio.move_on_after(ROOM_WAIT_S):
            while not self._fits_beside(name, wish, span) and any(
                h.engine.adapter_bytes or self._wanted[other].span != (h.start, h.end)
                for other, h in self.hostings.items()
                if other != name and self._wanted[other].device == wish.device
            ):
                with trio.move_on_after(ROOM_LOOK_S):
                    await self._dropped.wait()

    def _drop(self, name: str) -> None:
        hosting = self.hostings.pop(name, None)
        if hosting is not None:
            hosting.scope.cancel()
            self._dropped.set()
            self._dropped = trio.Event()

    def _observe(self, name: str, took: Took) -> None:
        wish = self._wanted[name]
        seen = Observation(name, wish.model.manifest_id, **asdict(took))
        self._corrections.observe(seen, wish.model.shape(), self._roofline(name), self._clock())

    def _roofline(self, name: str) -> NodeShape:
        device = self._devices[self._wanted[name].device]
        return NodeShape(name, device.memory_bytes, device.flops_per_s, device.read_bytes_per_s)

    def _for_plans(self, name: str) -> float:
        """Seconds a layer of decode for plans: what the device should need, as corrected by what was seen."""
        model = self._wanted[name].model
        seen = self._corrections.corrected(self._roofline(name), model.manifest_id, model.shape())
        return float(f"{seen.decode_s_per_layer or 0.0:.2g}")  # a record is not renewed for less

    def _refresh(self, name: str) -> None:
        """Publish a ready span's load where it changed."""
        hosting, advert = self.hostings[name], self.adverts[name]
        if advert.state != "ready":
            return
        compute, engine, now_s = hosting.compute, hosting.engine, self._clock()
        for took in engine.take():
            self._observe(name, took)
        busy = (engine.busy_s - hosting.busy_s) / max(1e-3, now_s - hosting.looked_s)
        hosting.looked_s, hosting.busy_s = now_s, engine.busy_s
        queues = tuple(round(queue_s, 4) for queue_s in compute.queue_by_class_s())
        fresh = replace(
            advert,
            sessions=engine.sessions(),
            kv_tokens_free=engine.kv_tokens_free(),
            kv_tokens_yielding=compute.tokens_yielding(),
            s_per_layer=round(compute.s_per_layer, 7),
            decode_s_per_layer=round(compute.s_per_layer, 7),
            prefill_s_per_token_per_layer=round(compute.prefill_s_per_layer, 9),
            plan_s_per_layer=self._for_plans(name),
            queue_s=sum(queues),
            queue_by_class_s=queues,
            tokens_per_s=round(compute.take_rate(), 2),
            busy=min(1.0, round(20 * busy) / 20),
            prefixes=compute.held.summary(),
        )
        if fresh != advert:
            self._say(name, fresh)

    def _say(self, name: str, advert: HostAdvert, *, quietly: bool = False) -> None:
        hosting = self.hostings.get(name)
        if hosting is not None:
            advert = replace(advert, kv_tokens_free=hosting.engine.kv_tokens_free())
        before = self.adverts.get(name)
        self.adverts[name] = advert
        small = before is not None and int(before.progress * 20) == int(advert.progress * 20)
        if quietly and small and before is not None and before.state == advert.state:
            return
        self._publish(name, advert)


def _size(hosting: Hosting) -> int:
    return memory_needed(hosting.model.shape(), hosting.start, hosting.end)


async def _run_in(scope: trio.CancelScope, compute: Compute) -> None:
    with scope:
        await compute.run()
