"""What steps really took, against what the roofline said: per node and model, prefill and decode apart.

Estimates are ratios to the roofline, so what is seen at one batch size speaks for another. They follow drift, and no
single outlier moves them far. Time is an argument; nothing here is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scheduler import cost
from scheduler.errors import InputError
from scheduler.shapes import ModelShape, NodeShape

Kind = Literal["prefill", "decode"]
PRIOR_WEIGHT = 2.0
"""The roofline counts as so many observations, at first; it fades as they do."""
MEMORY_S = 300.0
"""An observation's weight falls by e in this time."""
SURPRISE_MAX = math.log(2.0)
"""One observation is believed up to this far (as a log ratio) from the estimate."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A step of `tokens` tokens (decode: sequences in the batch) through `layers` layers took `seconds`."""

    node: str
    model: str
    kind: Kind
    layers: int
    tokens: int
    seconds: float
    with_head: bool = False


@dataclass(slots=True)
class _Ratio:
    """A decayed mean of log ratios."""

    at_s: float
    total: float = 0.0
    weight: float = PRIOR_WEIGHT

    def mean(self) -> float:
        return self.total / self.weight if self.weight > 0 else 0.0

    def add(self, value: float, now_s: float) -> None:
        fade = math.exp(-max(0.0, now_s - self.at_s) / MEMORY_S)
        here = self.mean()
        self.total, self.weight, self.at_s = self.total * fade, self.weight * fade, now_s
        self.total += max(here - SURPRISE_MAX, min(here + SURPRISE_MAX, value))
        self.weight += 1.0


class Corrections:
    """Measured times by (node, model, kind)."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str, Kind], _Ratio] = {}

    def observe(self, seen: Observation, model: ModelShape, node: NodeShape, now_s: float) -> None:
        """Take in one step. Raises InputError for times and counts that cannot be."""
        if not seen.seconds > 0 or not math.isfinite(seen.seconds):
            raise InputError("seconds", seen.seconds, "a finite number above 0")
        if seen.layers < 1 or seen.tokens < 1:
            raise InputError("layers, tokens", (seen.layers, seen.tokens), "at least 1 each")
        expected = expected_s(seen, model, _unmeasured(node))
        ratio = self._ratios.setdefault((seen.node, seen.model, seen.kind), _Ratio(now_s))
        ratio.add(math.log(seen.seconds / max(1e-12, expected)), now_s)

    def slowdown(self, node: str, model: str, kind: Kind) -> float:
        """How many times slower than its roofline the node is; 1 until seen."""
        found = self._ratios.get((node, model, kind))
        return 1.0 if found is None else math.exp(found.mean())

    def corrected(self, node: NodeShape, model_id: str, model: ModelShape, batch: int = 1) -> NodeShape:
        """The node with its times as measured where it was seen, for plans."""
        plain = _unmeasured(node)
        if (node.id, model_id, "decode") in self._ratios:
            each_s = cost.decode_s_per_layer(model, plain, batch) * self.slowdown(node.id, model_id, "decode")
            node = replace(node, decode_s_per_layer=each_s)
        if (node.id, model_id, "prefill") in self._ratios:
            each_s = cost.prefill_s_per_token_per_layer(model, plain) * self.slowdown(
                node.id, model_id, "prefill"
            )
            node = replace(node, prefill_s_per_token_per_layer=each_s)
        return node

    def forget(self, node: str) -> None:
        """Drop what is known of a node: it may come back with other hardware."""
        for key in [key for key in self._ratios if key[0] == node]:
            del self._ratios[key]


def expected_s(seen: Observation, model: ModelShape, node: NodeShape) -> float:
    """The roofline's time for the step that was observed."""
    head = cost.head_s(model, node) if seen.with_head else 0.0
    if seen.kind == "decode":
        return seen.layers * cost.decode_s_per_layer(model, node, seen.tokens) + head
    return seen.layers * seen.tokens * cost.prefill_s_per_token_per_layer(model, node) + head


def _unmeasured(node: NodeShape) -> NodeShape:
    return replace(node, decode_s_per_layer=None, prefill_s_per_token_per_layer=None)


def calibrated(
    nodes: Sequence[NodeShape],
    model: ModelShape,
    decode_s: Mapping[str, float],
    prefill_s: Mapping[str, float],
) -> list[NodeShape]:
    """The nodes with their measured times for this model (seconds a layer, and a token and layer), by node.

    Rooflines flatter: a node that was never measured would look better than all that were. So where some were, the
    others are reckoned as many times slower than their roofline as the median of those.
    """
    if not decode_s and not prefill_s:
        return list(nodes)
    usual_decode = _usual(nodes, decode_s, lambda node: cost.decode_s_per_layer(model, node))
    usual_prefill = _usual(nodes, prefill_s, lambda node: cost.prefill_s_per_token_per_layer(model, node))
    found = []
    for node in nodes:
        plain = _unmeasured(node)
        decode = decode_s.get(node.id, node.decode_s_per_layer)
        prefill = prefill_s.get(node.id, node.prefill_s_per_token_per_layer)
        if decode is None and usual_decode is not None:
            decode = usual_decode * cost.decode_s_per_layer(model, plain)
        if prefill is None and usual_prefill is not None:
            prefill = usual_prefill * cost.prefill_s_per_token_per_layer(model, plain)
        found.append(replace(node, decode_s_per_layer=decode, prefill_s_per_token_per_layer=prefill))
    return found


def _usual(
    nodes: Sequence[NodeShape], measured: Mapping[str, float], roofline_s: Callable[[NodeShape], float]
) -> float | None:
    """The median of measured times over their rooflines; None where nothing was measured."""
    ratios = [
        measured[node.id] / max(1e-12, roofline_s(_unmeasured(node))) for node in nodes if node.id in measured
    ]
    return statistics.median(ratios) if ratios else None
