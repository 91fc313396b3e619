"""A QR code as lines of half blocks, two rows of modules a line, for a dark-on-light style.

It only draws; segno computes the modules.
"""

from __future__ import annotations

from collections.abc import Sequence

QUIET_MODULES = 2
BLOCKS = {(0, 0): " ", (1, 0): "▀", (0, 1): "▄", (1, 1): "█"}


def half_blocks(matrix: Sequence[Sequence[int]], *, inverted: bool = False) -> list[str]:
    """Lines of equal length; a filled half is a dark module, and a light margin surrounds them.

    Inverted, a filled half is a light module: for light text on a dark ground, where no colours may be set.
    """
    width = len(matrix[0]) + 2 * QUIET_MODULES
    side = [0] * QUIET_MODULES
    blank = [[0] * width for _ in range(QUIET_MODULES)]
    ink = 0 if inverted else 1
    rows = [*blank, *([*side, *(1 if cell & 1 else 0 for cell in row), *side] for row in matrix), *blank]
    if len(rows) % 2:
        rows.append([0] * width)
    return [
        "".join(BLOCKS[int(a == ink), int(b == ink)] for a, b in zip(upper, lower, strict=True))
        for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    ]
