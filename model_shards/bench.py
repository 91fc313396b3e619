"""A short measurement of what this machine computes and reads per second, instead of a table of names.

Knows nothing of models: it times two kernels a decoder lives on, a square product and a matrix-vector product
whose matrix is larger than any cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model_shards.dtypes import dtype_named

SQUARE = 768
READ_BYTES = 96 << 20
READ_WIDTH = 4096


def micro_benchmark(device: str = "cpu", dtype: str = "bfloat16", budget_s: float = 0.3) -> dict[str, float]:
    """Measured {"flops_per_s", "read_bytes_per_s"} on ``device`` in ``dtype``, in about ``budget_s`` seconds.

    The best of the repetitions that fit, at least two each, so that a busy moment does not count as the
    machine.
    """
    kind, place = dtype_named(dtype), torch.device(device)
    with torch.inference_mode():
        square = torch.ones(SQUARE, SQUARE, dtype=kind, device=place)
        product_s = _best_s(lambda: torch.mm(square, square), place, budget_s / 3)
        rows = READ_BYTES // (READ_WIDTH * kind.itemsize)
        wide = torch.ones(rows, READ_WIDTH, dtype=kind, device=place)
        x = torch.ones(1, READ_WIDTH, dtype=kind, device=place)
        read_s = _best_s(lambda: F.linear(x, wide), place, budget_s / 3)
    return {"flops_per_s": 2.0 * SQUARE**3 / product_s, "read_bytes_per_s": wide.nbytes / read_s}


def _best_s(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    best, spent, rounds = float("inf"), 0.0, 0
    while rounds < 2 or spent < budget_s:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = max(time.perf_counter() - began, 1e-9)
        best, spent, rounds = min(best, took), spent + took, rounds + 1
    return best
