"""LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, checked against their base.

Everything is checked by headers alone, so that a node which has only the ranges of its own layers can do it; the values
are checked as they are loaded. What would not be served as it was trained is refused, never guessed. What the matrices
add to a layer is `lowrank.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_shards.checkpoint import CheckpointIndex, check_span
from model_shards.config import ModelConfig
from model_shards.dtypes import dtype_named
from model_shards.errors import CheckpointError
from model_shards.families import TensorSpec, layer_tensors
from model_shards.families.base import EMBED, HEAD
from model_shards.fields import Fields, read_json_object
from model_shards.lowrank import Adapter, Delta, Place
from model_shards.packing import LOADABLE
from model_shards.reader import TensorReader
from model_shards.safetensors_header import TensorInfo, coalesce, read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RANK_MAX = 4096
TARGETS_MAX = 4096
_PREFIX = "base_model.model."
_SUFFIXES = ".lora_A.weight", ".lora_B.weight"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
# Fields that change what is computed, with the values under which they do not.
_REFUSED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says. ``targets`` are the ends of modules' names, None where it gives a pattern;
    ``layers`` are those it is limited to, None for all; ``complete``: nothing else is left out. ``base`` names the
    model it was trained on."""

    base: str
    rank: int
    alpha: float
    root: bool
    targets: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    complete: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def from_dir(cls, directory: Path) -> AdapterConfig:
        """Reads ``directory``/adapter_config.json. Raises ConfigError."""
        return cls.from_dict(read_json_object(directory / ADAPTER_CONFIG))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Builds it from parsed JSON. Raises ConfigError naming field, value and what is right."""
        fields = Fields(values, file=ADAPTER_CONFIG)
        if fields.text("peft_type", "LORA").upper() != "LORA":
            raise fields.bad("peft_type", "LORA")
        for name, harmless in _REFUSED.items():
            if fields.has(name) and fields.raw(name) not in harmless:
                right = " or ".join([*map(repr, harmless[:1]), "null"])
                raise fields.bad(name, f"{right}: such adapters are not served")
        start = fields.raw("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise fields.bad(
                "init_lora_weights", "an adapter of the unchanged base: convert it as PEFT describes"
            )
        targets = fields.raw("target_modules")
        if isinstance(targets, list):
            if not 0 < len(targets) <= TARGETS_MAX or not all(map(_is_plain, targets)):
                raise fields.bad("target_modules", f"a pattern, or 1 to {TARGETS_MAX} names of modules")
        elif not isinstance(targets, str):
            raise fields.bad("target_modules", "a pattern or a list of names")
        layers = fields.integers("layers_to_transform", 0, 1 << 16)
        return cls(
            fields.text("base_model_name_or_path", ""),
            fields.integer("r", 1, RANK_MAX),
            fields.number("lora_alpha", -1e6, 1e6),
            fields.flag("use_rslora", False),
            tuple(targets) if isinstance(targets, list) else None,
            layers or None,
            not fields.raw("exclude_modules"),
            {name: given.integer(name, 1, RANK_MAX) for given, name in _patterns(fields, "rank_pattern")},
            {name: given.number(name, -1e6, 1e6) for given, name in _patterns(fields, "alpha_pattern")},
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return next((rank for end, rank in self.ranks.items() if _ends(module, end)), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied with."""
        alpha = next((alpha for end, alpha in self.alphas.items() if _ends(module, end)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.root else alpha / rank


@dataclass(frozen=True, slots=True)
class _Module:
    """A matrix of the base that may have an adapter: rows [row, row + shape[0]) of ``part`` of ``layer``, or ``why``
    it may not."""

    name: str
    shape: tuple[int, int]
    layer: int
    part: str
    row: int
    why: str = ""


class AdapterIndex:
    """The matrices of one adapter directory and the parts of ``base`` they change, from headers alone."""

    def __init__(self, directory: Path, base: ModelConfig) -> None:
        """Raises ConfigError and CheckpointError for an adapter of another base, or one that cannot be served."""
        self.directory = directory
        self.base = base
        self.config = AdapterConfig.from_dir(directory)
        path = directory / ADAPTER_WEIGHTS
        if not path.exists():
            raise CheckpointError(ADAPTER_WEIGHTS, None, f"missing from {directory}")
        header = read_header(path)
        size = path.stat().st_size
        if size != header.file_bytes:
            raise CheckpointError(ADAPTER_WEIGHTS, None, f"{size} bytes, its header says {header.file_bytes}")
        self._files = CheckpointIndex(directory, {ADAPTER_WEIGHTS: header}, None)
        self._pairs = self._read_pairs(header.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all matrices in the file."""
        return sum(info.end - info.start for _, infos in self._pairs for info in infos)

    def cuts(self) -> dict[str, list[int]]:
        """See `CheckpointIndex.cuts`."""
        return self._files.cuts()

    def held_bytes(self, start: int, end: int, dtype: str) -> int:
        """Bytes that the matrices of layers [start, end) take when loaded."""
        numbers = sum(math.prod(info.shape) for _, infos in self._within(start, end) for info in infos)
        return numbers * dtype_named(dtype).itemsize

    def span_ranges(self, start: int, end: int) -> dict[str, list[tuple[int, int]]]:
        """Byte ranges of the matrices that layers [start, end) need, by file; none where it changes none of them."""
        check_span(self.base, start, end)
        found = [(info.start, info.end) for _, infos in self._within(start, end) for info in infos]
        return {ADAPTER_WEIGHTS: coalesce(found)} if found else {}

    def load(
        self, name: str, start: int, end: int, *, device: str = "cpu", dtype: str = "bfloat16"
    ) -> Adapter:
        """The adapter of layers [start, end), called ``name``. Raises CheckpointError for values that are not finite,
        LocalFault for a span outside the base."""
        check_span(self.base, start, end)
        kind, place = dtype_named(dtype), torch.device(device)
        parts: dict[tuple[int, str], list[tuple[_Module, torch.Tensor, torch.Tensor]]] = {}
        with torch.inference_mode(), TensorReader(self.directory, self._files) as reader:
            for module, (down, up) in self._within(start, end):
                pair = []
                for info, scale, at in ((down, 1.0, 0), (up, self.config.scale_of(module.name), 1)):
                    values = torch.empty(info.shape)
                    tensor = _PREFIX + module.name + _SUFFIXES[at]
                    reader.read_into(tensor, info, values)
                    pair.append(_fit(values * scale, kind, info, tensor).to(place))
                parts.setdefault((module.layer, module.part), []).append((module, pair[0], pair[1]))
            deltas = {key: _fused(sorted(found, key=lambda one: one[0].row)) for key, found in parts.items()}
        return Adapter(name, start, end, kind, deltas)

    def _within(self, start: int, end: int) -> list[tuple[_Module, tuple[TensorInfo, TensorInfo]]]:
        last = end + 1 if end == self.base.layers else end
        return [pair for pair in self._pairs if start <= pair[0].layer < last]

    def _read_pairs(
        self, tensors: Mapping[str, TensorInfo]
    ) -> list[tuple[_Module, tuple[TensorInfo, TensorInfo]]]:
        modules = {module.name: module for module in _modules(self.base)}
        for name, info in tensors.items():
            self._check_known(name, info, modules)
        names = {name.removeprefix(_PREFIX).removesuffix(end) for name in tensors for end in _SUFFIXES}
        found = [modules[name] for name in sorted(names & set(modules))]
        if not found:
            raise CheckpointError(ADAPTER_WEIGHTS, None, "holds no matrices")
        self._check_targets(modules, {module.name for module in found})
        return [(module, self._pair(module, tensors)) for module in found]

    def _check_known(self, name: str, info: TensorInfo, modules: Mapping[str, _Module]) -> None:
        suffix = next((end for end in _SUFFIXES if name.endswith(end)), "")
        if not name.startswith(_PREFIX) or not suffix:
            right = f"{_PREFIX}MODULE{_SUFFIXES[0]} or {_SUFFIXES[1]}"
            raise CheckpointError(ADAPTER_WEIGHTS, name, f"is no matrix of an adapter, expected {right}")
        module = modules.get(name.removeprefix(_PREFIX).removesuffix(suffix))
        if module is None:
            layers = f"{self.base.layers} layers of a {self.base.family}"
            raise CheckpointError(ADAPTER_WEIGHTS, name, f"the base ({layers}) has no such module")
        if module.why:
            raise CheckpointError(ADAPTER_WEIGHTS, name, module.why)

    def _check_targets(self, modules: Mapping[str, _Module], found: set[str]) -> None:
        """Every target is there on every layer it should be on. Experts may be stored in ways of their own."""
        wanted = None if self.config.layers is None else set(self.config.layers)
        for target in self.config.targets or ():
            named = [module for module in modules.values() if _ends(module.name, target)]
            if not named:
                raise CheckpointError(
                    ADAPTER_CONFIG, None, f"target_modules names {target!r}, but the base has no such module"
                )
            for module in named:
                expected = wanted is None or module.layer in wanted or module.layer == self.base.layers
                if (
                    expected
                    and self.config.complete
                    and module.name not in found
                    and not module.part.startswith("experts.")
                ):
                    name = _PREFIX + module.name + _SUFFIXES[0]
                    raise CheckpointError(
                        ADAPTER_WEIGHTS, name, f"missing, though target_modules names {target!r}"
                    )

    def _pair(self, module: _Module, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
        rank = self.config.rank_of(module.name)
        found = []
        for suffix, shape in zip(_SUFFIXES, ((rank, module.shape[1]), (module.shape[0], rank)), strict=True):
            name = _PREFIX + module.name + suffix
            info = tensors.get(name)
            if info is None:
                raise CheckpointError(ADAPTER_WEIGHTS, name, "missing, though its other half is there")
            if info.dtype not in LOADABLE:
                raise CheckpointError(
                    ADAPTER_WEIGHTS, name, f"dtype {info.dtype}, expected one of {', '.join(LOADABLE)}"
                )
            if info.shape != shape:
                raise CheckpointError(
                    ADAPTER_WEIGHTS,
                    name,
                    f"shape {list(info.shape)}, the base and rank {rank} imply {list(shape)}",
                )
            found.append(info)
        return found[0], found[1]


def _fit(values: torch.Tensor, dtype: torch.dtype, info: TensorInfo, name: str) -> torch.Tensor:
    kept = values.to(dtype)
    if not bool(torch.isfinite(kept).all()):
        wrong = values[~torch.isfinite(kept)][0].item()
        raise CheckpointError(info.file, name, f"contains {wrong:g} after scaling, too large for {dtype}")
    return kept


def _fused(found: Iterable[tuple[_Module, torch.Tensor, torch.Tensor]]) -> Delta:
    """One Delta of the modules that are rows of one part."""
    downs, ups, places = [], [], list[Place]()
    for module, down, up in found:
        downs.append(down)
        ups.append(up)
        places.append((module.row, module.shape[0], down.shape[0]))
    return Delta(torch.cat(downs), tuple(ups), tuple(places))


def _modules(base: ModelConfig) -> Iterable[_Module]:
    """Every matrix of the base by the name of its module."""
    for layer in range(base.layers):
        for spec in layer_tensors(base, layer):
            if len(spec.shape) == 2 and not spec.stack and spec.name.endswith(".weight"):
                yield _module(base, layer, spec)
    shape = base.vocab, base.hidden
    yield _Module(HEAD.removesuffix(".weight"), shape, base.layers, "head", 0)
    why = "an embedding's adapter is not served"
    yield _Module(EMBED.removesuffix(".weight"), shape, base.layers, "embed", 0, why)


def _module(base: ModelConfig, layer: int, spec: TensorSpec) -> _Module:
    name, shape = spec.name.removesuffix(".weight"), (spec.shape[0], spec.shape[1])
    part, row, why = spec.part.removesuffix(".weight"), spec.row, ""
    if part in ("experts.gate_up", "experts.down"):
        rows = 2 * base.expert_width if part == "experts.gate_up" else base.hidden
        part, row = f"experts.{row // rows}.{part.removeprefix('experts.')}", row % rows
    elif part == "kv_b":
        why = "an adapter of latent attention's up-projection is not served: keys are never computed from it"
    elif part == "router":
        why = "an adapter of a router is not served"
    return _Module(name, shape, layer, part, row, why)


def _patterns(fields: Fields, name: str) -> list[tuple[Fields, str]]:
    given = fields.object(name)
    if given is None:
        return []
    wrong = [key for key in given.names() if not _is_plain(key)]
    if wrong:
        raise fields.bad(name, "plain ends of modules' names, no patterns")
    return [(given, key) for key in given.names()]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def _ends(module: str, end: str) -> bool:
    return module == end or module.endswith("." + end)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()
