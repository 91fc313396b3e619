"""The arithmetic of a chunk: what "the weighted mean" is, to the last bit.

With weights w_i and values x_i in the declaration's order, all in float32 with one rounding an operation:

    mean = (w_0 x_0 + w_1 x_1 + ...) / W,    W = float32(sum of the w_i in float64)

from left to right; members of weight 0 are left out, and a weight of 1 is no multiplication. With LAN groups each
group is added up first, in the same way, then the groups. No fused multiply-add, so it is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from collectives.codecs.base import F32

Term = tuple[float, F32]
MAGNITUDE_MAX = 1e36  # of weight times values: the sum over as many members as there can be is finite
SUM_SLAB = 65536  # elements added up at a time: they stay in a core's own cache


def add_up(
    terms: Sequence[Term],
    out: F32,
    scratch: F32,
    norms: list[float] | None = None,
    total: float | None = None,
    check: bool = False,
) -> bool:
    """out = sum of weight * values, divided by `total` if given. At least one term; `scratch` [SUM_SLAB, or as long as
    `out`]; `out` may be the first term, and overlaps no other. The sum of squares of each term's values is added to
    `norms`. With `check`, whether the sum is finite and no longer than may be: then all terms are finite, because
    infinity and NaN stay what they are in every sum."""
    good = True
    with np.errstate(over="ignore", invalid="ignore"):  # others' values: infinity and NaN show in `norms`
        for start in range(0, len(out), SUM_SLAB):
            acc = out[start : start + SUM_SLAB]
            tmp = scratch[: len(acc)]
            parts = [values[start : start + SUM_SLAB] for _, values in terms]
            if norms is not None:
                for index, part in enumerate(parts):
                    norms[index] += _square(part)
            begin = 1
            if terms[0][0] != 1:
                np.multiply(parts[0], np.float32(terms[0][0]), out=acc)
            elif len(terms) > 1 and terms[1][0] == 1:
                np.add(parts[0], parts[1], out=acc)
                begin = 2
            else:
                np.copyto(acc, parts[0])
            for (weight, _), part in zip(terms[begin:], parts[begin:], strict=True):
                np.add(acc, part if weight == 1 else np.multiply(part, np.float32(weight), out=tmp), out=acc)
            if check:
                good = good and math.sqrt(_square(acc)) <= MAGNITUDE_MAX
            if total is not None:
                divide(acc, total)
    return good


def divide(out: F32, total: float) -> None:
    """out /= total, in place; zeros where nobody has any weight."""
    if total == 0:
        out.fill(0)
    elif math.frexp(total)[0] == 0.5:
        np.multiply(out, np.float32(1 / total), out=out)  # a power of two: the same bits, sooner
    else:
        np.divide(out, np.float32(total), out=out)


def total_weight(weights: Iterable[float]) -> float:
    """W as float32 rounds it."""
    return float(np.float32(math.fsum(weights)))


def weighted_mean(groups: Sequence[Sequence[Term]]) -> F32:
    """The definition, for whoever wants to check a result: a new vector. Each group's members, then the groups; without
    LAN groups every member is a group of its own."""
    size = max((len(values) for group in groups for _, values in group), default=0)
    scratch = np.empty(SUM_SLAB, np.float32)
    sums: list[Term] = []
    for group in groups:
        terms = [(weight, values) for weight, values in group if weight > 0]
        if len(terms) == 1:
            sums.append(terms[0])
        elif terms:
            out = np.empty(size, np.float32)
            add_up(terms, out, scratch)
            sums.append((1.0, out))
    mean = np.zeros(size, np.float32)
    if sums:
        add_up(sums, mean, scratch)
    divide(mean, total_weight([weight for group in groups for weight, _ in group]))
    return mean


def squares(values: F32) -> float:
    """Sum of squares; infinity or NaN if and only if a value is."""
    return sum(_square(values[start : start + SUM_SLAB]) for start in range(0, len(values), SUM_SLAB))


def _square(part: F32) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(part, part))
    if not math.isfinite(square):
        wide = part.astype(np.float64)  # large values whose squares are too large for float32 are no fault
        square = float(np.dot(wide, wide))
    return square
