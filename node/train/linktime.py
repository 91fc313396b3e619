"""How much of its time a worker computes, from measured parts: a step's time, the bytes of each round, a link's speed;
and how much of what is trained counts when workers die every so often. Virtual time, no sleeping, no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shares:
    """`computing`: the share of a worker's time. `bits_per_s`: what it sends on the average while it runs."""

    computing: float
    bits_per_s: float


def computing_share(
    bytes_by_tag: Mapping[str, int],
    phases: Mapping[str, int],
    inner_steps: int,
    delay: int,
    step_s: float,
    link_bps: float,
    periods: int = 20,
) -> Shares:
    """Of `periods` times `inner_steps` steps of `step_s` seconds. Each tag's round begins at its phase (1 to
    `inner_steps`) and sends its bytes over a link of `link_bps` that all rounds share, in turn. `delay` 0: the worker
    waits for the mean. Otherwise it trains on for `delay` steps and waits only if the mean is still not there then."""
    now_s = link_free_s = computed_s = 0.0
    arriving: list[tuple[int, float]] = []  # (step at which the mean is merged, when it is here)
    for step in range(1, periods * inner_steps + 1):
        now_s += step_s
        computed_s += step_s
        for tag, phase in phases.items():
            if step >= phase and (step - phase) % inner_steps == 0:
                link_free_s = max(now_s, link_free_s) + 8 * bytes_by_tag[tag] / link_bps
                arriving.append((step + delay, link_free_s))
        for at, here_s in [one for one in arriving if one[0] <= step]:
            now_s = max(now_s, here_s)
            arriving.remove((at, here_s))
    return Shares(computed_s / now_s, 8 * periods * sum(bytes_by_tag.values()) / now_s)


def goodput(
    workers: int, round_s: float, every_s: float, away_s: float, seed: int = 0, lasting_s: float = 3600.0
) -> float:
    """The share of what `workers` could train in `lasting_s` seconds that means count, if one of them, drawn by `seed`,
    dies every `every_s` seconds: it loses what it has not told since its last round (rounds last `round_s`), and the
    one that takes its place trains after `away_s`, with what is left of the round."""
    chance = random.Random(seed)
    back_s = [0.0] * workers
    told_s = 0.0
    next_death_s = every_s
    now_s = 0.0
    while now_s < lasting_s:
        end_s = now_s + round_s
        began_s = [max(now_s, one) for one in back_s]
        while next_death_s <= end_s:
            dead = chance.randrange(workers)
            back_s[dead] = next_death_s + away_s
            began_s[dead] = back_s[dead]
            next_death_s += every_s
        told_s += sum(max(0.0, end_s - one) for one in began_s)
        now_s = end_s
    return told_s / (workers * now_s)
