"""A list of tensors as one virtual vector of float32, cut into chunks.

`Layout` knows shapes and dtypes alone: its digest says whether two members talk of the same vector, and its grid of
chunks depends on nothing else, so that whoever knows the layout can check a result chunk by chunk. `Vector` binds
tensors to a layout and reads and writes ranges of it, without ever making a flat copy of everything.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from collectives.codecs.base import F32, SLAB
from collectives.reduce.errors import LayoutError
from collectives.reduce.memory import fresh

CHUNK_ELEMENTS_MAX = 512 * 1024
CHUNK_ELEMENTS_FINE = 256 * 1024
CHUNK_ELEMENTS_MIN = 4096
CHUNK_ELEMENTS_SMALL = 16 * 1024
CHUNKS_WANTED = 64  # parts are made of whole chunks: enough of them that shares come out even
CHUNKS_FEW = 16  # will do rather than chunks that cost more than their bytes
CHUNKS_MAX = 16384
ALIGN = 1024  # a multiple of every codec's block

_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


def chunk_elements_for(elements: int) -> int:
    """Elements a chunk, a multiple of 1024: 2 MiB of fp32, less where that would make too few chunks. What chunks cost
    beside their bytes was a third of a reduction's time with 1 MiB each, so where there are many bytes, half as many
    chunks have to do; and of 1 MiB in all, a round of four members took most of its time for 64 of them."""
    size = math.ceil(elements / CHUNKS_WANTED)
    if size >= CHUNK_ELEMENTS_FINE:
        size *= 2
    size = max(size, min(CHUNK_ELEMENTS_SMALL, math.ceil(elements / CHUNKS_FEW)))
    size = min(max(size, CHUNK_ELEMENTS_MIN), CHUNK_ELEMENTS_MAX)
    size = max(size, math.ceil(elements / CHUNKS_MAX))
    return math.ceil(size / ALIGN) * ALIGN


class Layout:
    """Shapes and dtypes of a list of tensors. `elements` in all, `tensor_bytes` in their own dtypes, `chunks` of
    `chunk_elements` each (the last one may be shorter). Complex numbers count as two elements."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype],
        chunk_elements: int | None = None,
    ) -> None:
        if len(shapes) != len(dtypes):
            raise LayoutError(f"{len(shapes)} shapes, but {len(dtypes)} dtypes")
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.dtypes = tuple(dtypes)
        counts = [
            math.prod(shape) * (2 if dtype in _COMPLEX else 1)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        self.starts = [0]
        for count in counts:
            self.starts.append(self.starts[-1] + count)
        self.elements = self.starts[-1]
        self.tensor_bytes = sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )
        self.chunk_elements = chunk_elements_for(self.elements) if chunk_elements is None else chunk_elements
        if self.chunk_elements < 1 or self.chunk_elements % ALIGN:
            raise LayoutError(
                f"chunk_elements must be a positive multiple of {ALIGN}, got {self.chunk_elements}"
            )
        self.chunks = math.ceil(self.elements / self.chunk_elements)
        text = "\n".join(f"{dtype} {shape}" for shape, dtype in zip(self.shapes, self.dtypes, strict=True))
        name = f"shoal layout 1\n{self.chunk_elements}\n{text}"
        self.digest = hashlib.blake2b(name.encode(), digest_size=32).digest()

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], chunk_elements: int | None = None) -> Layout:
        """The layout of `tensors`, of any dtype, device and contiguity; LayoutError names one that cannot be."""
        for index, tensor in enumerate(tensors):
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
                raise LayoutError(f"tensor {index} is {tensor.layout} on {tensor.device}: not a dense one")
        return cls([tuple(t.shape) for t in tensors], [t.dtype for t in tensors], chunk_elements)

    def span(self, chunk: int) -> tuple[int, int]:
        """[start, end) of a chunk in elements."""
        start = chunk * self.chunk_elements
        return start, min(start + self.chunk_elements, self.elements)

    def size(self, chunk: int) -> int:
        """Elements of a chunk."""
        start, end = self.span(chunk)
        return end - start

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(tensor, start, end) of what [start, end) covers, within each tensor's own elements."""
        index = bisect_right(self.starts, start) - 1
        while start < end:
            stop = min(end, self.starts[index + 1])
            if stop > start:
                base = self.starts[index]
                yield index, start - base, stop - base
                start = stop
            index += 1

    def empty(self, like: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """New contiguous tensors of this layout, on the devices of `like`."""
        devices = [t.device for t in like] if like is not None else [torch.device("cpu")] * len(self.shapes)
        return [
            _empty(shape, dtype, device)
            for shape, dtype, device in zip(self.shapes, self.dtypes, devices, strict=True)
        ]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    # numpy asks for huge pages where torch does not: a fifth of the page faults' cost.
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)


class Vector:
    """`tensors` as the vector that `layout` describes. Nothing is copied until it is read."""

    def __init__(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        given = [(tuple(t.shape), t.dtype) for t in tensors]
        wanted = list(zip(layout.shapes, layout.dtypes, strict=True))
        if given != wanted:
            raise LayoutError(f"tensors {given} do not have the layout {wanted}")
        self.layout = layout
        self._tensors = [_real(tensor) for tensor in tensors]
        self._flat = [t.view(-1) if t.is_contiguous() else None for t in self._tensors]
        self._fast: list[F32 | None] = [
            flat.numpy()
            if flat is not None and flat.dtype == torch.float32 and flat.device.type == "cpu"
            else None
            for flat in self._flat
        ]

    def direct(self, start: int, end: int) -> F32 | None:
        """The memory of [start, end) itself, where that is one piece of contiguous float32 on the CPU."""
        if start >= end:
            return None
        index = bisect_right(self.layout.starts, start) - 1
        fast = self._fast[index]
        base = self.layout.starts[index]
        if fast is None or end > self.layout.starts[index + 1]:
            return None
        view: F32 = fast[start - base : end - base]
        return view

    def read(self, start: int, end: int, scratch: F32 | None = None) -> F32:
        """[start, end) as float32: the memory itself where it can be (do not write to it), else a copy in `scratch`."""
        view = self.direct(start, end)
        if view is not None:
            return view
        own = np.frombuffer(fresh(4 * (end - start)), np.float32) if scratch is None else scratch
        out: F32 = own[: end - start]
        target = torch.from_numpy(out)
        at = 0
        for index, first, last in self.layout.pieces(start, end):
            for part in _ranges(self._tensors[index], self._flat[index], first, last):
                _copy(target[at : at + part.numel()].view(part.shape), part)
                at += part.numel()
        return out

    def write(self, start: int, values: F32) -> None:
        """Puts `values` [n] float32 at [start, start + n), rounded to the tensors' own dtypes. Integers are rounded to
        nearest even and clamped; booleans are whether at least half. Contiguous tensors only."""
        at = 0
        for index, first, last in self.layout.pieces(start, start + len(values)):
            part = values[at : at + last - first]
            at += last - first
            fast = self._fast[index]
            if fast is not None:
                np.copyto(fast[first:last], part)
            else:
                self._range(index, first, last).copy_(
                    _rounded(torch.from_numpy(part), self._tensors[index].dtype)
                )

    def raw(self, start: int, end: int) -> list[npt.NDArray[np.uint8]]:
        """The bytes of [start, end) in the tensors' own dtypes; memory itself on the CPU. Contiguous tensors only."""
        view = self.direct(start, end)
        if view is not None:
            return [view.view(np.uint8)]
        return [
            self._range(index, first, last).cpu().view(torch.uint8).numpy()
            for index, first, last in self.layout.pieces(start, end)
        ]

    def raw_bytes(self, start: int, end: int) -> int:
        """How many bytes `raw` gives."""
        pieces = self.layout.pieces(start, end)
        return sum((last - first) * self._tensors[index].dtype.itemsize for index, first, last in pieces)

    def write_raw(self, start: int, end: int, data: memoryview) -> None:
        """Puts bytes that `raw` gave at [start, end)."""
        at = 0
        for index, first, last in self.layout.pieces(start, end):
            part = self._range(index, first, last)
            size = part.numel() * part.dtype.itemsize
            source = torch.from_numpy(np.frombuffer(data[at : at + size], np.uint8).copy())
            part.copy_(source.view(part.dtype))
            at += size

    def _range(self, index: int, first: int, last: int) -> torch.Tensor:
        flat = self._flat[index]
        if flat is None:
            raise LayoutError(f"tensor {index} is not contiguous: it can be read, not written")
        return flat[first:last]


def applied(layout: Layout, chunk: int, values: F32) -> F32:
    """`values` [size of the chunk] as they are read back from tensors that they were written to: rounded to their
    dtypes. A new vector."""
    start, end = layout.span(chunk)
    out = np.empty(end - start, np.float32)
    at = 0
    for index, first, last in layout.pieces(start, end):
        part = torch.from_numpy(values[at : at + last - first])
        dtype = _COMPLEX.get(layout.dtypes[index], layout.dtypes[index])
        rounded = part if dtype == torch.float32 else _rounded(part, dtype)
        torch.from_numpy(out[at : at + last - first]).copy_(rounded)
        at += last - first
    return out


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.dtype in _COMPLEX else tensor


def _ranges(tensor: torch.Tensor, flat: torch.Tensor | None, first: int, last: int) -> Iterator[torch.Tensor]:
    """Views that make up elements [first, last) of `tensor` in row-major order, however it is strided."""
    if flat is not None:
        yield flat[first:last]
    elif tensor.dim() == 1:
        yield tensor[first:last]
    elif last > first:
        row = tensor[0].numel()
        top, begin = divmod(first, row)
        bottom, end = divmod(last, row)
        if top == bottom:
            yield from _sub(tensor[top], begin, end)
            return
        if begin:
            yield from _sub(tensor[top], begin, row)
            top += 1
        if bottom > top:
            yield tensor[top:bottom]
        if end:
            yield from _sub(tensor[bottom], 0, end)


def _sub(tensor: torch.Tensor, first: int, last: int) -> Iterator[torch.Tensor]:
    return _ranges(tensor, tensor.view(-1) if tensor.is_contiguous() else None, first, last)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """On the CPU in pieces that torch copies without its thread pool."""
    rows = len(source) if source.dim() else 1
    if source.numel() <= SLAB or rows == 0 or source.device.type != "cpu":
        target.copy_(source)
        return
    step = SLAB // (source.numel() // rows)
    for begin in range(0, rows, max(1, step)):
        if step:
            target[begin : begin + step].copy_(source[begin : begin + step])
        else:
            _copy(target[begin], source[begin])


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return values.to(dtype)
    if dtype == torch.bool:
        return values >= 0.5
    limits = torch.iinfo(dtype)
    # The largest float32 within the integers' range, so that what is written is read back as the same float32.
    top = (
        float(np.nextafter(np.float32(limits.max), np.float32(0))) if limits.bits > 24 else float(limits.max)
    )
    return values.double().round().clamp(float(limits.min), top).nan_to_num().to(dtype)
