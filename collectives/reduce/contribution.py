"""This member's own values: what the others are given of them, and what that is worth once it is decoded.

Both are the same whenever they are asked for, as long as the caller leaves its tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from blake3 import blake3

from collectives.codecs import Codec
from collectives.codecs.base import F32
from collectives.reduce.feedback import Feedback
from collectives.reduce.layout import Layout, Vector


class Contribution:
    """Chunks of `tensors`, with what `feedback` adds to them."""

    def __init__(
        self, layout: Layout, tensors: Sequence[torch.Tensor], codec: Codec, feedback: Feedback | None = None
    ) -> None:
        self._layout = layout
        self._vector = Vector(layout, tensors)
        self._codec = codec
        self._feedback = feedback
        self._scratch = np.empty(min(layout.chunk_elements, layout.elements), np.float32)

    def encoded(self, chunk: int) -> memoryview:
        """A chunk for the others; memory of the tensors where that can be."""
        return encoded(self._codec, self._read(chunk, None))

    def hashes(self) -> bytes:
        """32 bytes a chunk of what the others are given: what a member signs where there are audits."""
        return b"".join([blake3(self.encoded(chunk)).digest() for chunk in range(self._layout.chunks)])

    def values(self, chunk: int) -> F32:
        """A chunk as the others decode it, whoever adds it up. Memory of the tensors, or scratch memory that the next
        call writes over."""
        values = self._read(chunk, self._scratch)
        if self._codec.relative_error:
            size = self._layout.size(chunk)
            data = encoded(self._codec, values)
            values = self._codec.decode(data, size, torch.from_numpy(self._scratch[:size])).numpy()
        return values

    def close(self) -> None:
        """Frees scratch memory: nobody asks for values any more."""
        self._scratch = np.empty(0, np.float32)

    def _read(self, chunk: int, scratch: F32 | None) -> F32:
        start, end = self._layout.span(chunk)
        values = self._vector.read(start, end, scratch)
        return values if self._feedback is None else self._feedback.added(start, values, scratch)


def encoded(codec: Codec, values: F32) -> memoryview:
    """`values` encoded; the memory of `values` itself for fp32."""
    return codec.encode(torch.from_numpy(values))
