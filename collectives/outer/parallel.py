"""Fully synchronous data parallel training, the reference: gradients of every step are reduced, and the outer step is
the run's own optimizer on shared parameters, whose moments travel to joiners with them. There is no inner step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.outer.base import carry
from collectives.outer.optimizers import AdamW, OuterOptimizer


@dataclass(frozen=True, slots=True)
class DataParallel:
    """H = 1."""

    optimizer: OuterOptimizer = field(default_factory=AdamW)
    codec: str = "fp32"
    name: str = "data-parallel"
    inner_steps: int = 1
    delay: int = 0
    blocking: bool = True
    gradients: bool = True
    feedback: bool = False

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (tuple(names),)

    def phase(self, index: int, count: int) -> int:
        return 1

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        carry(local, anchor, base)
