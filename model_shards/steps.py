"""What an engine is asked for and gives back, and how steps are cut into passes through the layers.

Pure: knows neither weights nor caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from model_shards.sampler import Sampling
from model_shards.windows import Verdict, Window

GROUP_ROWS_MAX = 32


@dataclass(slots=True)
class Step:
    """``n`` consecutive positions of one session, from ``position`` on. Exactly one of ``tokens`` (where the
    session starts at layer 0) and ``hidden`` ([n, hidden], compute dtype) is given. ``sample`` asks the last
    stage for the token that follows the step's last position. ``pool`` asks it for the embedding of the text up
    to there: "last_hidden" (of the last position) or "mean" (of all, so every step of the session must ask).

    With a ``window`` the step's rows are a token that is certain, at ``position``, and guesses at what follows it.
    A last stage that samples, for which it must know the window's tokens, says which were right. Any other is told by
    its session's next step, which starts so many positions further as ``kept`` names rows of the window. What a
    window gives has the very bits of single steps, so that text that is known can be computed again as windows."""

    session: str
    position: int
    tokens: tuple[int, ...] | None = None
    hidden: torch.Tensor | None = None
    sample: Sampling | None = None
    pool: str | None = None
    window: Window | None = None
    kept: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many rows the step holds: its positions, or its window's rows."""
        if self.tokens is not None:
            return len(self.tokens)
        return self.hidden.shape[0] if self.hidden is not None else 0

    @property
    def certain(self) -> int:
        """How many positions the step fills for sure."""
        return self.count if self.window is None else 1

    def window_problem(self, *, last: bool) -> str:
        """What is wrong with its window at a stage that ends with the model (``last``) or before; or nothing."""
        window = self.window
        if window is None:
            return ""
        if problem := window.problem():
            return problem
        if window.rows != self.count:
            return f"has a window of {window.rows} rows over {self.count} positions"
        if self.pool is not None:
            return "asks to pool a window"
        if self.tokens is not None and self.tokens != window.tokens:
            return "has a window of other tokens than its own"
        if last and self.sample is not None and not window.tokens:
            return "has a window at the last layer that is sampled, but its tokens are not known"
        return ""

    def kept_problem(self, length: int, loose: int) -> str:
        """What is wrong with its position and ``kept`` for a session of ``length`` positions and ``loose`` rows of a
        window; or nothing. A run that ended early may have dealt with ``kept`` already."""
        kept = self.kept if loose else ()
        if self.position != length + len(kept):
            return f"step at position {self.position}, expected {length + len(kept)}"
        if kept and (kept[0] < 1 or kept[-1] > loose or any(b <= a for a, b in itertools.pairwise(kept))):
            return f"keeps the rows {kept} of a window of {loose + 1}"
        return ""


@dataclass(slots=True)
class StepResult:
    """``hidden`` [n, hidden] in the compute dtype where layers remain; at the last stage ``token`` and its
    ``logprob`` (natural, the model's own) where the step asked to sample, ``embedding`` [hidden] float32 on the
    CPU (after the final norm, not scaled to unit length) where it asked to pool. A window has a ``verdict``, whose
    picks are what single steps would have given one after another; ``token`` is the last of them."""

    session: str
    hidden: torch.Tensor | None = None
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    embedding: torch.Tensor | None = None
    verdict: Verdict | None = None


@dataclass(slots=True)
class Part:
    """Rows [first, first + count) of step number ``at`` of a run. Without ``branches`` (see `attention.Rows`) it is a
    whole step of consecutive positions."""

    at: int
    step: Step
    first: int
    count: int
    branches: Sequence[Sequence[int]] = ()

    @property
    def piece(self) -> bool:
        """Whether it is several consecutive positions, computed in that shape."""
        return self.count > 1 and not self.branches

    def places(self) -> Iterator[tuple[int, int]]:
        """(position, count) of rows whose positions follow one another in one shape."""
        if not self.branches:
            yield self.step.position, self.count
        for branch in self.branches:
            yield self.step.position + len(branch) - 1, 1

    def sampled(self) -> range:
        """Which of its rows are asked for a token."""
        if self.step.sample is None:
            return range(0)
        return range(self.count) if self.branches else range(self.count - 1, self.count)


def passes(
    steps: Sequence[Step], layers: Callable[[Step], tuple[int, int]], largest: Callable[[int], int]
) -> Iterable[list[Part]]:
    """``steps`` as passes through the layers: pieces of prompts alone; single positions and windows' rows over the
    same layers together, in numbers of rows that ``largest(wanted)`` says may share a pass."""
    found: list[list[Part]] = []
    singles: dict[tuple[int, int], list[Part]] = {}
    for at, step in enumerate(steps):
        if step.window is None and step.count > 1:
            found.append([Part(at, step, 0, step.count)])
        else:
            branches = step.window.branches() if step.window is not None else ()
            singles.setdefault(layers(step), []).append(Part(at, step, 0, step.count, branches))
    for together in singles.values():
        left = sum(part.count for part in together)
        while left:
            room = largest(min(left, GROUP_ROWS_MAX))
            left -= room
            group: list[Part] = []
            while room:
                part = together[0]
                taken = min(room, part.count)
                group.append(Part(part.at, part.step, part.first, taken, part.branches[:taken]))
                room -= taken
                if taken == part.count:
                    together.pop(0)
                else:
                    part.first, part.count, part.branches = (
                        part.first + taken,
                        part.count - taken,
                        part.branches[taken:],
                    )
            found.append(group)
    return found
