"""SparseLoCo (arXiv 2508.15706): 1 to 3 % of a pseudo-gradient's values at two bits, what is left out added to the next
one (error feedback), and plain SGD as outer step: the feedback takes the momentum's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.outer.base import carry
from collectives.outer.optimizers import OuterOptimizer, Sgd


@dataclass(frozen=True, slots=True)
class SparseLoCo:
    """The codec finds and packs the values; `collectives.Feedback` keeps the rest."""

    inner_steps: int = 50
    optimizer: OuterOptimizer = field(default_factory=Sgd)
    codec: str = "topk"
    name: str = "sparseloco"
    delay: int = 0
    blocking: bool = True
    gradients: bool = False
    feedback: bool = True

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (tuple(names),)

    def phase(self, index: int, count: int) -> int:
        return self.inner_steps

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        carry(local, anchor, base)
