"""What a codec is, the registry of codecs, and the checks that all of them share.

A codec turns a vector of fp32 numbers into bytes and back, as a pure function of the numbers: the same input gives the
same bytes wherever it runs, which is what audits and replicas rest on. It knows nothing of members, parts or frames.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from collectives.codecs.errors import CodecFault, UnknownCodec

Buffer: TypeAlias = bytes | bytearray | memoryview
F32: TypeAlias = npt.NDArray[np.float32]

# Elements that are worked on at a time: their fp32 values and one temporary stay in a core's own cache, and there are
# too few (less than 32768) for torch to wake its thread pool, which costs a hundred times the work where cores are
# busy. A multiple of every block.
SLAB = 28672


@runtime_checkable
class Codec(Protocol):
    """`encode` and `decode` work on 1-d fp32 CPU tensors of any length, 0 included."""

    @property
    def name(self) -> str: ...

    @property
    def relative_error(self) -> float:
        """Bound on |decode(encode(x)) - x| / |x| (L2) for a Gaussian x of 10,000 elements or more; 0 if exact."""
        ...

    @property
    def heavy_error(self) -> float:
        """The same for Student-t with 3 degrees of freedom, 100,000 elements or more."""
        ...

    @property
    def fixed(self) -> bool:
        """`bytes_for` is exact."""
        ...

    @property
    def stable(self) -> bool:
        """encode(decode(data)) == data for whatever `encode` wrote, also after the values were rounded to
        any dtype: a result need not be kept in its encoded form to be sent once more."""
        ...

    @property
    def result(self) -> Codec:
        """The codec for sums and means of what this one encodes: itself, unless sparse."""
        ...

    def bytes_for(self, n: int) -> int:
        """Length of the encoding of `n` elements: exact, or, for a sparse codec, the most it can be."""
        ...

    def encode(self, x: torch.Tensor) -> memoryview:
        """May share memory with `x` (fp32 does). NonFinite if `x` holds NaN or infinity and the codec has to look at
        the values; fp32 and bf16 carry them as they are."""
        ...

    def decode(self, data: Buffer, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """`out` [n] fp32 contiguous. May share memory with `data` if `out` is None. CodecFault if `data` is no
        encoding of `n` elements."""
        ...


_codecs: dict[str, Codec] = {}


def register(codec: Codec) -> Codec:
    """Makes `codec` known by its name; ValueError if another one has it."""
    if _codecs.setdefault(codec.name, codec) is not codec:
        raise ValueError(f"there is a codec {codec.name!r} already")
    return codec


def codec(name: str) -> Codec:
    """The codec of that name; UnknownCodec tells which there are."""
    try:
        return _codecs[name]
    except KeyError:
        raise UnknownCodec(name, tuple(sorted(_codecs))) from None


def codecs() -> tuple[str, ...]:
    """The names of all codecs, sorted."""
    return tuple(sorted(_codecs))


def values_of(x: torch.Tensor) -> F32:
    """`x` as a numpy vector that shares its memory."""
    if x.dtype != torch.float32 or x.dim() != 1 or x.device.type != "cpu":
        raise ValueError(f"a codec takes 1-d float32 CPU tensors, got {x.dim()}-d {x.dtype} on {x.device}")
    array: F32 = x.detach().contiguous().numpy()
    return array


def room_for(n: int, out: torch.Tensor | None) -> torch.Tensor:
    """`out` after checking it, or a new vector."""
    if out is None:
        return torch.empty(n, dtype=torch.float32)
    if out.dtype != torch.float32 or out.shape != (n,) or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out must be a contiguous float32 CPU tensor of shape [{n}], got {tuple(out.shape)} {out.dtype}"
        )
    return out


def bytes_of(data: Buffer, length: int, name: str) -> npt.NDArray[np.uint8]:
    """`data` as bytes, if there are exactly `length` of them."""
    view = memoryview(data).cast("B")
    if len(view) != length:
        raise CodecFault(f"{name}: expected {length} bytes, got {len(view)}")
    return np.frombuffer(view, np.uint8)
