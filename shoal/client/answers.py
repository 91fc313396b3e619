"""What the SDK hands back. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a stream as it came (none where tokens make no whole character yet), the ids of the tokens that came
    with it, and at the end why it ended (`stop` or `length`)."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    `ttft_s` runs from the call to the first token, `total_s` to the end. `gateways` are the addresses that took part:
    more than one where some died on the way.
    """

    text: str
    finish: str | None
    model: str
    tokens: tuple[int, ...]
    prompt_tokens: int | None
    completion_tokens: int
    ttft_s: float | None
    total_s: float
    gateways: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None where that cannot be said."""
        if self.ttft_s is None or self.completion_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.ttft_s)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the mesh. `detail` says why it is not ready; `parent` is an adapter's base."""

    name: str
    ready: bool
    detail: str
    context_tokens: int
    parent: str | None = None
