"""What this machine can do, measured: memory it can lend, arithmetic and read bandwidth by a short benchmark.

No table of device names: the figures are what the scheduler's roofline starts from until real steps were timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from model_shards import micro_benchmark

CPU_SHARE = 0.7
CUDA_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes lent to models; floating-point operations and bytes read a second."""

    device: str
    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float


def measure(device: str, dtype: str, memory_bytes: int | None, budget_s: float = 0.3) -> Hardware:
    """Measure once at start. `memory_bytes` (the owner's cap) wins over what is free."""
    figures = micro_benchmark(device, "bfloat16" if dtype == "auto" else dtype, budget_s)
    lent = memory_bytes if memory_bytes is not None else _free_bytes(device)
    return Hardware(device, lent, float(figures["flops_per_s"]), float(figures["read_bytes_per_s"]))


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
