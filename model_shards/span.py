"""A span: the layers [start, end) of one model in memory, with the embedding and the head where they belong.

`load_span` reads only the span's bytes. Knows weights and shapes; sessions, caches and batches are the
engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model_shards.checkpoint import CheckpointIndex, check_span
from model_shards.config import ModelConfig
from model_shards.dtypes import dtype_named
from model_shards.errors import LocalFault, ModelError
from model_shards.families import embed_tensors, head_tensors, layer_tensors
from model_shards.layers import DecoderLayer, Linear, RmsNorm, build_layer
from model_shards.weights import TensorReader, load_parts

QUANTS = ("none",)


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
    embed_weight: torch.Tensor | None
    norm: RmsNorm | None
    head: Linear | None
    ranges_read: list[tuple[str, int, int]]

    @property
    def bytes_read(self) -> int:
        return sum(end - start for _, start, end in self.ranges_read)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all linear weights and tables held, tied ones once."""
        total = sum(linear.bytes for layer in self.layers for linear in layer.linears())
        if self.embed_weight is not None:
            total += self.embed_weight.nbytes
        if self.head is not None and self.head.weight is not self.embed_weight:
            total += self.head.bytes
        return total

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [n] int64 -> [n, hidden]. Only where the span starts at 0."""
        if self.embed_weight is None:
            raise LocalFault(f"span [{self.start}, {self.end}) holds no embedding")
        hidden = F.embedding(tokens, self.embed_weight)
        if self.config.embed_scale is None:
            return hidden
        # The scale is rounded to the compute dtype first, as Gemma was trained.
        return hidden * torch.tensor(self.config.embed_scale, dtype=self.dtype, device=self.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [n, hidden] -> [n, vocab] float32. Only where the span ends with the
        model."""
        if self.norm is None or self.head is None:
            raise LocalFault(f"span [{self.start}, {self.end}) holds no head")
        scores = self.head(self.norm(hidden))
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
) -> Span:
    """Loads layers [start, end) into ``device`` in ``dtype``; only the span's byte ranges of the files are
    read.

    ``progress(done, total)`` is called with bytes after each piece; what it raises ends the load. Raises
    CheckpointError, LocalFault (span or dtype), ModelError (quant).
    """
    check_span(config, start, end)
    kind, place = dtype_named(dtype), torch.device(device)
    if quant not in QUANTS:
        raise ModelError(f"quant {quant!r} is not available, expected one of {', '.join(QUANTS)}")
    ranges = index.span_ranges(config, start, end)
    total = sum(last - first for found in ranges.values() for first, last in found)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    with torch.inference_mode(), TensorReader(dir, index, report) as reader:
        embed = load_parts(reader, embed_tensors(config), kind, place)["embed"] if start == 0 else None
        layers = [
            build_layer(config, layer, load_parts(reader, layer_tensors(config, layer), kind, place), kind)
            for layer in range(start, end)
        ]
        norm, head = None, None
        if end == config.layers:
            shared = {"embed": embed} if config.tied and embed is not None else {}
            specs = [spec for spec in head_tensors(config) if spec.part not in shared]
            parts = load_parts(reader, specs, kind, place) | shared
            norm = RmsNorm(parts["norm"], config.norm_eps, kind, config.norm_offset)
            head = Linear(parts["head"] if "head" in parts else parts["embed"])
        return Span(config, start, end, kind, place, layers, embed, norm, head, reader.ranges_read)


def shape_of(config: ModelConfig, index: CheckpointIndex, dtype: str) -> dict[str, Any]:
    """The model's shape as phase 1 of the scheduler wants it: bytes in ``dtype`` (what serving will hold in
    memory), floating-point operations of one layer for one token (two a weight), and bytes that travel or are
    cached a token. Reads headers only; raises CheckpointError for a missing or misshapen tensor."""
    index.span_ranges(config, 0, config.layers)
    itemsize = dtype_named(dtype).itemsize

    def elements(specs: Any) -> int:
        return sum(torch.Size(spec.shape).numel() for spec in specs)

    layer = max(elements(layer_tensors(config, at)) for at in range(config.layers))
    idle_experts = config.experts - config.experts_per_token
    idle = 3 * config.hidden * config.expert_width * idle_experts
    embed = elements(embed_tensors(config))
    return {
        "layers": config.layers,
        "layer_bytes": layer * itemsize,
        "embed_bytes": embed * itemsize,
        "head_bytes": elements(head_tensors(config)) * itemsize,
        "tied": config.tied,
        "layer_flops_per_token": 2.0 * (layer - idle),
        "hidden_bytes": config.hidden * itemsize,
        "kv_bytes_per_token_per_layer": 2 * config.kv_heads * config.head_dim * itemsize,
    }
