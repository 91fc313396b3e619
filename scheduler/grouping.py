"""A set of replicas in the making: groups of seats, the option each runs, and the score of the whole.

`Grouping.swap` is the one move that search makes: some groups for others, if that scores better. It knows rates, not
where moves come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.pool import Option, Pool, Prefer, Replica, objective

GAIN_LEAST = 1e-9


@dataclass(slots=True)
class Grouping:
    """Groups of seats with the option each runs, and the sums of their rates."""

    pool: Pool
    prefer: Prefer
    groups: list[tuple[int, ...]] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    token_rates: float = 0.0
    full_rates: float = 0.0

    def score(self, token_rates: float | None = None, full_rates: float | None = None) -> float:
        """A number to maximise: the objective, with a trace of the other rate to break ties."""
        s = self.token_rates if token_rates is None else token_rates
        p = self.full_rates if full_rates is None else full_rates
        if self.prefer == "balanced":
            return math.sqrt(max(0.0, s * p))
        return objective(s, p, self.prefer) + 1e-7 * (p if self.prefer == "latency" else s)

    def best(self, group: Sequence[int], token_rates: float, full_rates: float) -> Option | None:
        """The option of `group` that scores best beside replicas with these sums."""
        options = self.pool.options(group)
        if not options:
            return None
        return max(options, key=lambda o: self.score(token_rates + o.token_rate, full_rates + o.full_rate))

    def add(self, group: Sequence[int], option: Option) -> None:
        """Append a replica."""
        self.groups.append(tuple(group))
        self.options.append(option)
        self.token_rates += option.token_rate
        self.full_rates += option.full_rate

    def append(self, group: Sequence[int]) -> bool:
        """Append a replica of this group with its best option; False when it cannot hold the model."""
        option = self.best(group, self.token_rates, self.full_rates)
        if option is not None:
            self.add(group, option)
        return option is not None

    def replace(self, k: int, group: Sequence[int]) -> None:
        """Put `group`, which holds the model, in the place of group `k`."""
        old = self.options[k]
        s, p = self.token_rates - old.token_rate, self.full_rates - old.full_rate
        new = self.best(group, s, p)
        if new is not None:
            self.groups[k], self.options[k] = tuple(group), new
            self.token_rates, self.full_rates = s + new.token_rate, p + new.full_rate

    def settle(self) -> None:
        """Let each replica pick its option again beside the others, until none changes."""
        for _ in range(8):
            changed = False
            for k, group in enumerate(self.groups):
                old = self.options[k]
                s, p = self.token_rates - old.token_rate, self.full_rates - old.full_rate
                new = self.best(group, s, p)
                if new is not None and new is not old:
                    gain = self.score(s + new.token_rate, p + new.full_rate) - self.score()
                    if gain > GAIN_LEAST * self.score():
                        self.options[k] = new
                        self.token_rates, self.full_rates = s + new.token_rate, p + new.full_rate
                        changed = True
            if not changed:
                break
        self.token_rates = sum(o.token_rate for o in self.options)
        self.full_rates = sum(o.full_rate for o in self.options)

    def unused(self) -> list[int]:
        """Seats in no group."""
        if sum(map(len, self.groups)) == len(self.pool.seats):
            return []
        used = {i for group in self.groups for i in group}
        return [i for i in range(len(self.pool.seats)) if i not in used]

    def replicas(self) -> list[Replica]:
        """The replicas as stages."""
        return [self.pool.replica(g, o) for g, o in zip(self.groups, self.options, strict=True)]

    def swap(self, olds: Sequence[int], news: Sequence[tuple[int, ...]]) -> float:
        """Replace groups by number with `news` if that scores better; the gain, or 0 when nothing was done."""
        s = self.token_rates - sum(self.options[k].token_rate for k in olds)
        p = self.full_rates - sum(self.options[k].full_rate for k in olds)
        picked: list[Option] = []
        for group in news:
            option = self.best(group, max(s, 1e-12), max(p, 1e-12))
            if option is None:
                return 0.0
            picked.append(option)
            s += option.token_rate
            p += option.full_rate
        gain = self.score(s, p) - self.score()
        if gain <= GAIN_LEAST * self.score():
            return 0.0
        for k in sorted(olds, reverse=True):
            del self.groups[k], self.options[k]
        self.groups.extend(tuple(group) for group in news)
        self.options.extend(picked)
        self.token_rates, self.full_rates = s, p
        return gain
