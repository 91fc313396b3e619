"""Adapters on this node: which of the mesh's are wanted, and bringing them into the engines that host their bases.

An adapter comes to a host when the host hears of it, or at the latest with the first request for it. It takes memory
that nothing else was promised. Where there is none, a request's adapter takes the place of some that nobody uses, the
longest unused first. Knows nothing of what requests are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from model_shards import Adapter, Engine, ModelError, NoRoom
from node.adverts import AdapterAdvert, ModelAdvert
from node.library import Library
from p2p import P2pError, RpcRefusal

log = logging.getLogger("shoal.tuning")
NO_ROOM_RETRY_S = 10.0
AGAIN_S = 30.0
"""After so long an adapter that could not be brought ahead of requests is tried again."""


@dataclass(slots=True)
class Tuning:
    """The adapters of one engine. `spare()` says how many bytes of its device nothing was promised; all engines of the
    device take `turn`s."""

    library: Library
    model: ModelAdvert
    engine: Engine
    spare: Callable[[], int]
    turn: trio.Lock
    _used: list[str] = field(default_factory=list)
    _held: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def holding(self, adapter: str) -> AsyncIterator[None]:
        """Have an adapter in the engine for as long as the block lasts, in which a session may be opened with it.

        Raises as `adapt`."""
        self._held[adapter] += 1
        try:
            await self.adapt(adapter)
            yield
        finally:
            self._held[adapter] -= 1

    async def adapt(self, adapter: str, *, ahead: bool = False) -> None:
        """Have an adapter (its manifest id) in the engine; none makes room for one that comes `ahead` of requests.

        Raises RpcRefusal, NoRoom and ModelError."""
        async with self.turn:
            if adapter not in self.engine.adapters:
                try:
                    self.engine.add_adapter(await self._bring(adapter, ahead=ahead))
                except P2pError as problem:
                    if isinstance(problem, RpcRefusal):
                        raise
                    raise RpcRefusal("unavailable", f"adapter {adapter[:12]}: {problem}") from None
            self._note(adapter)

    async def _bring(self, adapter: str, *, ahead: bool) -> Adapter:
        base = await self.library.files(self.model.manifest_id)
        files = await self.library.adapter(adapter, base)
        span = self.engine.span
        wanted = files.index.held_bytes(span.start, span.end, self.model.dtype)
        if not ahead:
            self.shed(wanted)
        if wanted > self.spare():
            raise NoRoom(
                f"adapter {files.manifest.name} takes {wanted} bytes, {max(0, self.spare())} are spare",
                NO_ROOM_RETRY_S,
            )
        await self.library.adapter_weights(files, span.start, span.end)
        load = partial(
            files.index.load, adapter, span.start, span.end, device=str(span.device), dtype=self.model.dtype
        )
        found = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
        log.info("ready: adapter %s of %s", files.manifest.name, self.model.name)
        return found

    def shed(self, wanted: int) -> None:
        """Let go of adapters that no session has or is about to have until `wanted` bytes are spare, if that helps."""
        uses = self.engine.adapters
        for name in [name for name in self._used if uses.get(name) == 0 and not self._held[name]]:
            if self.spare() >= wanted:
                return
            self._forget(name)

    def keep_only(self, known: Collection[str]) -> None:
        """Let go of what the mesh has no longer, or what this node has not heard of and nobody is about to use."""
        for name in [name for name in self._used if name not in known and not self._held[name]]:
            self._forget(name)

    def _note(self, adapter: str) -> None:
        if adapter in self._used:
            self._used.remove(adapter)
        self._used.append(adapter)

    def _forget(self, adapter: str) -> None:
        self._used.remove(adapter)
        self.engine.remove_adapter(adapter)


@dataclass(slots=True)
class Ahead:
    """Brings adapters ahead of the requests for them; `start(task)` runs one in the background."""

    start: Callable[..., None]
    clock: Callable[[], float] = trio.current_time
    _tried: dict[tuple[int, str], float] = field(default_factory=dict)

    def look(self, tunings: Collection[Tuning], known: Collection[AdapterAdvert]) -> None:
        """Of these adapters those whose bases are hosted are wanted, no others."""
        now_s = self.clock()
        self._tried = {key: at for key, at in self._tried.items() if now_s - at < AGAIN_S}
        for tuning in tunings:
            mine = [advert for advert in known if advert.base == tuning.model.manifest_id]
            tuning.keep_only({advert.manifest_id for advert in mine})
            for advert in mine:
                key = id(tuning), advert.manifest_id
                if advert.manifest_id not in tuning.engine.adapters and key not in self._tried:
                    self._tried[key] = now_s
                    self.start(self._bring, tuning, advert)

    async def _bring(self, tuning: Tuning, advert: AdapterAdvert) -> None:
        try:
            await tuning.adapt(advert.manifest_id, ahead=True)
        except (ModelError, P2pError, OSError) as problem:
            log.warning("adapter %s: %s", advert.name, problem)
