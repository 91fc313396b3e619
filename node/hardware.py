"""What this machine can do, measured: memory it can lend, arithmetic and read bandwidth by a short benchmark.

No table of device names: the figures are what the scheduler's roofline starts from until real steps were timed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from model_shards import micro_benchmark

CPU_SHARE = 0.7
CUDA_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """One device: bytes lent to models; floating-point operations and bytes read a second."""

    device: str
    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """All devices that this node lends, the first one first; the sums of their figures."""

    devices: tuple[DeviceFigures, ...]

    @property
    def device(self) -> str:
        """Their names as one text."""
        return ",".join(d.device for d in self.devices)

    @property
    def memory_bytes(self) -> int:
        """Bytes lent to models on all of them."""
        return sum(d.memory_bytes for d in self.devices)

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations a second, all together."""
        return sum(d.flops_per_s for d in self.devices)

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes read a second, all together."""
        return sum(d.read_bytes_per_s for d in self.devices)


def measure(device: str, dtype: str, memory_bytes: int | None, budget_s: float = 0.3) -> Hardware:
    """Measure once at start. `memory_bytes` (the owner's cap) wins over what is free; several devices share it by what
    is free on each, and a device that is named twice is lent in two halves."""
    names = device_names(device)
    seen: dict[str, tuple[float, float]] = {}
    for name in names:
        if name not in seen:
            figures = micro_benchmark(name, "bfloat16" if dtype == "auto" else dtype, budget_s)
            seen[name] = float(figures["flops_per_s"]), float(figures["read_bytes_per_s"])
    free = [_free_bytes(name) // names.count(name) for name in names]
    lent = free if memory_bytes is None else split_bytes(memory_bytes, free)
    return Hardware(
        tuple(
            DeviceFigures(name, size, *(figure / names.count(name) for figure in seen[name]))
            for name, size in zip(names, lent, strict=True)
        )
    )


def device_names(device: str) -> list[str]:
    """The devices that a setting names; `all`: every CUDA device, else the processor."""
    if device != "all":
        return device.split(",")
    import torch

    return [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]


def split_bytes(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in parts by these weights; the last one takes what rounding leaves."""
    whole = sum(weights)
    parts = [total * weight // whole if whole else total // len(weights) for weight in weights[:-1]]
    return [*parts, total - sum(parts)]


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free * CUDA_SHARE)
    return int(psutil.virtual_memory().available * CPU_SHARE)


def default_threads() -> int:
    """Threads for the engine: all cores but one, which the event loop (and the machine's owner) keeps.

    With every core in the pool a single busy neighbour stalls each step at its barriers: ten times slower was seen.
    """
    return max(1, (os.cpu_count() or 1) - 1)
