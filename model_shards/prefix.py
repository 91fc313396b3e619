"""Prefix pages: whole blocks of finished positions, found again by a chained hash of their tokens.

A page names the KV blocks (one a layer) of BLOCK_TOKENS positions. Sessions that begin with the same tokens
hold the same pages; a page nobody holds stays as cache until its blocks are wanted, least reused and longest
unused first, ends of chains before their beginnings. A hash only finds a candidate: the tokens themselves
decide. Pure bookkeeping: no tensors, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from model_shards.errors import LocalFault

REUSE_COUNTED_MAX = 3


@dataclass(slots=True, eq=False)
class Page:
    """``blocks[i]`` holds layer i's rows of ``tokens``, which follow those of ``parent``. ``refs`` sessions
    hold it."""

    key: bytes
    parent: Page | None
    tokens: tuple[int, ...]
    blocks: list[int]
    refs: int = 1
    used: int = 0
    reuses: int = 0
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1


class PrefixCache:
    """Pages of one engine. A ``scope`` keeps pages apart: other layers, or requesters that must not share."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._pages: dict[bytes, Page] = {}
        self._clock = 0
        self.idle_blocks = 0

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, scope: str, tokens: Sequence[int]) -> list[Page]:
        """The longest chain of pages that ``tokens`` begin with, leaving at least the last token out."""
        found: list[Page] = []
        for at in range((len(tokens) - 1) // self.page_tokens):
            wanted = tuple(tokens[at * self.page_tokens : (at + 1) * self.page_tokens])
            parent = found[-1] if found else None
            page = self._pages.get(_key(scope, parent, wanted))
            if page is None or page.tokens != wanted or page.parent is not parent:
                break
            found.append(page)
        return found

    def acquire(self, pages: Iterable[Page]) -> None:
        """One more session holds ``pages``."""
        for page in pages:
            if page.refs == 0:
                self.idle_blocks -= len(page.blocks)
            page.refs += 1
            page.reuses += 1

    def release(self, pages: Sequence[Page]) -> None:
        """A session lets go of its chain of ``pages``; what nobody holds becomes evictable."""
        self._clock += 1
        for page in pages:
            if page.refs < 1:
                raise LocalFault("a prefix page was released more often than acquired")
            page.refs -= 1
            page.used = self._clock
            if page.refs == 0:
                self.idle_blocks += len(page.blocks)

    def add(self, scope: str, parent: Page | None, tokens: Sequence[int], blocks: list[int]) -> Page | None:
        """A new page held by its maker; None where such a page (or one of the same hash) exists already."""
        wanted = tuple(tokens)
        key = _key(scope, parent, wanted)
        if key in self._pages:
            return None
        page = self._pages[key] = Page(key, parent, wanted, blocks)
        return page

    def forget(self, page: Page) -> None:
        """Removes a page that only its caller holds; its blocks are the caller's again."""
        if page.refs != 1 or self._pages.pop(page.key, None) is not page:
            raise LocalFault("a prefix page can be forgotten only by its one holder")

    def evict(self, blocks_wanted: int) -> list[int]:
        """Drops idle pages until their blocks are at least ``blocks_wanted`` (or none are left); returns the
        blocks."""
        idle = [page for page in self._pages.values() if page.refs == 0]
        idle.sort(key=lambda page: (min(page.reuses, REUSE_COUNTED_MAX), page.used, -page.depth))
        freed: list[int] = []
        for page in idle:
            if len(freed) >= blocks_wanted:
                break
            del self._pages[page.key]
            self.idle_blocks -= len(page.blocks)
            freed.extend(page.blocks)
        return freed

    def validate(self) -> None:
        """Raises LocalFault if the books are wrong; for tests."""
        idle = sum(len(page.blocks) for page in self._pages.values() if page.refs == 0)
        blocks = [block for page in self._pages.values() for block in page.blocks]
        if idle != self.idle_blocks or len(blocks) != len(set(blocks)):
            raise LocalFault(f"{self.idle_blocks} idle blocks counted, {idle} found, {len(blocks)} in pages")
        if any(page.refs < 0 or page.key != key for key, page in self._pages.items()):
            raise LocalFault("a page is held by fewer than nobody or filed under another's hash")


def _key(scope: str, parent: Page | None, tokens: tuple[int, ...]) -> bytes:
    before = parent.key if parent is not None else scope.encode()
    text = ",".join(map(str, tokens)).encode()
    return hashlib.blake2b(
        text, digest_size=16, key=hashlib.blake2b(before, digest_size=32).digest()
    ).digest()
