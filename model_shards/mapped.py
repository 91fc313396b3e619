"""A table that lies in a file of no name and is looked up through the page cache.

A vocabulary's embedding is wanted row by row only: where the head that it is tied to keeps its numbers in an order of
its own, the rows need not take memory a second time.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch


def mapped_table(table: torch.Tensor, directory: Path | None = None) -> torch.Tensor:
    """``table`` (two bytes a number, or int8) as a tensor over a file in ``directory``, gone with the tensor. Raises
    OSError."""
    file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - lives as long as the tensor
    try:
        file.write(table.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        numbers = np.memmap(
            file,
            dtype=np.int8 if table.dtype == torch.int8 else np.int16,
            mode="r+",
            shape=tuple(table.shape),
        )
    except OSError:
        file.close()
        raise
    weakref.finalize(numbers, file.close)
    return torch.from_numpy(numbers).view(table.dtype)
