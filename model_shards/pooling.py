"""A text's embedding: of its last hidden rows (after the final norm), the last one or the mean of all.

A prompt may come in pieces, so a mean is carried from step to step. Sums are float64 on the CPU: an embedding
depends on the rows and not on how the text was cut beyond the rows' own last bits. Knows nothing of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

POOLS = ("last_hidden", "mean")


@dataclass(frozen=True, slots=True)
class Pooled:
    """``total`` [hidden] float64: the sum of a session's first ``count`` rows."""

    count: int = 0
    total: torch.Tensor | None = None

    def with_rows(self, rows: torch.Tensor) -> Pooled:
        """The sum after ``rows`` [n, hidden]; this one is left as it is."""
        more = rows.double().sum(0).cpu()
        return Pooled(self.count + len(rows), more if self.total is None else self.total + more)

    def mean(self) -> torch.Tensor:
        """[hidden] float32. Only after some rows."""
        total = self.total if self.total is not None else torch.zeros(0)
        return (total / max(1, self.count)).float()
