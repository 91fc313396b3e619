"""Which group sizes may share a pass without changing anyone's bits.

A matrix kernel chosen by the number of rows may sum in another order, and then a session's text would depend
on who decodes beside it and on which stage they meet. The kernel depends on shapes only, so each group size
is tried once on this machine with the span's own matrices: equal bits for every row, or the size is not used.
Knows nothing of sessions.
"""

from __future__ import annotations

import torch

from model_shards.linear import AnyLinear
from model_shards.span import Span


class RowsExact:
    """Remembers, for one span, which row counts give each row the bits it has alone."""

    def __init__(self, span: Span) -> None:
        # With experts the rows of a group meet in groups of any size, so there a session decodes alone.
        self._alone = bool(span.config.experts)
        linears = list(span.layers[0].linears()) if span.layers else []
        if span.head is not None:
            linears.append(span.head)
        self._linears = linears
        self._dtype, self._device = span.dtype, span.device
        self._known: dict[int, bool] = {1: True}

    def largest(self, rows: int) -> int:
        """The largest usable group of at most ``rows``, among ``rows`` itself and the powers of two (1 always
        is)."""
        if self._alone:
            return 1
        power = 1 << (rows.bit_length() - 1)
        while not self._exact(power):
            power //= 2
        return rows if power > 1 and self._exact(rows) else power

    def _exact(self, rows: int) -> bool:
        if rows not in self._known:
            self._known[rows] = all(self._same_bits(linear, rows) for linear in self._linears)
        return self._known[rows]

    def _same_bits(self, linear: AnyLinear, rows: int) -> bool:
        generator = torch.Generator().manual_seed(rows)
        width = linear.shape[1]
        x = torch.randn(rows, width, generator=generator).to(self._device, self._dtype)
        together = linear(x)
        return all(torch.equal(together[at], linear(x[at : at + 1])[0]) for at in range(rows))
