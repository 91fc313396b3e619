"""One-round-delayed updates: the reduction of a round goes on behind the next H inner steps, whose progress is then put
on top of the new anchor (compare arXiv 2502.12996). Nobody waits; a link may take as long as H steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.outer.base import carry
from collectives.outer.optimizers import Nesterov, OuterOptimizer


@dataclass(frozen=True, slots=True)
class Delayed:
    """Means are merged just before the next offer. Delayed steps bear less momentum."""

    inner_steps: int = 100
    optimizer: OuterOptimizer = field(default_factory=lambda: Nesterov(lr=0.4, momentum=0.8))
    codec: str = "int8"
    name: str = "delayed"
    blocking: bool = False
    gradients: bool = False
    feedback: bool = False

    @property
    def delay(self) -> int:
        return self.inner_steps

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (tuple(names),)

    def phase(self, index: int, count: int) -> int:
        return self.inner_steps

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        carry(local, anchor, base)
