"""What the first stage asks of its chain after each pass: the next token alone, or a window with guesses.

It guesses by look-up in the text, which it sees in any case, and as much at a time as has proved to pay on this chain:
how long a pass takes from here until its tokens are back is what counts. Pure; times are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model_shards import Pace, PromptLookup, Speculation, Window
from node.serve.protocol import SessionOpen


class Asking:
    """One session's text and its guesses. `ends` are tokens that end the answer, `share()` is how many rows a window
    may have beside what else this node has to do. `made` tokens of the answer came before it began to ask."""

    def __init__(
        self, request: SessionOpen, ends: frozenset[int], share: Callable[[], int], made: int = 0
    ) -> None:
        self._share = share
        # The first token of a session that takes a cache over was made where that comes from.
        self._left = request.new_tokens_max - (made or bool(request.sources))
        self._asked_s: float | None = None
        self._speculation = (
            Speculation(PromptLookup(), Pace(request.window), ends) if request.window > 1 else None
        )

    def read(self, tokens: Sequence[int]) -> None:
        """A part of the prompt."""
        if self._speculation is not None:
            self._speculation.read(tokens)

    def after(self, tokens: Sequence[int], now_s: float) -> tuple[Window, tuple[int, ...]]:
        """The text went on with `tokens`, of one pass: the next window, and which rows of the one before they went
        through."""
        self._left -= len(tokens)
        if self._speculation is None:
            return Window.line(tokens[-1:]), ()
        kept: tuple[int, ...] = ()
        if self._asked_s is None:
            self._speculation.read(tokens)
        else:
            kept = self._speculation.came(tokens, now_s - self._asked_s)
        self._asked_s = now_s
        return self._speculation.next(min(self._left, self._share())), kept
