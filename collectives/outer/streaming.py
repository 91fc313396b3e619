"""Streaming DiLoCo (arXiv 2501.18512): the layers in fragments whose rounds are spread over the H inner steps, so that
a link carries little at any time and compute goes on behind it. A mean is merged `delay` steps after its offer (tau) by
local = alpha * local + (1 - alpha) * anchor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.outer.optimizers import Nesterov, OuterOptimizer

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Streaming:
    """`fragments` at most: a fragment holds every so many-th layer, as the paper's strided pattern has it; what lies
    outside the layers goes with the first (embedding) or the last one (norm and head)."""

    inner_steps: int = 100
    fragments: int = 4
    delay: int = 5
    alpha: float = 0.5
    optimizer: OuterOptimizer = field(default_factory=Nesterov)
    codec: str = "int4"
    name: str = "streaming"
    blocking: bool = False
    gradients: bool = False
    feedback: bool = False

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        layers = [int(found.group(1)) if (found := _LAYER.search(name)) else None for name in names]
        inside = [layer for layer in layers if layer is not None]
        count = max(1, min(self.fragments, len(set(inside)), self.inner_steps))
        cuts: list[list[str]] = [[] for _ in range(count)]
        for name, layer in zip(names, layers, strict=True):
            outside = 0 if "embed" in name else count - 1
            cuts[outside if layer is None else layer % count].append(name)
        return tuple(tuple(cut) for cut in cuts if cut)

    def phase(self, index: int, count: int) -> int:
        """Evenly over the H steps; the last fragment's rounds end a period."""
        return self.inner_steps * (index + 1) // count

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        torch._foreach_mul_(local, self.alpha)
        torch._foreach_add_(local, torch._foreach_mul(anchor, 1 - self.alpha))
