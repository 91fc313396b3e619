"""Which beginnings of prompts are in whose caches: marks of whole pieces, what a node tells of them, who holds them.

A prompt enters a chain in pieces of PIECE_TOKENS from position 0 on, and only whole pieces are taken over by later
sessions: a request then computes exactly the pieces it would have computed alone, bit for bit. A mark is a chained hash
of pieces; the first stage checks it against the tokens, later stages never see these. What a stage caches depends on
all stages before it, so that a mark is told together with that chain. Pure: no network, no engine, no clock.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from node.serve.protocol import MARK_BYTES, PIECE_TOKENS, StageRef

MARKS_TOLD_MAX = 96
REMEMBERED_MAX = 1024
LOOKS_MAX = 2000
"""Cache look-ups for one request, at most."""


def marks_of(prompt: Sequence[int], adapter: str = "") -> tuple[bytes, ...]:
    """A mark for each whole piece of a prompt that another session may hold: all but the one with the last token."""
    marks: list[bytes] = []
    mark = first_mark(adapter)
    for at in range(0, len(prompt) - PIECE_TOKENS, PIECE_TOKENS):
        mark = next_mark(mark, prompt[at : at + PIECE_TOKENS])
        marks.append(mark)
    return tuple(marks)


def first_mark(adapter: str) -> bytes:
    """What the first piece follows: what was computed under an adapter is nothing to sessions without it."""
    return hashlib.blake2b(adapter.encode(), digest_size=MARK_BYTES).digest() if adapter else b""


def next_mark(before: bytes, piece: Sequence[int]) -> bytes:
    """The mark of a piece that follows the one marked `before` (see `first_mark`)."""
    text = ",".join(map(str, piece)).encode()
    return hashlib.blake2b(text, digest_size=MARK_BYTES, key=before).digest()


def scope_of(stages: Sequence[StageRef], index: int) -> str:
    """The chain before stage `index`: with other machines there, other bits would be in the cache."""
    if index == 0:
        return ""
    text = ";".join(f"{s.peer}:{s.start}:{s.end}" for s in stages[:index])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def told_mark(scope: str, start: int, end: int, mark: bytes) -> bytes:
    """What a stage over [start, end) behind the chain of `scope` tells of a mark."""
    key = f"{start}:{end}:{scope}".encode()
    return hashlib.blake2b(mark, digest_size=MARK_BYTES, key=key).digest()


def stand_ins(marks: Sequence[bytes], vocab: int) -> tuple[int, ...]:
    """Token ids that stand for the pieces of `marks` at a stage that never sees the tokens, and one more."""
    found: list[int] = []
    for mark in marks:
        data = hashlib.shake_128(mark).digest(4 * PIECE_TOKENS)
        found.extend(int.from_bytes(data[at : at + 4], "little") % vocab for at in range(0, len(data), 4))
    return (*found, 0) if found else ()


class Held:
    """What a stage's engine probably holds, by told marks, the latest used last. At most `marks_max` are remembered."""

    def __init__(self, marks_max: int) -> None:
        self._marks_max = max(1, marks_max)
        self._marks: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, mark: bytes) -> bool:
        return mark in self._marks

    def use(self, marks: Sequence[bytes]) -> None:
        """A session holds these pieces, first piece first: the ends of chains are forgotten before their beginnings."""
        for mark in reversed(marks):
            self._marks[mark] = None
            self._marks.move_to_end(mark)
        while len(self._marks) > self._marks_max:
            self._marks.popitem(last=False)

    def drop(self, marks: Sequence[bytes]) -> None:
        """The engine holds these no more."""
        for mark in marks:
            self._marks.pop(mark, None)

    def summary(self) -> bytes:
        """The latest used marks one after another, for the mesh."""
        return b"".join(list(self._marks)[-MARKS_TOLD_MAX:])


def read_summary(told: bytes) -> frozenset[bytes]:
    """The marks in a summary."""
    return frozenset(told[at : at + MARK_BYTES] for at in range(0, len(told), MARK_BYTES))


@dataclass(frozen=True, slots=True)
class Holding:
    """A chain whose every stage probably holds the first `tokens` of a prompt."""

    stages: tuple[StageRef, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Teller:
    """A host of layers [start, end) and the marks it told."""

    start: int
    end: int
    marks: frozenset[bytes]


class Finder:
    """Finds chains that hold a prompt's beginning: from what hosts told, and from what this gateway itself sent."""

    def __init__(self) -> None:
        self._sent: OrderedDict[bytes, tuple[StageRef, ...]] = OrderedDict()

    def sent(self, stages: tuple[StageRef, ...], marks: Sequence[bytes]) -> None:
        """A prompt with these marks went through these stages just now."""
        for mark in marks:
            self._sent[mark] = stages
            self._sent.move_to_end(mark)
        while len(self._sent) > REMEMBERED_MAX:
            self._sent.popitem(last=False)

    def gone(self, stages: tuple[StageRef, ...]) -> None:
        """These stages do not hold what was sent through them."""
        for mark in [mark for mark, known in self._sent.items() if known == stages]:
            del self._sent[mark]

    def holdings(
        self, hosts: Sequence[tuple[str, Teller]], layers: int, marks: Sequence[bytes]
    ) -> list[Holding]:
        """Chains over `hosts` (peer and span) that hold some of the prompt, those that hold most first."""
        if not marks:
            return []
        found = {h.stages: h for h in _told(hosts, layers, marks)}
        for count in range(len(marks), 0, -1):
            stages = self._sent.get(marks[count - 1])
            if stages is not None and all(_hosted(hosts, s) for s in stages):
                known = found.get(stages)
                tokens = max(count * PIECE_TOKENS, known.tokens if known else 0)
                found[stages] = Holding(stages, tokens)
                break
        return sorted(found.values(), key=lambda h: (-h.tokens, len(h.stages)))


def _hosted(hosts: Sequence[tuple[str, Teller]], stage: StageRef) -> bool:
    return any(
        peer == stage.peer and teller.start <= stage.start and stage.end <= teller.end
        for peer, teller in hosts
    )


def _told(hosts: Sequence[tuple[str, Teller]], layers: int, marks: Sequence[bytes]) -> Iterator[Holding]:
    tellers = [(peer, teller) for peer, teller in hosts if teller.marks]
    edges = sorted({t.start for _, t in tellers} | {t.end for _, t in tellers})
    looks = 0
    paths: list[tuple[tuple[StageRef, ...], int]] = [((), len(marks))]
    while paths:
        stages, count = paths.pop()
        layer = stages[-1].end if stages else 0
        if layer >= layers:
            yield Holding(stages, count * PIECE_TOKENS)
            continue
        scope = scope_of(stages, len(stages))
        used = {s.peer for s in stages}
        for peer, teller in tellers:
            if peer in used or not teller.start <= layer < teller.end:
                continue
            for end in (e for e in edges if layer < e <= min(teller.end, layers)):
                looks += 1
                if looks > LOOKS_MAX:
                    return
                held = 0
                while held < count and told_mark(scope, layer, end, marks[held]) in teller.marks:
                    held += 1
                if held:
                    paths.append(((*stages, StageRef(peer, layer, end)), held))
