"""Which group sizes may share a pass without changing anyone's bits.

A matrix kernel chosen by the number of rows may sum in another order, and then a session's text would depend
on who decodes beside it and on which stage they meet. The kernel depends on shapes only, so each group size
is tried once on this machine with the span's own matrices: equal bits for every row, or the size is not used.
Knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model_shards.experts import Experts
from model_shards.linear import AnyLinear, Linear, PackedLinear
from model_shards.span import Span


class RowsExact:
    """Remembers, for one span, which row counts give each row the bits it has alone."""

    def __init__(self, span: Span) -> None:
        experts = [layer.mlp for layer in span.layers if isinstance(layer.mlp, Experts)]
        routed = [linear for mlp in experts for one in mlp.experts for linear in one.linears()]
        # The rows of a group meet at an expert in groups of any size. Packed matrices take that.
        self._alone = not all(isinstance(linear, PackedLinear) for linear in routed)
        linears = [linear for layer in span.layers for linear in layer.linears()]
        if span.head is not None:
            linears.append(span.head)
        self._linears = _kinds(linears)
        self._routed = _kinds(routed)
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
            whole = all(self._same_bits(linear, rows) for linear in self._linears)
            self._known[rows] = whole and all(
                self._same_bits(linear, some) for linear in self._routed for some in range(2, rows)
            )
        return self._known[rows]

    def _same_bits(self, linear: AnyLinear, rows: int) -> bool:
        generator = torch.Generator().manual_seed(rows)
        width = linear.shape[1]
        # A router may compute in a dtype of its own.
        dtype = linear.weight.dtype if isinstance(linear, Linear) else self._dtype
        x = torch.randn(rows, width, generator=generator).to(self._device, dtype)
        together = linear(x)
        return all(torch.equal(together[at], linear(x[at : at + 1])[0]) for at in range(rows))


def _kinds(linears: Iterable[AnyLinear]) -> list[AnyLinear]:
    """One of each kind and shape: kernels are chosen by these."""
    return list({(type(linear), type(linear.weight), linear.shape): linear for linear in linears}.values())
