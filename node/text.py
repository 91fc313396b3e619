"""From token events to the text a client sees: incremental decoding, stop strings, finish reasons.

A pure core: one `TextStream` a generation takes events and returns pieces. Text never splits a character,
never shows a stop string or an end-of-text token, and is held back only while it may be the start of a stop
string. It knows nothing of HTTP or of where tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model_shards import IncrementalDecoder, StopMatcher
from node.gateway import TokenEvent

if TYPE_CHECKING:
    from model_shards import Tokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text (perhaps empty) and, at the end, why it ended. `tokens` counts all so far, shown or not; `events` are
    those whose text is now shown; `token` is the one just taken, unless it only ended the text."""

    text: str
    tokens: int
    finish: Finish | None
    events: tuple[TokenEvent, ...] = ()
    token: int | None = None


class TextStream:
    """The text of one generation, and the sum of its tokens' log-probabilities. After a piece with a finish no further
    event is taken.

    `prompt` (the token ids before the first event) decides whether a space belongs between prompt and answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], max_tokens: int, prompt: Sequence[int] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt)
        self._matcher = StopMatcher(stops)
        self._max_tokens = max_tokens
        self._untold: list[TokenEvent] = []
        self._token: int | None = None
        self.tokens = 0
        self.logprob = 0.0
        self.finish: Finish | None = None

    def replay(self, tokens: Sequence[int]) -> None:
        """Take the first tokens of an answer, whose text was shown elsewhere; `finish` says if they are all of it."""
        for index, token in enumerate(tokens):
            if self.finish is None:
                self.push(TokenEvent(token, index, None, None))
        self._untold.clear()

    def push(self, event: TokenEvent) -> Piece:
        """Take the next event and return what can be shown now."""
        if self.finish is not None:
            raise ValueError("the text has already ended")
        self.tokens += 1
        self.logprob += event.logprob or 0.0
        self._token = None if event.finish == "stop" else event.token
        if event.finish == "stop":
            return self._end("stop", "")
        self._untold.append(event)
        text, stopped = self._matcher.push(self._decoder.push(event.token))
        if stopped:
            self.finish = "stop"
        elif event.finish == "length" or self.tokens >= self._max_tokens:
            return self._end("length", text)
        return self._piece(text)

    def _end(self, finish: Finish, shown: str) -> Piece:
        """The last piece: what was still held back, unless it completes a stop string."""
        text, stopped = self._matcher.push(self._decoder.flush())
        self.finish = "stop" if stopped else finish
        return self._piece(shown + text + ("" if stopped else self._matcher.flush()))

    def _piece(self, text: str) -> Piece:
        """Tokens are told with their text: those of a stop string never are."""
        events: tuple[TokenEvent, ...] = ()
        if text:
            events, self._untold = tuple(self._untold), []
        return Piece(text, self.tokens, self.finish, events, self._token)
