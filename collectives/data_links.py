"""The data links of all runs of a node: who opens them, to which run and tag a new one belongs, how fast they may go.

Of two members the one with the smaller peer id opens; the first message says what for. It knows nothing of frames.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2p import Link, Links, P2pError, pack_value, unpack_value

SERVICE = "collectives/1"
HELLO_WITHIN_S = 10.0
WINDOW_BYTES_MIN = 2 << 20
WINDOW_BYTES_MAX = 8 << 20
BURST_S = 0.02
BURST_BYTES_MIN = 64 << 10
CLAIM_BPS_MAX = 2.0**31  # whoever sends more than this is held up by its processor, not by its line
CLAIMS_SEEN = 8
CLAIM_KEPT = (0.7, 1.1)  # of it

Accept = Callable[["Purpose", Link], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Purpose:
    """The first message of a link. `pair` names a pairwise average; empty for rounds."""

    run: str
    tag: str
    pair: str = ""


class LinkDesk:
    """Takes the links that peers open and hands them on."""

    def __init__(self, links: Links, accept: Accept) -> None:
        self._accept = accept
        links.serve(SERVICE, self._serve)

    async def _serve(self, link: Link) -> None:
        purpose: Purpose | None = None
        with trio.move_on_after(HELLO_WITHIN_S), contextlib.suppress(P2pError):
            header, _ = await link.receive()
            purpose = unpack_value(Purpose, header)
        if purpose is not None:
            await self._accept(purpose, link)


def window_for(tensor_bytes: int, links: int) -> int:
    """Bytes that each of so many links may hold in each direction, while tensors of that size are reduced: an eighth of
    them all together, because that is beside what the reduction itself holds; but what a link needs to stay busy."""
    return min(max(tensor_bytes // (16 * max(links, 1)), WINDOW_BYTES_MIN), WINDOW_BYTES_MAX)


async def introduce(link: Link, purpose: Purpose) -> None:
    """Say what a link that was opened here is for."""
    await link.send(pack_value(purpose))


class Uplink:
    """A bucket of bytes that fills at `rate_bps` bits a second and holds `burst_bytes` (by default what comes in
    BURST_S, so that a busy program which wakes up late loses nothing of its rate); 0 is no limit.

    It may be overdrawn by one message, which the next ones wait for: the average is exact, whatever their size.
    """

    def __init__(self, rate_bps: float, burst_bytes: float | None = None) -> None:
        self._bytes_per_s = rate_bps / 8
        if burst_bytes is None:
            burst_bytes = max(BURST_BYTES_MIN, self._bytes_per_s * BURST_S)
        self._burst_bytes = self._tokens = burst_bytes
        self._filled_s = 0.0
        self._turn = trio.StrictFIFOLock()

    async def take(self, count: int) -> None:
        """Wait until `count` bytes may go."""
        if self._bytes_per_s == 0:
            return
        async with self._turn:
            now_s = trio.current_time()
            gained = (now_s - self._filled_s) * self._bytes_per_s
            self._tokens = min(self._burst_bytes, self._tokens + gained) - count
            self._filled_s = now_s
            if self._tokens < 0:
                await trio.sleep(-self._tokens / self._bytes_per_s)


class Claim:
    """What a node says that it can send, which shares follow: the best that its links showed when it was asked the last
    times, as a busy computer shows less; kept until that is clearly another.

    Shares are sensitive: of four members the two with half the others' bandwidth own nothing. By the last sample alone,
    four peers on one machine gave all the work to one of them, another one in each round.
    """

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=CLAIMS_SEEN)
        self._claim_bps = 0.0

    def of(self, seen_bps: float) -> float:
        """The claim, `seen_bps` (0: nothing) taken into account; 0 where nothing is known."""
        if seen_bps > 0:
            self._seen.append(min(seen_bps, CLAIM_BPS_MAX))
        best_bps = max(self._seen, default=0.0)
        least, most = CLAIM_KEPT
        if not least * self._claim_bps <= best_bps <= most * self._claim_bps:
            self._claim_bps = best_bps
        return self._claim_bps
