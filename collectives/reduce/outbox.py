"""What is waiting for one peer, and what it has been given: the books of an exchange's outgoing side."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Traffic:
    """Payload bytes handed out and taken in."""

    bytes_out: int = 0
    bytes_in: int = 0


@dataclass(slots=True)
class Outbox:
    """What a peer is to be sent, in the order results, sums, own values; dicts are ordered sets of chunks."""

    results: dict[int, None] = field(default_factory=dict)
    partials: dict[int, None] = field(default_factory=dict)
    leaves: dict[int, None] = field(default_factory=dict)
    wants: tuple[set[int], set[int], set[int]] | None = None
    leaves_sent: set[int] = field(default_factory=set)
    partials_sent: set[tuple[int, int]] = field(default_factory=set)  # chunk, ident
    asked: int = 0
    pinned: int | None = None  # the chunk of the result whose memory the last frame is
    early: dict[bytes, set[int]] = field(
        default_factory=dict
    )  # results of a declaration that is not known here yet
    frames_in: int = 0
    bytes_out: int = 0

    def empty(self) -> bool:
        return not (self.results or self.partials or self.leaves or self.wants)
