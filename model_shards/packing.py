"""How checkpoints pack matrices, by names, shapes and dtypes: GPTQ, AWQ, compressed-tensors and MXFP4 in four bits,
DeepSeek's FP8 in eight.

`locate` finds the stored pieces of a logical matrix, plain or packed: whichever is there, so that lists of
layers that a method left out need not be read. Knows headers only; what the bits mean is `unpack.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model_shards.errors import CheckpointError
from model_shards.families.base import TensorSpec
from model_shards.fields import Fields
from model_shards.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from model_shards.checkpoint import CheckpointIndex

LOADABLE = ("BF16", "F16", "F32")
METHODS = ("gptq", "awq", "compressed-tensors", "mxfp4", "fp8")
FIRST_PIECE = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
# Inputs a scale that torch's packed int4 kernel takes.
KERNEL_GROUPS = (256, 128, 64, 32)
MXFP4_GROUP = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """``group``: inputs that share a scale, 0 for a whole row. ``reordered``: inputs belong to groups in an
    order of their own. ``zeros_less_one``: zeros are stored one lower than they are (GPTQ's first format). ``block``:
    rows and inputs that share a scale (FP8)."""

    method: str
    group: int = 0
    reordered: bool = False
    zeros_less_one: bool = False
    block: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a matrix's values are: ``method`` is one of METHODS or "plain"; ``pieces`` are its tensors, by
    role, as (name, place)."""

    method: str
    pieces: Mapping[str, tuple[str, TensorInfo]] = field(default_factory=dict)

    @property
    def main(self) -> tuple[str, TensorInfo]:
        """Name and place of the first piece."""
        return next(iter(self.pieces.values()))


def read_packing(fields: Fields) -> Packing | None:
    """`quantization_config`, or None where there is none. Raises ConfigError for what cannot be read."""
    given = fields.object("quantization_config")
    if given is None:
        return None
    method = given.text("quant_method").replace("_", "-")
    if method not in METHODS:
        raise given.bad("quant_method", f"one of {', '.join(METHODS)}")
    if method == "mxfp4":
        return Packing(method, MXFP4_GROUP)
    if method == "compressed-tensors":
        return _read_compressed_tensors(given)
    if method == "fp8":
        return _read_fp8(given)
    given.integer("bits", 4, 4)
    group = _group(given)
    if method == "awq":
        if given.text("version", "gemm").lower() != "gemm":
            raise given.bad("version", "gemm")
        return Packing(method, group)
    form = given.text("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise given.bad("checkpoint_format", "gptq or gptq_v2")
    return Packing(method, group, given.flag("desc_act", False), zeros_less_one=form == "gptq")


def _read_fp8(given: Fields) -> Packing:
    if given.text("fmt", "e4m3") != "e4m3":
        raise given.bad("fmt", "e4m3")
    # How activations were rounded changes speed elsewhere; here they stay what they are.
    if given.text("activation_scheme", "dynamic") != "dynamic":
        raise given.bad("activation_scheme", "dynamic")
    block = given.integers("weight_block_size", 1, 1 << 20)
    if len(block) != 2:
        raise given.bad("weight_block_size", "two integers: rows and inputs that share a scale")
    return Packing("fp8", block=(block[0], block[1]))


def _group(given: Fields) -> int:
    return max(0, given.integer("group_size", -1, 1 << 20, -1))


def _read_compressed_tensors(given: Fields) -> Packing:
    if given.text("format") != "pack-quantized":
        raise given.bad("format", "pack-quantized")
    for name in ("kv_cache_scheme", "transform_config"):
        if given.raw(name):
            raise given.bad(name, "null")
    sparsity = given.object("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise sparsity.bad("format", "dense")
    groups = given.object("config_groups")
    found = {_read_scheme(groups, name) for name in groups.names()} if groups is not None else set()
    if len(found) != 1:
        raise given.bad("config_groups", "groups of one and the same scheme for weights")
    return found.pop()


def _read_scheme(groups: Fields, name: str) -> Packing:
    scheme = groups.object(name) or Fields({})
    weights = scheme.object("weights")
    if weights is None:
        raise scheme.bad("weights", "a scheme for weights")
    if scheme.raw("input_activations"):
        raise scheme.bad("input_activations", "null: weights only")
    weights.integer("num_bits", 4, 4)
    if weights.text("type", "int") != "int":
        raise weights.bad("type", "int")
    strategy = weights.text("strategy", "group" if weights.has("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise weights.bad("strategy", "group or channel")
    group = weights.integer("group_size", 1, 1 << 20) if strategy == "group" else 0
    return Packing("compressed-tensors", group, reordered=weights.raw("actorder") == "group")


def locate(index: CheckpointIndex, packing: Packing | None, spec: TensorSpec) -> Stored:
    """The pieces that ``spec`` is stored in, their shapes and dtypes checked. Raises CheckpointError."""
    if packing is not None and packing.method == "fp8":
        if index.has(spec.name) and index.tensor(spec.name).dtype == "F8_E4M3":
            return _locate_fp8(index, packing, spec)
        packing = None
    if packing is None or index.has(spec.name) or len(spec.shape) != 2:
        shape = spec.shape
        if spec.stack:
            shape = (spec.stack, spec.shape[1], spec.shape[0] // spec.stack)
        return Stored("plain", {"values": _piece(index, spec.name, shape, LOADABLE, "config.json implies")})
    if packing.method == "mxfp4":
        return _locate_mxfp4(index, spec)
    base = spec.name.removesuffix("weight")
    first = base + FIRST_PIECE[packing.method]
    if not index.has(first) or base == spec.name:
        files = ", ".join(index.files()[:3])
        raise CheckpointError(files, spec.name, f"missing from the checkpoint, and so is {first}")
    rows, width = spec.shape
    groups = -(-width // packing.group) if packing.group else 1
    if packing.method == "compressed-tensors":
        return Stored(packing.method, _compressed_tensors_pieces(index, base, rows, width, groups))
    if rows % 8 or width % 8:
        raise CheckpointError(index.tensor(first).file, first, f"shape {list(spec.shape)}, expected eights")
    words = (width // 8, rows) if packing.method == "gptq" else (width, rows // 8)
    pieces = {
        "words": _piece(index, first, words, ("I32",)),
        "zeros": _piece(index, base + "qzeros", (groups, rows // 8), ("I32",)),
        "scales": _piece(index, base + "scales", (groups, rows), LOADABLE),
    }
    if packing.method == "gptq" and index.has(base + "g_idx"):
        pieces["order"] = _piece(index, base + "g_idx", (width,), ("I32",))
    return Stored(packing.method, pieces)


def _compressed_tensors_pieces(
    index: CheckpointIndex, base: str, rows: int, width: int, groups: int
) -> dict[str, tuple[str, TensorInfo]]:
    pieces = {
        "words": _piece(index, base + "weight_packed", (rows, -(-width // 8)), ("I32",)),
        "scales": _piece(index, base + "weight_scale", (rows, groups), LOADABLE),
    }
    zeros = base + "weight_zero_point"
    if index.has(zeros):
        packed = index.tensor(zeros).dtype == "I32"
        shape = (-(-rows // 8) if packed else rows, groups)
        pieces["zeros"] = _piece(index, zeros, shape, ("I32", "I8"))
    if index.has(base + "weight_g_idx"):
        pieces["order"] = _piece(index, base + "weight_g_idx", (width,), ("I32", "I64"))
    if index.has(base + "weight_shape"):
        pieces["shape"] = _piece(index, base + "weight_shape", (2,), ("I64", "I32"))
    return pieces


def _locate_mxfp4(index: CheckpointIndex, spec: TensorSpec) -> Stored:
    rows, width = spec.shape
    blocks = spec.name + "_blocks"
    if not spec.stack or not index.has(blocks):
        files = ", ".join(index.files()[:3])
        raise CheckpointError(files, spec.name, f"missing from the checkpoint, and so is {blocks}")
    if width % MXFP4_GROUP:
        raise CheckpointError(
            index.tensor(blocks).file, blocks, f"width {width}, expected a multiple of {MXFP4_GROUP}"
        )
    shape = (spec.stack, rows // spec.stack, width // MXFP4_GROUP)
    return Stored(
        "mxfp4",
        {
            "words": _piece(index, blocks, (*shape, MXFP4_GROUP // 2), ("U8",)),
            "scales": _piece(index, spec.name + "_scales", shape, ("U8", "F8_E8M0")),
        },
    )


def _locate_fp8(index: CheckpointIndex, packing: Packing, spec: TensorSpec) -> Stored:
    info = index.tensor(spec.name)
    if len(spec.shape) != 2 or spec.stack:
        raise CheckpointError(info.file, spec.name, "dtype F8_E4M3, expected of single matrices only")
    rows, width = spec.shape
    scales = -(-rows // packing.block[0]), -(-width // packing.block[1])
    return Stored(
        "fp8",
        {
            "values": _piece(index, spec.name, spec.shape, ("F8_E4M3",), "config.json implies"),
            "scales": _piece(index, spec.name + "_scale_inv", scales, LOADABLE),
        },
    )


def _piece(
    index: CheckpointIndex, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], why: str = "expected"
) -> tuple[str, TensorInfo]:
    info = index.tensor(name)
    if info.dtype not in dtypes:
        raise CheckpointError(info.file, name, f"dtype {info.dtype}, expected one of {', '.join(dtypes)}")
    if info.shape != shape:
        raise CheckpointError(info.file, name, f"shape {list(info.shape)}, {why} {list(shape)}")
    return name, info


def kept_group(packing: Packing | None, stored: Stored, width: int) -> tuple[int, str]:
    """(inputs a scale, "") where our int4 weights can hold a packed matrix as it is, else (0, why not).
    From headers and config alone; an order found in the data counts at loading."""
    if packing is None or stored.method == "plain":
        return 0, "it is not packed"
    if stored.method == "mxfp4":
        return 0, "MXFP4's values are not evenly spaced, as int4 kernels need them"
    if stored.method == "fp8":
        return 0, "eight-bit floats are not evenly spaced, as int8 kernels need them"
    if packing.reordered:
        return 0, "its inputs belong to groups in an order of their own"
    given = packing.group or width
    for group in KERNEL_GROUPS:
        if given % group == 0 and width % group == 0:
            return group, ""
    return 0, f"groups of {given} of {width} inputs are not whole multiples of {KERNEL_GROUPS[-1]}"
