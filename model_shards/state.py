"""A session's state as bytes: rows of the KV cache by layer and position, and what the last stage must remember.

The state travels in parts, each whole by itself: a header that names model, dtype, layers and positions, then the rows.
Parts of different layers may come from different engines and in any order; those of one layer come in the order of
their positions. `decode_part` is pure and total: a part or a StateError. Knows no engine and no network.

Version 1, little-endian: ``b"SKVS"``, version u16, zero u16, header bytes u32, a JSON header, zeros up to a multiple
of 16, then for each layer its keys [n, heads, key_width] and values [n, heads, value_width], then the tokens so far
(int32) and the sum of a mean (float64), where the header names them.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from model_shards.config import CONTEXT_MAX, LAYERS_MAX, ModelConfig
from model_shards.dtypes import dtype_name, is_finite, tensor_from_bytes
from model_shards.errors import LocalFault, StateError
from model_shards.kv import SessionKv, stored_shape
from model_shards.kv_int8 import scales
from model_shards.pooling import Pooled
from model_shards.sampler import Said

VERSION = 1
PART_BYTES_MAX = 1 << 20
HEADER_BYTES_MAX = 4096
_MAGIC = b"SKVS"
_START = struct.Struct("<4sHHI")
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """What one engine's parts have in common: whose rows, of which dtype and shape (heads, key and value widths) as
    they are stored; ``quantised`` as `kv_int8` does."""

    model: str
    dtype: torch.dtype
    kv_shape: tuple[int, int, int]
    hidden: int
    quantised: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one position of one layer."""
        heads, key_width, value_width = self.kv_shape
        return heads * (key_width + value_width) * self.dtype.itemsize


def layout_of(config: ModelConfig, dtype: torch.dtype, identity: str, kv_quant: str = "none") -> Layout:
    """The layout of a model's cache. ``identity`` names its weights, which the config cannot tell apart."""
    heads, key_width, value_width = config.kv_shape
    stored, key_width, value_width = stored_shape(dtype, key_width, value_width, kv_quant)
    if kv_quant != "none":
        identity = f"{identity} {dtype_name(dtype)}"  # which the stored rows do not show
    shape = (
        identity, config.family, config.layers, config.hidden, config.heads, config.kv_shape, config.vocab,
        config.ropes, config.layer_ropes, config.windows, config.latent, config.sinks,
    )  # fmt: skip
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=8).hexdigest()
    return Layout(
        f"{config.family}-{config.layers}x{config.hidden}-{digest}",
        stored, (heads, key_width, value_width), config.hidden, kv_quant != "none",
    )  # fmt: skip


@dataclass(slots=True)
class Part:
    """Rows of layers [start, end) and positions [first, last): ``rows`` has each layer's keys and values, on the CPU.
    ``said`` and ``pooled`` come with the last layer's last positions; ``adapter`` names what the session had."""

    start: int
    end: int
    first: int
    last: int
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    said: Said | None = None
    pooled: Pooled | None = None
    adapter: str = ""

    def check_said(self, most: int, vocab: int) -> None:
        """Raises StateError for remembered tokens that cannot be: more than ``most``, or outside the vocabulary."""
        tokens = self.said.tokens if self.said is not None else []
        if len(tokens) > most:
            raise StateError("said", f"{len(tokens)} tokens", f"at most {most}")
        if tokens and not -1 <= min(tokens) <= max(tokens) < vocab:
            raise StateError("said", (min(tokens), max(tokens)), f"tokens from -1 to {vocab - 1}")


def cut(layout: Layout, start: int, end: int, first: int, last: int, bytes_max: int) -> Iterator[Part]:
    """Empty parts of at most ``bytes_max`` bytes of rows (one row at least) that make up the whole."""
    positions = max(1, min(last - first, bytes_max // layout.row_bytes))
    layers = max(1, bytes_max // (positions * layout.row_bytes)) if positions == last - first else 1
    for layer in range(start, end, layers):
        for position in range(first, last, positions):
            yield Part(layer, min(layer + layers, end), position, min(position + positions, last))


def encode_part(layout: Layout, part: Part, kv: SessionKv) -> memoryview:
    """The part's bytes, its rows read from ``kv``."""
    if sys.byteorder != "little":
        raise LocalFault("session state travels little-endian; this machine is big-endian")
    tokens = [] if part.said is None else part.said.tokens
    header: dict[str, Any] = {
        "model": layout.model,
        "dtype": dtype_name(layout.dtype),
        "kv": layout.kv_shape,
        "layers": (part.start, part.end),
        "positions": (part.first, part.last),
    }
    if part.said is not None:
        header["said"] = len(tokens), part.said.prompt_tokens
    if part.pooled is not None:
        header["pooled"] = part.pooled.count
    if part.adapter:
        header["adapter"] = part.adapter
    text = json.dumps(header, separators=(",", ":")).encode()
    at = -(-(_START.size + len(text)) // _ALIGN) * _ALIGN
    rows_bytes = (part.end - part.start) * (part.last - part.first) * layout.row_bytes
    tail_bytes = 4 * len(tokens) + (8 * layout.hidden if part.pooled is not None else 0)
    buffer = bytearray(at + rows_bytes + tail_bytes)
    _START.pack_into(buffer, 0, _MAGIC, VERSION, 0, len(text))
    buffer[_START.size : _START.size + len(text)] = text
    for layer in range(part.start, part.end):
        for rows in kv.get(layer, part.first, part.last):
            target = torch.frombuffer(buffer, dtype=layout.dtype, count=rows.numel(), offset=at)
            target.view(rows.shape).copy_(rows)
            at += rows.nbytes
    if tokens:
        buffer[at : at + 4 * len(tokens)] = struct.pack(f"<{len(tokens)}i", *tokens)
        at += 4 * len(tokens)
    if part.pooled is not None and part.pooled.total is not None:
        torch.frombuffer(buffer, dtype=torch.float64, offset=at).copy_(part.pooled.total)
    return memoryview(buffer)


def decode_part(layout: Layout, data: bytes | bytearray | memoryview) -> Part:
    """The part that ``data`` holds, its rows sharing memory with it where that can be. Raises StateError for bytes that
    are no part, or one of another version, model, dtype or shape."""
    view = memoryview(data).cast("B")
    if len(view) < _START.size:
        raise StateError("length", f"{len(view)} bytes", f"at least {_START.size}")
    magic, version, _, header_bytes = _START.unpack_from(view)
    if magic != _MAGIC:
        raise StateError("beginning", magic, str(_MAGIC))
    if version != VERSION:
        raise StateError("version", version, str(VERSION))
    at = -(-(_START.size + header_bytes) // _ALIGN) * _ALIGN
    if header_bytes > HEADER_BYTES_MAX or at > len(view):
        most = min(HEADER_BYTES_MAX, len(view) - _START.size)
        raise StateError("header", f"{header_bytes} bytes", f"at most {most}")
    header = _read_header(bytes(view[_START.size : _START.size + header_bytes]))
    expected = {"model": layout.model, "dtype": dtype_name(layout.dtype), "kv": list(layout.kv_shape)}
    for name, right in expected.items():
        if header.get(name) != right:
            raise StateError(name, header.get(name), repr(right))
    start, end = _pair(header, "layers", LAYERS_MAX)
    first, last = _pair(header, "positions", CONTEXT_MAX)
    if start >= end or first >= last:
        raise StateError("layers and positions", ((start, end), (first, last)), "two that are not empty")
    tokens, prompt_tokens = _pair(header, "said", CONTEXT_MAX) if "said" in header else (0, 0)
    pooled = header.get("pooled")
    if pooled is not None and not _is_count(pooled, CONTEXT_MAX):
        raise StateError("pooled", pooled, f"a whole number up to {CONTEXT_MAX}")
    adapter = header.get("adapter", "")
    if not isinstance(adapter, str):
        raise StateError("adapter", adapter, "a name")
    part = Part(start, end, first, last, adapter=adapter)
    wanted = (end - start) * (last - first) * layout.row_bytes
    tail_bytes = 4 * tokens + (8 * layout.hidden if pooled is not None else 0)
    if len(view) - at != wanted + tail_bytes:
        raise StateError("rows", f"{len(view) - at} bytes", f"{wanted + tail_bytes}")
    _read_rows(layout, part, view[at : at + wanted])
    rest = view[at + wanted :]
    if "said" in header:
        part.said = Said(list(struct.unpack(f"<{tokens}i", rest[: 4 * tokens])), prompt_tokens)
    if pooled is not None:
        part.pooled = Pooled(pooled, _numbers("float64", (layout.hidden,), rest[4 * tokens :]))
    return part


def _read_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise StateError("header", text[:40], "a JSON object")
    return header


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _pair(header: dict[str, Any], name: str, most: int) -> tuple[int, int]:
    value = header.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(_is_count(item, most) for item in value):
        raise StateError(name, value, f"two whole numbers up to {most}")
    return value[0], value[1]


def _read_rows(layout: Layout, part: Part, view: memoryview) -> None:
    heads, *widths = layout.kv_shape
    count, at = part.last - part.first, 0
    for _ in range(part.start, part.end):
        found = []
        for width in widths:
            size = count * heads * width * layout.dtype.itemsize
            rows = _numbers(dtype_name(layout.dtype), (count, heads, width), view[at : at + size])
            if layout.quantised and count and not is_finite(scales(rows)):
                raise StateError("rows", "scales that are not finite", "finite ones")
            found.append(rows)
            at += size
        part.rows.append((found[0], found[1]))


def _numbers(dtype: str, shape: tuple[int, ...], data: memoryview) -> torch.Tensor:
    if dtype == "float64":
        found = torch.frombuffer(bytearray(data), dtype=torch.float64).view(shape)
    else:
        found = tensor_from_bytes(dtype, shape, data)
    if math.prod(shape) and not is_finite(found):
        raise StateError("rows", "numbers that are not finite", "finite ones")
    return found


@dataclass(slots=True)
class Arrivals:
    """How far each layer of a session has come while parts of its state arrive."""

    start: int
    filled: list[int]

    @classmethod
    def of(cls, kv: SessionKv) -> Arrivals:
        """Nothing beyond what the session holds."""
        return cls(kv.start, [kv.length] * (kv.end - kv.start))

    def check(self, part: Part, tokens_max: int) -> None:
        """Raises StateError for a part that does not go on where its layers, all of them the session's, stand."""
        for layer in range(part.start, part.end):
            if part.first != self.filled[layer - self.start]:
                raise StateError(
                    "positions",
                    (part.first, part.last),
                    f"layer {layer} from {self.filled[layer - self.start]} on",
                )
        if part.last > tokens_max:
            raise StateError("positions", (part.first, part.last), f"at most {tokens_max}, as reserved")

    def took(self, part: Part) -> int | None:
        """The part's rows are in place; returns the session's position once all layers stand there."""
        for layer in range(part.start, part.end):
            self.filled[layer - self.start] = part.last
        return self.filled[0] if len(set(self.filled)) == 1 else None
