"""From where a stage goes on in a chain that was joined anew: decisions by position, pure.

A session's positions are the same whoever computes them, so a chain is mended by three numbers a stage: how far it got
itself, from where on it kept what it handed out, and from where the stage below wants to be fed. A prompt is replayed
in the pieces that it was read in, because a piece's shape decides the last bits; later positions stand alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from node.serve.protocol import PIECE_TOKENS


@dataclass(frozen=True, slots=True)
class Footing:
    """A stage goes on at position `want`; what it kept from `resend` up to there goes to the stage below first."""

    want: int
    resend: int


def boundary(position: int, prompt_tokens: int) -> int:
    """The last place up to `position` where a step of the session may begin."""
    return position if position >= prompt_tokens else position // PIECE_TOKENS * PIECE_TOKENS


def answered_to(position: int, prompt_tokens: int, tokens: int) -> int:
    """How far the last stage got, which holds `position` positions and `tokens` of the answer: a position whose token
    was lost counts as not done."""
    return boundary(min(position, prompt_tokens + tokens - 1), prompt_tokens)


def footing(own: int, kept_from: int, below: int, prompt_tokens: int) -> Footing:
    """Where a stage goes on that did `own` positions and kept its outputs [kept_from, own), while the one below wants
    to be fed from `below` on. Outputs that nobody kept are computed again."""
    if below >= own:
        return Footing(own, own)
    if kept_from <= below:
        return Footing(own, below)
    again = boundary(below, prompt_tokens)
    return Footing(again, again)


@dataclass(frozen=True, slots=True)
class Part:
    """Positions [start, end) of one message: a piece of the prompt, or positions that stand `alone`, each computed as
    if by itself. `sample` asks for the token after the last one."""

    start: int
    end: int
    alone: bool
    sample: bool


def parts(spans: Iterable[tuple[int, int]], prompt_tokens: int, known: int, rows_max: int) -> Iterator[Part]:
    """What was kept, span by span, as messages. All of the text up to position `known` is known: only what follows it
    is asked for. Positions of the answer go together as long as none of them is asked for its token."""
    first = last = -1
    for start, end in spans:
        joins = start >= prompt_tokens and end < known
        if first >= 0 and (not joins or start != last or end - first > rows_max):
            yield Part(first, last, True, False)
            first = -1
        if joins and end - start <= rows_max:
            first, last = (start, end) if first < 0 else (first, end)
            continue
        if start < prompt_tokens:
            yield Part(start, end, False, end >= known)
            continue
        for at in range(start, end):
            yield Part(at, at + 1, True, at + 1 >= known)
    if first >= 0:
        yield Part(first, last, True, False)
