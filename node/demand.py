"""How much each model is wanted, from how busy its hosts are. A pure core over the adverts of hosts.

The unit is copies' worth: a model whose hosts are busy half of the time, on two copies, is wanted once. That makes
large and small models comparable. Figures are smoothed, so that a burst moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from node.adverts import HostAdvert

LOAD_WANTED = 0.5
"""Copies are added until each is busy for this share of the time."""
QUEUE_S_MAX = 2.0
"""Work waiting for so long counts as one host more kept busy."""
DEMAND_LEAST = 0.01
"""A model that nobody asks for is wanted this much: of two such, both get their copy."""


@dataclass(slots=True)
class _Load:
    at_s: float
    copies_worth: float = 0.0
    copies_max: int = 1


class Demand:
    """Loads of models, smoothed over `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._loads: dict[str, _Load] = {}

    def note(
        self, model: str, layers: int, concurrency: int, hosts: Collection[HostAdvert], now_s: float
    ) -> None:
        """What the model's hosts say of themselves now. A host is full when its device always works, or when it has as
        many sessions as room was kept for."""
        full = sum(
            (max(h.busy, min(1.0, h.sessions / concurrency)) + min(1.0, h.queue_s / QUEUE_S_MAX))
            * (min(h.end, layers) - h.start)
            / layers
            for h in hosts
            if h.state == "ready" and h.start < layers
        )
        load = self._loads.setdefault(model, _Load(now_s))
        share = 1.0 - math.exp(-max(0.0, now_s - load.at_s) / self._memory_s)
        load.copies_worth += share * (full - load.copies_worth)
        load.at_s = now_s

    def of(self, model: str) -> float:
        """How many copies' worth of work is asked of the model."""
        load = self._loads.get(model)
        return DEMAND_LEAST if load is None else max(DEMAND_LEAST, load.copies_worth)

    def copies_max(self, model: str, copies: int) -> int:
        """How many copies it may have where `copies` are wanted anyway: as many as the work needs, and one that it once
        needed is kept until it is clearly too many."""
        load = self._loads.get(model)
        if load is None:
            return copies
        needed = load.copies_worth / LOAD_WANTED
        if needed > load.copies_max:
            load.copies_max = math.ceil(needed)
        elif needed < 0.8 * (load.copies_max - 1):
            load.copies_max = max(1, math.ceil(needed))
        return max(copies, load.copies_max)

    def keep_only(self, models: Collection[str]) -> None:
        """Forget models that are no more."""
        for model in [model for model in self._loads if model not in models]:
            del self._loads[model]
