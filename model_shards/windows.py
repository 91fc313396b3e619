"""Windows of guesses: what one pass checks of an answer's next tokens.

Row 0 of a window is a token that is certain; every other row guesses what follows the row that is its parent. A line
of guesses is a tree without branches. Pure: tokens in, tokens out; who guesses is `speculate`'s, how rows are computed
the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_shards.errors import LocalFault, ModelError
from model_shards.sampler import Pick

WINDOW_ROWS_MAX = 32


@dataclass(frozen=True, slots=True)
class Window:
    """``parents[i] < i`` is the row that row i follows, -1 for row 0. ``tokens[i]`` is what row i guesses (row 0:
    knows); no two rows guess the same after the same parent. A stage in the middle of a chain knows no ``tokens``:
    they are empty there."""

    parents: tuple[int, ...]
    tokens: tuple[int, ...] = ()

    @classmethod
    def line(cls, tokens: Sequence[int]) -> Window:
        """The certain token and guesses that follow one another."""
        return cls(tuple(range(-1, len(tokens) - 1)), tuple(tokens))

    @property
    def rows(self) -> int:
        """How many rows there are, the certain one among them."""
        return len(self.parents)

    @property
    def straight(self) -> bool:
        """Whether it is a line."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def problem(self) -> str:
        """What is wrong with it, or nothing."""
        if not 1 <= self.rows <= WINDOW_ROWS_MAX:
            return f"a window of {self.rows} rows, expected 1 to {WINDOW_ROWS_MAX}"
        if self.parents[0] != -1 or any(
            not 0 <= parent < row for row, parent in enumerate(self.parents) if row
        ):
            return "a window's row follows none before it"
        if self.tokens and len(self.tokens) != self.rows:
            return f"a window of {self.rows} rows with {len(self.tokens)} tokens"
        return ""

    def branches(self) -> list[Sequence[int]]:
        """For every row the rows from row 0 down to itself; it stands ``len - 1`` positions after row 0."""
        found: list[Sequence[int]] = []
        for row, parent in enumerate(self.parents):
            if parent < 0:
                found.append(range(1))
            elif parent == row - 1 and isinstance(found[parent], range):
                found.append(range(row + 1))
            else:
                found.append((*found[parent], row))
        return found

    def follow(self, token: int, row: int) -> int | None:
        """The row that guessed ``token`` after ``row``."""
        for at in range(row + 1, self.rows):
            if self.parents[at] == row and self.tokens[at] == token:
                return at
        return None

    def path(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The rows, after row 0, that ``tokens`` (what really follows it) went through."""
        found: list[int] = []
        for token in tokens:
            row = self.follow(token, found[-1] if found else 0)
            if row is None:
                break
            found.append(row)
        return tuple(found)

    def cut(self, rows: int) -> Window:
        """Its first ``rows`` rows."""
        return self if rows >= self.rows else Window(self.parents[:rows], self.tokens[:rows])


@dataclass(frozen=True, slots=True)
class Verdict:
    """``picks`` are the tokens that follow row 0, in order: the last one is new, those before it were guessed by the
    rows of ``path``."""

    picks: tuple[Pick, ...]
    path: tuple[int, ...]


def judge(window: Window, choose: Callable[[int, Sequence[int]], Pick]) -> Verdict:
    """Picks tokens as if there had been no guesses: ``choose(row, before)`` gives the token that follows ``row``, to
    which the tokens ``before`` lead from row 0. A row counts only if its guess is the very token that was picked.

    As every pick is a function of (seed, position, index) and of what stands before it, the text is not only equal
    in distribution but the same token for token, whatever was guessed and however often: a stage that replaces
    another repeats it. The price: at temperatures above 0 a guess q is right with the probability p(q) of the
    model, and two models that pick by the same number agree less often than the maximal coupling of rejection
    sampling (arXiv 2211.17192) would; greedily both accept alike.

    What ``choose`` raises for a later row ends the verdict before it: asked alone in the next pass, it says so there.
    """
    if not window.tokens:
        raise LocalFault("a window is judged by its tokens")
    picks: list[Pick] = []
    path: list[int] = []
    after: int | None = 0
    while after is not None:
        try:
            found = choose(after, [pick.token for pick in picks])
        except ModelError:
            if not picks:
                raise
            # The row before it stays uncertain: its token was picked, and is the next window's first.
            path.pop()
            return Verdict(tuple(picks), tuple(path))
        picks.append(found)
        after = window.follow(found.token, after)
        if after is not None:
            path.append(after)
    return Verdict(tuple(picks), tuple(path))
