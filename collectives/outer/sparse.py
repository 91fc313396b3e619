"""SparseLoCo (arXiv 2508.15706): 1 to 3 % of a pseudo-gradient's values at two bits, what is left out added to the next
one (error feedback), and plain SGD as outer step: the feedback takes the momentum's place."""

from __future__ import annotations

from dataclasses import dataclass, field

from collectives.outer.diloco import DiLoCo
from collectives.outer.optimizers import OuterOptimizer, Sgd


@dataclass(frozen=True, slots=True)
class SparseLoCo(DiLoCo):
    """DiLoCo whose codec finds and packs the values; `collectives.Feedback` keeps the rest."""

    inner_steps: int = 50
    optimizer: OuterOptimizer = field(default_factory=Sgd)
    codec: str = "topk"
    name: str = "sparseloco"
    feedback: bool = True
