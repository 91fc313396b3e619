"""A result that is here in full, with what it took to get it. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.given import storages
from collectives.reduce import Result
from collectives.reduce.outbox import Traffic


@dataclass(frozen=True, slots=True)
class Whole:
    """`traffic` goes on counting while others are still given what they need from here."""

    result: Result
    epoch: int
    traffic: Traffic = field(default_factory=Traffic)

    def tensors(self) -> list[torch.Tensor]:
        return self.result.tensors

    def shares(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it lives in the memory of any of these."""
        return not storages(self.result.tensors).isdisjoint(storages(tensors))
