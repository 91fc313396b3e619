"""A span: the layers [start, end) of one model in memory, with the embedding and the head where they belong.

`load_span` reads only the span's bytes. Knows weights and shapes; sessions, caches and batches are the
engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model_shards.checkpoint import CheckpointIndex, check_span
from model_shards.config import ModelConfig
from model_shards.dtypes import dtype_named
from model_shards.errors import LocalFault
from model_shards.families import TensorSpec, embed_tensors, head_tensors, layer_tensors
from model_shards.kv import kv_row_bytes
from model_shards.layers import DecoderLayer, build_layer
from model_shards.linear import AnyLinear, PackedLinear, RmsNorm, linear_over
from model_shards.lowrank import Tuned
from model_shards.mapped import mapped_table
from model_shards.quant import QUANTS, Int8Weight
from model_shards.reader import TensorReader
from model_shards.weight_cache import WeightCache
from model_shards.weights import Part, held_bytes, load_parts, packed_matrix


@dataclass(slots=True)
class Span:
    """Layers [start, end) of ``config``'s model. ``embed_weight`` iff start is 0; ``norm`` and ``head`` iff
    end is the last layer. ``bytes_read`` counts the checkpoint bytes that loading read, ``ranges_read`` lists
    them."""

    config: ModelConfig
    start: int
    end: int
    dtype: torch.dtype
    device: torch.device
    layers: list[DecoderLayer]
    embed_weight: Part | None
    norm: RmsNorm | None
    head: AnyLinear | None
    ranges_read: list[tuple[str, int, int]]

    @property
    def bytes_read(self) -> int:
        """Checkpoint bytes that loading read."""
        return sum(end - start for _, start, end in self.ranges_read)

    @property
    def embed_bytes(self) -> int:
        """Bytes of the embedding in memory, tied to the head or not."""
        if self.embed_weight is None or (self.config.tied and isinstance(self.head, PackedLinear)):
            return 0
        return self.embed_weight.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all linear weights and tables held, tied ones once."""
        total = sum(linear.bytes for layer in self.layers for linear in layer.linears())
        total += self.embed_bytes
        if self.head is not None and self.head.weight is not self.embed_weight:
            total += self.head.bytes
        return total

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [n] int64 -> [n, hidden]. Only where the span starts at 0."""
        if self.embed_weight is None:
            raise LocalFault(f"span [{self.start}, {self.end}) holds no embedding")
        if isinstance(self.embed_weight, torch.Tensor):
            hidden = F.embedding(tokens, self.embed_weight)
        elif isinstance(self.embed_weight, Int8Weight):
            hidden = self.embed_weight.gather(tokens)
        else:
            raise LocalFault("an embedding is never int4")
        if self.config.embed_scale is None:
            return hidden
        # The scale is rounded to the compute dtype first, as Gemma was trained.
        return hidden * torch.tensor(self.config.embed_scale, dtype=self.dtype, device=self.device)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [n, hidden] after the final norm, in the compute dtype. Only where the span
        ends with the model."""
        if self.norm is None:
            raise LocalFault(f"span [{self.start}, {self.end}) holds no final norm")
        return self.norm(hidden)

    def logits(self, hidden: torch.Tensor, tuned: Tuned | None = None) -> torch.Tensor:
        """The last layer's output [n, hidden] -> [n, vocab] float32, with what adapters add to the head. Only where
        the span ends with the model."""
        if self.head is None:
            raise LocalFault(f"span [{self.start}, {self.end}) holds no head")
        rows = self.normed(hidden)
        scores = self.head(rows)
        if tuned is not None:
            tuned.at(self.config.layers).add("head", rows, scores)
        if self.config.logit_cap is not None:
            scores = torch.tanh(scores / self.config.logit_cap) * self.config.logit_cap
        return scores.float()


def load_span(
    dir: Path,
    index: CheckpointIndex,
    config: ModelConfig,
    start: int,
    end: int,
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    quant: str = "none",
    progress: Callable[[int, int], None] | None = None,
    cache: WeightCache | None = None,
    scratch: Path | None = None,
) -> Span:
    """Loads layers [start, end) into ``device`` in ``dtype``, its matrices in ``quant``; only the span's byte
    ranges of the files are read. Matrices that are packed in four bits stay so where that can be, whatever
    ``quant`` says. What is quantised here is kept in ``cache`` and next time taken from there.

    Where the head is packed and tied to the embedding, the embedding's rows lie in a file of no name in ``scratch``
    (None: where the system keeps temporary files).

    ``progress(done, total)`` is called with bytes after each piece; what it raises ends the load. Raises
    CheckpointError, LocalFault (span, dtype or quant).
    """
    check_span(config, start, end)
    kind, place = dtype_named(dtype), torch.device(device)
    if quant not in QUANTS:
        raise LocalFault(f"quant {quant!r}, expected one of {', '.join(QUANTS)}")
    ranges = index.span_ranges(config, start, end)
    total = sum(last - first for found in ranges.values() for first, last in found)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress:
            progress(done, total)

    with torch.inference_mode(), TensorReader(dir, index, report, config.packing) as reader:
        embed = (
            load_parts(reader, embed_tensors(config), kind, place, quant, cache)["embed"]
            if start == 0
            else None
        )
        layers = [
            build_layer(
                config,
                layer,
                load_parts(reader, layer_tensors(config, layer), kind, place, quant, cache),
                kind,
            )
            for layer in range(start, end)
        ]
        norm, head = None, None
        if end == config.layers:
            shared = {"embed": embed} if config.tied and embed is not None else {}
            specs = [spec for spec in head_tensors(config) if spec.part not in shared]
            parts = load_parts(reader, specs, kind, place, quant, cache) | shared
            weight = parts.pop("norm")
            if isinstance(weight, torch.Tensor):
                norm = RmsNorm(weight, config.norm_eps, kind, config.norm_offset, wide=config.wide_norms)
            matrix = parts.pop("head") if "head" in parts else parts.pop("embed")
            projection = packed_matrix(matrix)
            if projection is not matrix and embed is not None and config.tied:
                embed = _looked_up(matrix, scratch)
            head = linear_over(projection)
        return Span(config, start, end, kind, place, layers, embed, norm, head, reader.ranges_read)


def _looked_up(table: Part, scratch: Path | None) -> Part:
    """``table`` with its rows in a file: only single ones are read."""
    if isinstance(table, Int8Weight):
        table.q = mapped_table(table.q, scratch)
        return table
    return mapped_table(table, scratch) if isinstance(table, torch.Tensor) else table


def shape_of(
    config: ModelConfig, index: CheckpointIndex, dtype: str, quant: str = "none", kv_quant: str = "none"
) -> dict[str, Any]:
    """The model's shape as phase 1 of the scheduler wants it: bytes in ``dtype`` and ``quant`` (what serving
    will hold in memory), of one expert of a layer where there are any, floating-point operations of one layer
    for one token (two a weight), and bytes that travel or are cached a token. Reads headers only; raises
    CheckpointError for a missing or misshapen tensor."""
    index.span_ranges(config, 0, config.layers)
    itemsize = dtype_named(dtype).itemsize

    def held(specs: Iterable[TensorSpec]) -> int:
        return held_bytes(index, config.packing, specs, quant, itemsize)

    def used(layer: int) -> int:
        """Weights of ``layer`` that one token meets."""
        every = sum(spec.elements for spec in layers[layer])
        idle = 3 * config.hidden * config.expert_width * (config.experts - config.experts_per_token)
        return every - idle if config.sparse and config.sparse[layer] else every

    layers = [layer_tensors(config, at) for at in range(config.layers)]
    experts = max(held([spec for spec in specs if spec.part.startswith("experts.")]) for specs in layers)
    return {
        "layers": config.layers,
        "layer_bytes": max(held(specs) for specs in layers),
        "experts": config.experts,
        "experts_per_token": config.experts_per_token,
        "expert_bytes": experts // max(1, config.experts),
        "embed_bytes": held(embed_tensors(config)),
        "head_bytes": held(head_tensors(config)),
        "tied": config.tied,
        "layer_flops_per_token": 2.0 * max(used(layer) for layer in range(config.layers)),
        "hidden_bytes": config.hidden * itemsize,
        "kv_bytes_per_token_per_layer": kv_row_bytes(config.kv_shape, dtype_named(dtype), kv_quant),
    }
