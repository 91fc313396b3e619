"""Which nodes to trust with work now: scores from observed times and failures, probation and return.

A node is good, slow (its times stand out among its peers'), out (it failed) or on probation (back, with little weight
until it has proved itself). Both slow and out last for a while that doubles with each relapse: who is avoided shows no
new times, so that without an end nothing could clear it. Time is an argument; what a failure was is the caller's to
say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from scheduler.routing import Hosted

State = Literal["good", "slow", "out", "probation"]


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """Limits of the scores."""

    slow_ratio: float = 1.8
    slow_after: int = 5
    forgiven_ratio: float = 1.3
    slow_s: float = 60.0
    out_s: float = 10.0
    out_s_max: float = 1800.0
    relapse_memory_s: float = 3600.0
    probation_successes: int = 5
    probation_reliability: float = 0.6
    memory: float = 0.98


@dataclass(frozen=True, slots=True)
class Standing:
    """A node's state, the chance that a stage on it goes well, and how much slower than expected it is."""

    state: State
    reliability: float
    slowdown: float


GOOD = Standing("good", 1.0, 1.0)


@dataclass(slots=True)
class _Record:
    good: float = 8.0
    bad: float = 0.0
    log_ratio: float = 0.0
    seen: int = 0
    slow: bool = False
    slow_until_s: float = -math.inf
    slow_relapses: int = 0
    slowed_s: float = -math.inf
    out_until_s: float = -math.inf
    relapses: int = 0
    failed_s: float = -math.inf
    to_prove: int = 0


@dataclass(slots=True)
class Health:
    """Scores of all nodes that did something."""

    config: HealthConfig = field(default_factory=HealthConfig)
    _records: dict[str, _Record] = field(default_factory=dict)

    def succeeded(self, node: str, seconds: float, expected_s: float, now_s: float) -> None:
        """A stage on the node went well and took `seconds` where `expected_s` was expected."""
        record = self._records.setdefault(node, _Record())
        if record.slow and now_s >= record.slow_until_s:
            self._try_again(record)
        ratio = math.log(max(1e-9, seconds) / max(1e-9, expected_s))
        share = 0.2 if record.seen else 1.0
        record.log_ratio += share * (max(-3.0, min(3.0, ratio)) - record.log_ratio)
        record.seen += 1
        record.good = record.good * self.config.memory + 1.0
        record.bad *= self.config.memory
        if record.to_prove and now_s >= record.out_until_s:
            record.to_prove -= 1
        # A new time also shifts what is usual, and so how the others stand out.
        usual = self._usual()
        for each in self._records.values():
            self._weigh(each, usual, now_s)

    def failed(self, node: str, now_s: float) -> None:
        """A stage on the node was lost: it vanished, refused, or gave what cannot be."""
        record = self._records.setdefault(node, _Record())
        if now_s - record.failed_s > self.config.relapse_memory_s:
            record.relapses = 0
        record.good *= self.config.memory
        record.bad = record.bad * self.config.memory + 1.0
        # Several requests die with one node: while it is out they are one failure, not relapses.
        if now_s >= record.out_until_s:
            out_s = min(self.config.out_s_max, self.config.out_s * 2.0 ** min(record.relapses, 30))
            record.out_until_s = now_s + out_s
            record.relapses += 1
        record.failed_s = now_s
        record.to_prove = self.config.probation_successes

    def standing(self, node: str, now_s: float) -> Standing:
        """What to think of a node now; unknown ones are good."""
        return self._standing(node, self._usual(), now_s)

    def _standing(self, node: str, usual: float, now_s: float) -> Standing:
        record = self._records.get(node)
        if record is None:
            return GOOD
        reliability = (record.good + 1.0) / (record.good + record.bad + 1.0)
        slowdown = max(1.0, math.exp(record.log_ratio - usual))
        if now_s < record.out_until_s:
            return Standing("out", 0.0, slowdown)
        if record.slow and now_s < record.slow_until_s:
            return Standing("slow", reliability, slowdown)
        if record.to_prove or record.slow:
            return Standing("probation", min(reliability, self.config.probation_reliability), slowdown)
        return Standing("good", reliability, slowdown)

    def hosted(self, hosted: Sequence[Hosted], now_s: float) -> list[Hosted]:
        """The spans as routing should see them: without those that are out, slow ones slower, doubtful ones doubted.

        Where leaving out every host that is out would leave a layer to nobody, those hosts stay, as the last resort.
        """
        usual = self._usual()
        standing = {h.node: self._standing(h.node, usual, now_s) for h in hosted}
        kept = [h for h in hosted if standing[h.node].state != "out"]
        served = {x for h in kept for x in range(h.start, h.end)}
        kept += [
            h
            for h in hosted
            if standing[h.node].state == "out" and not served.issuperset(range(h.start, h.end))
        ]
        return [_seen_as(h, standing[h.node]) for h in kept]

    def standings(self, now_s: float) -> dict[str, Standing]:
        """Every node of which anything was seen."""
        return {node: self.standing(node, now_s) for node in self._records}

    def forget(self, node: str) -> None:
        """Drop a node that left the mesh for good."""
        self._records.pop(node, None)

    def _usual(self) -> float:
        """The median log ratio: when all are slower than expected, the expectation is off, not the nodes. Of two the
        quicker one is as it should be, and one alone stands out among nobody."""
        seen = [r.log_ratio for r in self._records.values() if r.seen >= self.config.slow_after]
        return statistics.median(seen) if len(seen) >= 3 else min(seen, default=0.0)

    def _try_again(self, record: _Record) -> None:
        """Its time as a straggler is over: what it shows from now on counts, and nothing of before."""
        record.slow = False
        record.seen = 0
        record.log_ratio = 0.0
        record.to_prove = max(record.to_prove, self.config.probation_successes)

    def _weigh(self, record: _Record, usual: float, now_s: float) -> None:
        if record.seen < self.config.slow_after:
            return
        above = record.log_ratio - usual
        limit = self.config.forgiven_ratio if record.slow else self.config.slow_ratio
        if above <= math.log(limit):
            record.slow = False
        elif not record.slow:
            if now_s - record.slowed_s > self.config.relapse_memory_s:
                record.slow_relapses = 0
            spell_s = self.config.slow_s * 2.0 ** min(record.slow_relapses, 30)
            record.slow, record.slowed_s = True, now_s
            record.slow_until_s = now_s + min(self.config.out_s_max, spell_s)
            record.slow_relapses += 1


def _seen_as(h: Hosted, standing: Standing) -> Hosted:
    """A span with what is thought of its host."""
    factor = standing.slowdown if standing.state == "slow" else 1.0
    if factor == standing.reliability == 1.0:
        return h
    return replace(
        h,
        reliability=h.reliability * max(0.05, standing.reliability),
        s_per_layer=h.s_per_layer * factor,
        prefill_s_per_token_per_layer=h.prefill_s_per_token_per_layer * factor,
    )
