"""Log-probabilities of an answer's tokens as the two OpenAI endpoints show them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from node.gateway import TokenEvent

if TYPE_CHECKING:
    from model_shards import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


class Likelihoods:
    """Those of one choice: of all its tokens in one document, or of a few at a time. With `chat` in the form of chat
    completions, else in that of plain ones, whose offsets count characters of the answer."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._offset = 0

    def document(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """The next tokens'."""
        if self._chat:
            content = [
                self._entry(event.token, event.logprob)
                | {"top_logprobs": [self._entry(token, logprob) for token, logprob in event.top]}
                for event in events
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(event.token) for event in events]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(event.logprob) for event in events],
            "top_logprobs": [
                {self._text(token): _finite(logprob) for token, logprob in event.top} for event in events
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(LEAST, logprob)
