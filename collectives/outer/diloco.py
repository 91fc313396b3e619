"""DiLoCo (arXiv 2311.08105): H inner steps alone, then the mean of all pseudo-gradients, weighted by tokens, and one
outer Nesterov step, for which everybody waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.outer.base import carry
from collectives.outer.optimizers import Nesterov, OuterOptimizer


@dataclass(frozen=True, slots=True)
class DiLoCo:
    """`inner_steps` is H."""

    inner_steps: int = 100
    optimizer: OuterOptimizer = field(default_factory=Nesterov)
    codec: str = "int8"
    name: str = "diloco"
    delay: int = 0
    blocking: bool = True
    gradients: bool = False
    feedback: bool = False

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (tuple(names),)

    def phase(self, index: int, count: int) -> int:
        return self.inner_steps

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        carry(local, anchor, base)
