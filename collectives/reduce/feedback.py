"""Error feedback: what a lossy codec left out of one contribution is added to the next (Seide et al. 2014; for sparse
codecs it is what makes them converge).

The caller keeps a `Feedback` for each list of tensors, gives it to every exchange, and calls `commit` once the round is
committed, before its tensors change. It knows nothing of members or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from collectives.codecs import Codec
from collectives.codecs.base import F32
from collectives.reduce.layout import Layout, Vector


class Feedback:
    """`residual` [elements] float32, zeros at first."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.residual: F32 = np.zeros(layout.elements, np.float32)

    def added(self, start: int, values: F32, scratch: F32 | None) -> F32:
        """`values` from `start` on plus what was left out of them; in `scratch`, or in a new vector."""
        out = np.empty(len(values), np.float32) if scratch is None else scratch[: len(values)]
        return np.add(values, self.residual[start : start + len(values)], out=out)

    def commit(self, tensors: Sequence[torch.Tensor], codec: Codec, sent: bool = True) -> None:
        """The contribution of `tensors` is part of a committed result; or, not `sent`, it is not, and all of it is left
        for the next one."""
        vector = Vector(self.layout, tensors)
        for chunk in range(self.layout.chunks):
            start, end = self.layout.span(chunk)
            wanted = self.added(start, vector.read(start, end), None)
            if sent:
                data = codec.encode(torch.from_numpy(wanted))
                wanted = wanted - codec.decode(data, end - start).numpy()
            self.residual[start:end] = wanted
