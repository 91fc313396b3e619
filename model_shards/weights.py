"""The parameters of a span, from rows of checkpoint tensors into their place in a fused parameter.

Matrices are quantised as they come, kept as the checkpoint packed them where our int4 weights can hold that,
or converted. Peak memory is the span plus a buffer of rows, plus one tensor where its layout needs it whole.
What the parameters mean is `layers.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from model_shards.checkpoint import CheckpointIndex
from model_shards.dtypes import dtype_name
from model_shards.families import TensorSpec
from model_shards.integers import PackedInt8, packs_integers
from model_shards.packed import PACKED_MIN, PackedStack, PackedWeight, packing_pays, packs
from model_shards.packing import Packing, Stored, kept_group, locate
from model_shards.quant import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    Int4Weight,
    Int8Weight,
    QuantWeight,
    int4_bytes,
    kernel_takes,
    new_weight,
    quantised_bytes,
)
from model_shards.reader import TensorReader
from model_shards.unpack import PackedRows, open_source
from model_shards.weight_cache import WeightCache

CHUNK_ELEMENTS = 1 << 18

Part = torch.Tensor | QuantWeight | PackedWeight | PackedInt8 | PackedStack


@dataclass(frozen=True, slots=True)
class Holding:
    """How a part is held: ``kind`` "plain", "int8", "int4" (made at load) or "kept" (as packed, ``group``
    inputs a scale). ``reason`` says why a packed one is not kept."""

    kind: str
    group: int = 0
    reason: str = ""


def by_part(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Specs that fill the same part, together."""
    fused: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        fused.setdefault(spec.part, []).append(spec)
    return fused


def holding_of(
    packing: Packing | None, specs: Sequence[TensorSpec], stored: Sequence[Stored], quant: str
) -> Holding:
    """How the part that ``specs`` fill will be held, from headers and settings alone."""
    part, reason = specs[0].part, ""
    if any(len(spec.shape) != 2 for spec in specs):
        return Holding("plain")
    if any(found.method != "plain" for found in stored):
        held = [kept_group(packing, found, spec.shape[1]) for spec, found in zip(specs, stored, strict=True)]
        reason = next((why for _, why in held if why), "")
        if specs[0].plain or part == "embed":
            reason = "this part is computed with as it is"
        if not reason:
            return Holding("kept", held[0][0])
    if quant == "none" or specs[0].plain:
        return Holding("plain", reason=reason)
    # The vocabulary projection and the embedding keep eight bits: four cost more there than anywhere else.
    return Holding("int8" if part in ("embed", "head") else quant, reason=reason)


def held_bytes(
    index: CheckpointIndex, packing: Packing | None, specs: Iterable[TensorSpec], quant: str, itemsize: int
) -> int:
    """Bytes that the parameters of ``specs`` will take, from headers alone. Raises CheckpointError."""
    total = 0
    for fused in by_part(specs).values():
        holding = holding_of(packing, fused, [locate(index, packing, spec) for spec in fused], quant)
        for spec in fused:
            if holding.kind == "plain":
                total += spec.elements * (4 if spec.wide else itemsize)
            elif holding.kind == "kept":
                total += int4_bytes(spec.shape[0], spec.shape[1], holding.group, itemsize)
            else:
                total += quantised_bytes(holding.kind, spec.shape[0], spec.shape[1], itemsize)
    return total


def load_parts(
    reader: TensorReader,
    specs: Iterable[TensorSpec],
    dtype: torch.dtype,
    device: torch.device,
    quant: str = "none",
    cache: WeightCache | None = None,
) -> dict[str, Part]:
    """The parameters that ``specs`` fill, by part name; parts of several tensors are fused along their rows.
    Norms and wide parts keep float32; matrices are quantised as they come, plain ones excepted, or come out of
    ``cache``, where they had been quantised before."""
    loader = _Loader(reader, dtype, device, quant, cache)
    # The largest first: while a matrix is packed it is in memory twice, best when little else is.
    order = sorted(by_part(specs).items(), key=lambda item: -sum(spec.elements for spec in item[1]))
    return {part: packed(loader.load(part, fused), fused[0]) for part, fused in order}


def packed(value: Part, spec: TensorSpec) -> Part:
    """``value`` packed if it is a matrix that is only multiplied with, and faster so. Rows of an embedding are looked
    up, experts are cut out of their stack, and plain parts are looked into."""
    if spec.plain or spec.part == "embed" or spec.part.startswith("experts."):
        return value
    return packed_matrix(value)


def packed_matrix(value: Part) -> Part:
    """``value`` packed if it is a matrix and products with it are faster so."""
    if isinstance(value, Int8Weight):
        pays = packs_integers(value.shape, value.scale.dtype, value.q.device)
        return PackedInt8(value.q, value.scale) if pays else value
    return PackedWeight(value) if isinstance(value, torch.Tensor) and packs(value) else value


@dataclass(frozen=True, slots=True)
class _Loader:
    reader: TensorReader
    dtype: torch.dtype
    device: torch.device
    quant: str
    cache: WeightCache | None

    def load(self, part: str, specs: list[TensorSpec]) -> Part:
        reader = self.reader
        stored = [locate(reader.index, reader.packing, spec) for spec in specs]
        holding = holding_of(reader.packing, specs, stored, self.quant)
        if holding.kind == "kept":
            kept = self._keep(specs, stored, holding)
            if kept is not None:
                return kept
            holding = Holding("plain", reason="its inputs belong to groups in an order of their own")
            if self.quant != "none":
                holding = Holding(self.quant, reason=holding.reason)
        if holding.reason:
            reader.tell_once(stored[0].main[0], holding.reason)
        if holding.kind == "plain" and self._packs_experts(part, specs):
            return self._load_experts(part, specs, stored)
        if holding.kind == "plain":
            return self._load_plain(part, specs, stored)
        return self._quantise(specs, stored, holding.kind)

    def _packs_experts(self, part: str, specs: list[TensorSpec]) -> bool:
        """Whether the experts' matrices are packed one by one. A tensor that holds all of them is not: it would be in
        memory twice."""
        if part not in ("experts.gate_up", "experts.down") or any(spec.stack or spec.plain for spec in specs):
            return False
        fits = len(specs[0].shape) == 2 and min(specs[0].shape) >= PACKED_MIN
        return fits and self.dtype == torch.bfloat16 and self.device.type == "cpu" and packing_pays()

    def _load_experts(self, part: str, specs: list[TensorSpec], stored: list[Stored]) -> PackedStack:
        """One matrix an expert: gate and up, fused, or down."""
        pairs = sorted(zip(specs, stored, strict=True), key=lambda pair: pair[0].row)
        each = 2 if part == "experts.gate_up" else 1
        found = []
        for at in range(0, len(pairs), each):
            first = pairs[at][0].row
            own = [replace(spec, row=spec.row - first) for spec, _ in pairs[at : at + each]]
            found.append(PackedWeight(self._load_plain(part, own, [one for _, one in pairs[at : at + each]])))
        return PackedStack(found)

    def _load_plain(self, part: str, specs: list[TensorSpec], stored: list[Stored]) -> torch.Tensor:
        kept = torch.float32 if specs[0].wide or part.endswith("norm") else self.dtype
        rows = sum(spec.shape[0] for spec in specs)
        whole = torch.empty((rows, *specs[0].shape[1:]), dtype=kept, device=self.device)
        for spec, found in zip(specs, stored, strict=True):
            self._read(whole[spec.row : spec.row + spec.shape[0]], spec, found)
        return whole

    def _read(self, target: torch.Tensor, spec: TensorSpec, stored: Stored) -> None:
        source = open_source(self.reader, spec, stored)
        if stored.method == "plain" and not spec.stack:
            source.read(0, target)
            return
        for first, count in _chunks(spec):
            source.read(first, target[first : first + count])

    def _quantise(self, specs: list[TensorSpec], stored: list[Stored], kind: str) -> QuantWeight:
        width = specs[0].shape[1]
        weight = new_weight(kind, _pieces(specs), width, self.dtype, self.device)
        key = self._key(specs, stored, weight) if self.cache is not None else ""
        if self.cache is not None and self.cache.fetch(key, weight.tensors()):
            infos = [info for found in stored for _, info in found.pieces.values()]
            self.reader.skipped(sum(info.end - info.start for info in infos))
            return weight
        for spec, found in zip(specs, stored, strict=True):
            self._fill(weight, spec, found)
        if self.cache is not None:
            self.cache.store(key, weight.tensors())
        return weight

    def _fill(self, weight: QuantWeight, spec: TensorSpec, stored: Stored) -> None:
        """Quantises one tensor into its rows. What its source holds is let go of with the call."""
        source = open_source(self.reader, spec, stored)
        for first, count in _chunks(spec):
            values = torch.empty(count, spec.shape[1])
            source.read(first, values)
            weight.fill(spec.row + first, values.to(self.device))

    def _key(self, specs: list[TensorSpec], stored: list[Stored], weight: QuantWeight) -> str:
        """The cache's name for ``weight``: every setting and place that its bytes depend on."""
        if self.cache is None:
            return ""
        blocked, group = (weight.blocked, weight.group) if isinstance(weight, Int4Weight) else (False, 0)
        places = [
            [name, role, info.file, info.dtype, info.shape, info.start, info.end]
            for found in stored
            for role, (name, info) in found.pieces.items()
        ]
        files = {str(place[2]): self.reader.directory / str(place[2]) for place in places}
        settings = {
            "kind": type(weight).__name__,
            "dtype": dtype_name(self.dtype),
            "blocked": blocked,
            "group": group,
            "specs": [asdict(spec) for spec in specs],
            "packing": asdict(self.reader.packing) if self.reader.packing is not None else None,
            "places": places,
        }
        return self.cache.key(settings, files)

    def _keep(self, specs: list[TensorSpec], stored: list[Stored], holding: Holding) -> Int4Weight | None:
        """The part as packed, or None where the data order inputs in a way the config did not tell of."""
        width, group = specs[0].shape[1], holding.group
        rows = sum(spec.shape[0] for spec in specs)
        blocked = kernel_takes(_pieces(specs), self.dtype, self.device)
        weight = Int4Weight(rows, width, self.dtype, self.device, blocked=blocked, group=group)
        for spec, found in zip(specs, stored, strict=True):
            if not self._take_over(weight, spec, found):
                return None
        return weight

    def _take_over(self, weight: Int4Weight, spec: TensorSpec, stored: Stored) -> bool:
        source = open_source(self.reader, spec, stored)
        if not isinstance(source, PackedRows) or source.order is not None:
            return False
        for first, count in _chunks(spec):
            at = slice(first, first + count)
            numbers = source.numbers(first, count).to(self.device)
            scales, zeros = source.scales[at].to(self.device), source.zeros[at].to(self.device)
            weight.keep(spec.row + first, numbers, scales, zeros)
        return True


def _pieces(specs: list[TensorSpec]) -> list[int]:
    """Rows of each matrix that is used on its own."""
    return [spec.shape[0] // (spec.stack or 1) for spec in specs for _ in range(spec.stack or 1)]


def _chunks(spec: TensorSpec) -> Iterable[tuple[int, int]]:
    """(first, count) of rows read together: whole blocks, and no more than a buffer's worth."""
    rows, width = spec.shape
    step = min(CHUNK_ROWS, max(BLOCK_ROWS, CHUNK_ELEMENTS // width // BLOCK_ROWS * BLOCK_ROWS))
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]
