"""Speculative decoding: what is guessed of an answer, how much at a time, and what came of it.

A guesser proposes, the pass that checks its window decides (see `windows.judge`): the text is the one that would have
come without, token for token. Pure but for what a guesser of the caller's does: no clock, no network, no weights.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from model_shards.windows import WINDOW_ROWS_MAX, Window

MATCH_TOKENS_MAX = 5
MATCH_TOKENS_MIN = 2
BRANCHES_MAX = 4
TOKEN_BYTES = 4
MISALIGNED_MAX = 64
"""Hits between two tokens' bytes before a search is given up."""
SMOOTHING = 0.2
CLOCK_S_MIN = 1e-6
SMOOTHING_DOWN = 0.5
FORGETTING = 0.9
SLOPE_ASSUMED = 0.1
SINGLE_EVERY = 48
ACCOUNT_TOKENS = 4
FIRST_TOKENS = 1
PROBE_AT = 0.5


class Guesser(Protocol):
    """Guesses how a text goes on."""

    def add(self, tokens: Sequence[int]) -> None:
        """The text went on with ``tokens``."""

    def guess(self, rows: int) -> Window:
        """A window of at most ``rows`` rows whose row 0 is the text's last token."""


class PromptLookup:
    """Guesses that what followed the text's last few tokens earlier follows them again: in quotes, code, edits, lists.
    (The idea: https://github.com/apoorvumang/prompt-lookup-decoding; no model, some microseconds.)

    The longest such run of tokens counts, and of those the latest; up to ``branches`` different continuations share
    the rows as a tree.
    """

    def __init__(self, tokens: Sequence[int] = (), *, branches: int = 1) -> None:
        self._branches = branches
        self._text = bytearray()
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """The text went on with ``tokens``."""
        self._text += array("I", tokens).tobytes()

    def guess(self, rows: int) -> Window:
        """A window of at most ``rows`` rows; of one row where nothing like the text's end stands before it."""
        length = len(self._text) // TOKEN_BYTES
        last = self._tokens(length - 1, length)
        if rows < 2:
            return Window.line(last)
        for size in range(min(MATCH_TOKENS_MAX, length - 1), MATCH_TOKENS_MIN - 1, -1):
            ends = self._earlier(size)
            if ends:
                return grown(last[0], [self._after(end, rows - 1) for end in ends], rows)
        return Window.line(last)

    def _earlier(self, size: int) -> list[int]:
        """Where the text's last ``size`` tokens ended before, the latest first."""
        found: list[int] = []
        wanted, before, missed = self._text[-size * TOKEN_BYTES :], len(self._text) - TOKEN_BYTES, 0
        while len(found) < self._branches and missed < MISALIGNED_MAX:
            at = self._text.rfind(wanted, 0, before)
            if at < 0:
                break
            if at % TOKEN_BYTES:
                missed += 1
            else:
                found.append(at // TOKEN_BYTES + size)
            before = at + len(wanted) - 1
        return found

    def _after(self, end: int, count: int) -> list[int]:
        """``count`` tokens from ``end`` on; a text that repeats itself to its end is supposed to go on so."""
        found = self._tokens(end, end + count)
        period = len(found)
        while len(found) < count:
            found.append(found[-period])
        return found

    def _tokens(self, first: int, end: int) -> list[int]:
        return array("I", bytes(self._text[first * TOKEN_BYTES : end * TOKEN_BYTES])).tolist()


def grown(root: int, lines: Sequence[Sequence[int]], rows: int) -> Window:
    """A window of at most ``rows`` rows with ``lines`` of guesses after ``root``. What they have in common is one row;
    earlier lines are the likelier ones: the first may take all rows but one for each of the others."""
    parents, tokens = [-1], [root]
    children: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines):
        at, kept = 0, rows - (len(lines) - 1 - number)
        for token in line:
            row = children.get((at, token))
            if row is None:
                if len(parents) >= kept:
                    break
                row = children[at, token] = len(parents)
                parents.append(at)
                tokens.append(token)
            at = row
    return Window(tuple(parents), tuple(tokens))


class Pace:
    """How many rows the next window should have: as many as bring the most tokens a second, by what was measured.

    It may be wrong for ``bound`` of the time at most, and for a few tokens' time at once: what guesses cost comes out
    of an account, into which go what right guesses save and ``bound`` of every second. An empty account means no
    guesses.
    """

    def __init__(self, rows_max: int = 8, bound: float = 0.02) -> None:
        self._rows_max = min(rows_max, WINDOW_ROWS_MAX)
        self._bound = bound
        self._seconds: dict[int, float] = {}
        self._account_s = 0.0
        self._since_single = 0
        self._hits, self._misses = 0.5, 1.0

    def rows(self, limit: int) -> int:
        """Rows of the next window, from 1 (no guess) to ``limit``."""
        single_s = self._seconds.get(1)
        if single_s is None or self._since_single >= SINGLE_EVERY:
            return 1
        best, best_rate = 1, 1.0 / single_s
        for rows in range(2, min(limit, self._rows_max) + 1):
            extra_s = self._pass_s(rows) - single_s
            if extra_s > self._account_s:
                break
            rate = self._expected(rows) / (single_s + extra_s)
            if rate > best_rate:
                best, best_rate = rows, rate
        if best == 1 and limit > 1 and self._pass_s(2) - single_s <= self._account_s - PROBE_AT * single_s:
            return 2  # the account is full enough to find out whether guesses got better
        return best

    def told(self, rows: int, right: int, wrong: bool, seconds: float) -> None:
        """A window of ``rows`` rows took ``seconds``; ``right`` guesses were, and then a ``wrong`` one or none came."""
        seconds = max(seconds, CLOCK_S_MIN)
        before = self._seconds.get(rows)
        if before is None:
            self._seconds[rows] = seconds
        else:  # what was slower is rather chance than what was quicker
            change_s = min(seconds, 3 * before) - before
            self._seconds[rows] = before + change_s * (SMOOTHING if change_s > 0 else SMOOTHING_DOWN)
        single_s = self._seconds.get(1, seconds)
        gained_s = right * single_s - max(0.0, self._pass_s(rows) - single_s) + self._bound * seconds
        least_s, most_s = -ACCOUNT_TOKENS * single_s, ACCOUNT_TOKENS * single_s
        if rows == 1 and before is None:
            gained_s += FIRST_TOKENS * single_s
        self._account_s = min(most_s, max(least_s, self._account_s + gained_s))
        self._since_single = 0 if rows == 1 else self._since_single + 1
        if rows > 1:
            self._hits = self._hits * FORGETTING + right
            self._misses = self._misses * FORGETTING + wrong

    def _expected(self, rows: int) -> float:
        """Tokens that a window brings, if its guesses are right as often as lately."""
        right = (self._hits + 0.5) / (self._hits + self._misses + 1.0)
        return sum(right**at for at in range(rows))

    def _pass_s(self, rows: int) -> float:
        """Seconds of a pass: as measured, else between or beyond what was measured."""
        if rows in self._seconds:
            return self._seconds[rows]
        single_s = self._seconds[1]
        nearest = min(
            (each for each in self._seconds if each > 1), key=lambda each: abs(each - rows), default=0
        )
        slope_s = (self._seconds[nearest] - single_s) / (nearest - 1) if nearest else SLOPE_ASSUMED * single_s
        return single_s + max(0.0, slope_s) * (rows - 1)


class Speculation:
    """One answer's guesses: what to ask of the next pass, and what its tokens say of the guesses.

    ``ends`` are tokens that end the answer: nothing is guessed from one on.
    """

    def __init__(self, guesser: Guesser, pace: Pace, ends: AbstractSet[int] = frozenset()) -> None:
        self._guesser = guesser
        self._pace = pace
        self._ends = ends
        self.window = Window.line((0,))
        self.kept: tuple[int, ...] = ()
        self.guessed = self.right = 0

    def read(self, tokens: Sequence[int]) -> None:
        """The text begins with ``tokens``, or went on with them by no pass that counts."""
        self._guesser.add(tokens)

    def next(self, rows: int) -> Window:
        """The next window, of at most ``rows`` rows: the text's last token and guesses."""
        window = self._guesser.guess(self._pace.rows(max(1, min(rows, WINDOW_ROWS_MAX))))
        self.window = self._ended(window)
        return self.window

    def came(self, tokens: Sequence[int], seconds: float) -> tuple[int, ...]:
        """The text went on with ``tokens``, ``seconds`` after the last window was asked for. Returns the rows of that
        which they went through."""
        window = self.window
        self.kept = window.path(tokens[:-1])
        right, leaf = len(self.kept), self.kept[-1] if self.kept else 0
        self._pace.told(window.rows, right, leaf in window.parents, seconds)
        self._guesser.add(tokens)
        self.guessed += window.rows - 1
        self.right += right
        return self.kept

    def _ended(self, window: Window) -> Window:
        """The window without what guesses the answer's end: no row may follow it."""
        first = next((row for row in range(1, window.rows) if window.tokens[row] in self._ends), None)
        return window if first is None else window.cut(first)
