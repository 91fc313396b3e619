"""What a reduction withstands: norms and weights out of proportion, and aggregators that a minority cannot move far.

    mean       the weighted mean (collectives.reduce.combine)
    clip       centred clip: from the median, steps towards each member of at most `clip_factor` times the median
               distance, weighted (Karimireddy et al. 2021, arXiv 2012.10333; by chunk, as BTARD does, arXiv 2106.11257)
    trimmed    of each element, without the `trim` largest and smallest share, the mean; weights do not count
    median     of each element; weights do not count

All work on one chunk at a time, at its root, on finite values: whoever calls has looked. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from collectives.agreement import Member
from collectives.codecs.base import F32
from collectives.errors import NonFinite
from collectives.reduce.combine import MAGNITUDE_MAX, SUM_SLAB, Term, squares
from collectives.reduce.feedback import Feedback
from collectives.reduce.layout import Layout, Vector

AGGREGATORS = ("mean", "clip", "trimmed", "median")
CLIP_STEPS = 3


def aggregate(name: str, terms: Sequence[Term], out: F32, *, trim: float, clip_factor: float) -> None:
    """out = the aggregate of `terms` (at least one) by clip, trimmed or median."""
    slab = max(1024, SUM_SLAB // len(terms))
    drop = min(math.floor(trim * len(terms)), (len(terms) - 1) // 2)
    if name != "trimmed":
        drop = (len(terms) - 1) // 2
    for start in range(0, len(out), slab):
        stack = np.stack([values[start : start + slab] for _, values in terms])
        stack += np.float32(0)  # which of two zeros of unlike signs comes first differs between machines
        rows = np.sort(stack, axis=0)
        rows = rows[drop : len(terms) - drop]
        acc = out[start : start + slab]
        np.copyto(acc, rows[0])
        for row in rows[1:]:
            np.add(acc, row, out=acc)
        np.divide(acc, np.float32(len(rows)), out=acc)
    if name == "clip":
        _clip(terms, out, clip_factor)


def _clip(terms: Sequence[Term], centre: F32, factor: float) -> None:
    total = math.fsum(weight for weight, _ in terms)
    if total <= 0:
        return
    step = np.empty_like(centre)
    away = np.empty_like(centre)
    for _ in range(CLIP_STEPS):
        distances = []
        for _, values in terms:
            np.subtract(values, centre, out=away)
            distances.append(_length(away))
        radius = factor * median(distances)
        step.fill(0)
        for (weight, values), distance in zip(terms, distances, strict=True):
            scale = weight / total * (1.0 if distance <= radius else radius / distance)
            np.subtract(values, centre, out=away)
            np.multiply(away, np.float32(scale), out=away)
            np.add(step, away, out=step)
        np.add(centre, step, out=centre)


def _length(values: F32) -> float:
    """Added up in float64 in an order of its own, element by element, so that all machines agree to the last bit."""
    squares = values.astype(np.float64)
    np.multiply(squares, squares, out=squares)
    while len(squares) > 1:
        half = (len(squares) + 1) // 2
        squares[: len(squares) - half] += squares[half:]
        squares = squares[:half]
    return float(np.float32(math.sqrt(float(squares[0])))) if len(squares) else 0.0


def norm_of(
    tensors: Sequence[torch.Tensor],
    layout: Layout | None = None,
    feedback: Feedback | None = None,
    weight: float = 1.0,
) -> float:
    """L2 norm of what would be contributed, for the offer. NonFinite names the first tensor with NaN or infinity, or
    with more than can be added up at that weight."""
    layout = layout if layout is not None else Layout.of(tensors)
    vector = Vector(layout, tensors)
    scratch = np.empty(min(layout.chunk_elements, layout.elements), np.float32)
    total = 0.0
    for chunk in range(layout.chunks):
        start, end = layout.span(chunk)
        values = vector.read(start, end, scratch)
        if feedback is not None:
            values = feedback.added(start, values, scratch)
        square = squares(values)
        if not weight * math.sqrt(square) <= MAGNITUDE_MAX:  # a NaN is none either
            finite = np.isfinite(values)
            bad = start + int(np.flatnonzero(~finite)[0]) if not finite.all() else start
            index = next(index for index, _, _ in layout.pieces(bad, bad + 1))
            what = "far too large values" if finite.all() else "NaN or infinity"
            raise NonFinite(f"tensor {index} of {len(tensors)} holds {what}")
        total += square
    return math.sqrt(total)


def outliers(norms: Mapping[str, float], factor: float) -> frozenset[str]:
    """Whose norm is no number, or more than `factor` times the median of all."""
    finite = [norm for norm in norms.values() if math.isfinite(norm) and norm >= 0]
    bound = factor * median(finite) if finite else 0.0
    return frozenset(peer for peer, norm in norms.items() if not (math.isfinite(norm) and 0 <= norm <= bound))


def capped(
    members: Sequence[Member],
    cap: float | None = None,
    share: float | None = None,
    caps: Mapping[str, float] | None = None,
) -> tuple[Member, ...]:
    """`members` with no weight above `cap`, above the member's own entry in `caps`, or above `share` of all weights as
    they then are. A share below one part in the number of weighty members makes them equal."""
    weights = []
    for member in members:
        limits = [limit for limit in (cap, (caps or {}).get(member.peer)) if limit is not None]
        weights.append(min([member.weight, *limits]))
    if share is not None:
        level = _level(weights, share)
        weights = [min(weight, level) for weight in weights]
    return tuple(
        member if weight == member.weight else replace(member, weight=weight)
        for member, weight in zip(members, weights, strict=True)
    )


def _level(weights: Sequence[float], share: float) -> float:
    """The level at which nobody who is cut down to it has more than `share` of the sum."""
    ordered = sorted((weight for weight in weights if weight > 0), reverse=True)
    for count in range(len(ordered)):
        rest = math.fsum(ordered[count:])
        if share * count >= 1:
            break
        level = share * rest / (1 - share * count)
        if count == 0 and ordered[0] <= share * rest:
            return math.inf
        if count and ordered[count - 1] >= level >= ordered[count]:
            return level
    return ordered[-1] if ordered else math.inf
