"""The models this node knows the files of: published here, or fetched from peers as far as needed.

`publish` turns a directory into a signed manifest; `files` brings what every use of a model needs (configuration,
tokenizer, safetensors headers); `weights` brings the byte ranges of one span and nothing more. Adapters are published
and fetched in the same way. It does not decide who hosts what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from model_shards import AdapterIndex, CheckpointIndex, ModelConfig, Tokenizer
from p2p import BlobExchange, BlobStore, Identity, Manifest, PeerId, build_manifest

log = logging.getLogger("shoal.library")
SMALL_FILE_BYTES_MAX = 64 << 20
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What of an adapter's directory is published: beside them often lie checkpoints and states of optimizers."""
Progress = Callable[[int, int], None]
Sources = Callable[[str], Iterable[PeerId]]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model whose configuration, tokenizer and headers are on this disk; weights may be missing."""

    manifest: Manifest
    directory: Path
    config: ModelConfig
    index: CheckpointIndex
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter whose configuration and header are on this disk, checked against its base."""

    manifest: Manifest
    index: AdapterIndex


class Library:
    """`sources(manifest_id)` names peers that may have a model's bytes, best first."""

    def __init__(
        self, identity: Identity, store: BlobStore, exchange: BlobExchange, sources: Sources
    ) -> None:
        self._identity = identity
        self._store = store
        self._exchange = exchange
        self._sources = sources
        self._files: dict[str, ModelFiles] = {}
        self._adapters: dict[str, AdapterFiles] = {}
        self._locks: dict[str, trio.Lock] = {}

    async def publish(self, directory: Path, name: str, progress: Progress | None = None) -> ModelFiles:
        """Check, hash and offer a model directory. Raises ModelError for what no node could host."""
        build = partial(_build, directory, name, self._identity, progress)
        manifest = await trio.to_thread.run_sync(build, abandon_on_cancel=True)
        self._store.publish(manifest, directory)
        return await self.files(manifest.id)

    async def files(self, manifest_id: str) -> ModelFiles:
        """Everything about a model but its weights, fetched from peers where it is missing."""
        async with self._locks.setdefault(manifest_id, trio.Lock()):
            known = self._files.get(manifest_id)
            if known is not None:
                return known
            manifest, directory = await self._small(manifest_id)
            files = await trio.to_thread.run_sync(_read, manifest, directory, abandon_on_cancel=True)
            self._files[manifest_id] = files
            return files

    async def publish_adapter(
        self, directory: Path, name: str, base: ModelFiles, progress: Progress | None = None
    ) -> AdapterFiles:
        """Check, hash and offer an adapter directory. Raises ModelError for what no host of `base` could serve."""
        build = partial(_build_adapter, directory, name, base.config, self._identity, progress)
        manifest = await trio.to_thread.run_sync(build, abandon_on_cancel=True)
        self._store.publish(manifest, directory)
        return await self.adapter(manifest.id, base)

    async def adapter(self, manifest_id: str, base: ModelFiles) -> AdapterFiles:
        """Everything about an adapter of `base` but its matrices, fetched from peers where it is missing. Raises
        ModelError for one of another base."""
        async with self._locks.setdefault(manifest_id, trio.Lock()):
            known = self._adapters.get(manifest_id)
            if known is None or known.index.base != base.config:
                manifest, directory = await self._small(manifest_id)
                read = partial(AdapterIndex, directory, base.config)
                known = AdapterFiles(manifest, await trio.to_thread.run_sync(read, abandon_on_cancel=True))
                self._adapters[manifest_id] = known
            return known

    async def adapter_weights(self, files: AdapterFiles, start: int, end: int) -> None:
        """Bring the matrices for layers [start, end) to this disk."""
        wanted = files.index.span_ranges(start, end)
        await self._exchange.fetch(files.manifest, wanted, partial(self._sources, files.manifest.id))

    async def _small(self, manifest_id: str) -> tuple[Manifest, Path]:
        """The manifest and the directory with its small files and headers."""
        manifest = next((m for m in self._store.manifests() if m.id == manifest_id), None)
        if manifest is None:
            manifest = await self._exchange.fetch_manifest(manifest_id, self._sources(manifest_id))
        directory = self._store.open(manifest)
        await self._exchange.fetch(manifest, small_files(manifest), partial(self._sources, manifest_id))
        return manifest, directory

    async def publish_files(self, directory: Path, name: str) -> str:
        """Offer a directory of whatever files; its manifest's id."""
        build = partial(build_manifest, directory, name, self._identity)
        manifest = await trio.to_thread.run_sync(build, abandon_on_cancel=True)
        self._store.publish(manifest, directory)
        return manifest.id

    async def fetch_files(self, manifest_id: str, progress: Progress | None = None) -> Path:
        """All files of a manifest, on this disk. Raises BlobUnavailable, StoreFault, ResourceLimit."""
        manifest = await self._exchange.fetch_manifest(manifest_id, self._sources(manifest_id))
        wanted = {entry.name: [(0, entry.size)] for entry in manifest.files if entry.size}
        sources = partial(self._sources, manifest_id)
        await self._exchange.fetch(manifest, wanted, sources, progress=progress)
        return self._store.open(manifest)

    async def publisher(self, manifest_id: str) -> PeerId:
        """Who signed a model's manifest, which is fetched where it is missing. Raises BlobUnavailable, StoreFault."""
        manifest = await self._exchange.fetch_manifest(manifest_id, self._sources(manifest_id))
        return manifest.publisher

    async def weights(self, files: ModelFiles, start: int, end: int, progress: Progress | None = None) -> int:
        """Bring the byte ranges of layers [start, end) to this disk; returns how many bytes the span has."""
        wanted = files.index.span_ranges(files.config, start, end)
        sources = partial(self._sources, files.manifest.id)
        await self._exchange.fetch(files.manifest, wanted, sources, progress=progress)
        return sum(b - a for ranges in wanted.values() for a, b in ranges)

    def known(self, manifest_id: str) -> ModelFiles | None:
        """A model whose files were looked at since this node started, or None."""
        return self._files.get(manifest_id)

    def tokenizer(self, manifest_id: str) -> Tokenizer | None:
        """The tokenizer of a model whose files are here, or None."""
        files = self._files.get(manifest_id)
        return None if files is None else files.tokenizer


def read_directory(directory: Path) -> tuple[ModelConfig, CheckpointIndex]:
    """The configuration and the safetensors headers of a model directory, checked. Raises ModelError."""
    config = ModelConfig.from_dir(directory)
    index = CheckpointIndex.open(directory)
    index.check(config)
    return config, index


def _build(directory: Path, name: str, identity: Identity, progress: Progress | None) -> Manifest:
    _, index = read_directory(directory)
    Tokenizer.from_dir(directory)
    return build_manifest(directory, name, identity, cuts=index.cuts(), progress=progress)


def _build_adapter(
    directory: Path, name: str, base: ModelConfig, identity: Identity, progress: Progress | None
) -> Manifest:
    index = AdapterIndex(directory, base)
    for layer in range(base.layers):  # every value is looked at, a layer at a time
        index.load(name, layer, layer + 1, dtype="float32")
    return build_manifest(directory, name, identity, cuts=index.cuts(), progress=progress, only=ADAPTER_FILES)


def small_files(manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """Whole small files, and of each safetensors file the header, which is its first chunk by construction."""
    wanted = {}
    for entry in manifest.files:
        if entry.name.endswith(".safetensors"):
            wanted[entry.name] = [(0, min(8, entry.size))]
        elif entry.size <= SMALL_FILE_BYTES_MAX:
            wanted[entry.name] = [(0, entry.size)]
    return wanted


def _read(manifest: Manifest, directory: Path) -> ModelFiles:
    config, index = read_directory(directory)
    return ModelFiles(manifest, directory, config, index, Tokenizer.from_dir(directory))
