"""Memory for the bytes of whole chunks, from the system and not from the allocator, which keeps what was freed."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

_HUGE_BYTES = 2 << 20


def fresh(size: int) -> memoryview:
    """Writable bytes with anything in them. Of huge pages where they make up whole ones: the system clears those in a
    quarter of the time, and has them back as soon as nobody looks at them."""
    if size and size % _HUGE_BYTES == 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(pages)
    return np.empty(size, np.uint8).data
