"""The simulated machines and the distances between them, drawn from a seed.

A population of home machines (memory, arithmetic, bandwidth, line), regions on a ring, latencies with a little
unlikeness by pair. It knows nothing of layers, requests or who is up.
"""

from __future__ import annotations

import random
import zlib

from scheduler.shapes import Link, NodeShape
from scheduler.sim.config import GIB, SimConfig

KINDS: tuple[tuple[float, float, float, float], ...] = (
    # memory lent in GiB, usable TFLOPS in half precision, usable GB/s, weight of this kind in the population
    (6.0, 12.0, 170.0, 2),
    (8.0, 20.0, 230.0, 4),
    (10.0, 28.0, 420.0, 3),
    (12.0, 35.0, 380.0, 3),
    (16.0, 25.0, 200.0, 3),
    (16.0, 55.0, 560.0, 2),
    (22.0, 70.0, 780.0, 2),
    (28.0, 90.0, 1300.0, 1),
)
"""About what graphics cards and unified-memory laptops of five years offer, less what their owners keep."""


class World:
    """Every machine that may ever be up, its region and line, and the links between any two names."""

    def __init__(self, config: SimConfig) -> None:
        self._config = config
        self._rng = random.Random(f"{config.seed}/world")
        self._drawn = 0
        self.region: dict[str, int] = {}
        self._line_bytes_per_s: dict[str, float] = {}
        self._known: dict[tuple[str, str], Link] = {}
        self.gateways = tuple(f"g{k:03d}" for k in range(config.gateways))
        for k, name in enumerate(self.gateways):
            self.region[name] = k % config.regions
            self._line_bytes_per_s[name] = config.line_mbps_most * 125_000.0

    def draw(self) -> NodeShape:
        """A machine that nobody has seen before."""
        rng, config = self._rng, self._config
        name = f"n{self._drawn:05d}"
        self._drawn += 1
        memory_gib, tflops, gbytes_per_s = rng.choices(
            [kind[:3] for kind in KINDS], weights=[kind[3] for kind in KINDS]
        )[0]
        spread = rng.uniform(0.85, 1.1)
        self.region[name] = rng.randrange(config.regions)
        least, most = config.line_mbps_least, max(config.line_mbps_least, config.line_mbps_most)
        self._line_bytes_per_s[name] = rng.uniform(least, most) * 125_000.0
        return NodeShape(
            id=name,
            memory_bytes=int(memory_gib * GIB),
            flops_per_s=tflops * 1e12 * spread,
            read_bytes_per_s=gbytes_per_s * 1e9 * spread,
            region=f"r{self.region[name]}",
        )

    def line_bytes_per_s(self, name: str) -> float:
        """What a node's own line carries."""
        return self._line_bytes_per_s[name]

    def link(self, a: str, b: str) -> Link:
        """The way from one to another, the same for all time: scheduler.Links."""
        found = self._known.get((a, b))
        if found is None:
            found = self._known[a, b] = self._make(a, b)
            if len(self._known) > 4_000_000:
                self._known.clear()
        return found

    def _make(self, a: str, b: str) -> Link:
        config = self._config
        apart = abs(self.region[a] - self.region[b])
        around = min(apart, config.regions - apart)
        base = config.region_latency_s + around * config.between_latency_s
        if config.latency_s is not None:
            base = config.latency_s[self.region[a]][self.region[b]]
        low, high = (a, b) if a < b else (b, a)
        jitter = 0.75 + 0.5 * (zlib.crc32(f"{config.seed}/{low}/{high}".encode()) / 2**32)
        return Link(base * jitter, min(self._line_bytes_per_s[a], self._line_bytes_per_s[b]))
