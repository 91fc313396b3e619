"""Keeping a path under a link, at the side that opened it.

A direct path if it answers at once, a libp2p stream otherwise and whenever a direct one breaks, and a direct one again
as soon as it can be had, tried ever more seldom. It knows when a path is made, not how records use it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from p2p.errors import PeerLost, ProtocolViolation, RemoteFault, Unreachable
from p2p.host import ByteStream
from p2p.links.carriers import Carrier, StreamCarrier
from p2p.links.connect import Address, dial
from p2p.links.handshake import CHALLENGE_SIZE, Hello, challenge_of, introduce
from p2p.links.link import Link, Path
from p2p.links.meter import Meter

logger = logging.getLogger(__name__)

_STEADY_S = 30.0

OpenStream = Callable[[], Awaitable[ByteStream]]


class Keeper:
    """One a link. `offered` are the peer's addresses; `rtt_s` tells what Rpc knows of its distance."""

    def __init__(
        self,
        link: Link,
        offered: list[Address],
        open_stream: OpenStream,
        rtt_s: Callable[[], float | None],
        meter: Meter,
    ) -> None:
        self._link = link
        self._offered = offered
        self._open_stream = open_stream
        self._rtt_s = rtt_s
        self._meter = meter
        self._config = link.config
        self._generation = 0
        self._wait_s = self._config.upgrade_min_s

    async def run(self) -> None:
        """Until the link fails, which cancels this."""
        link = self._link
        async with trio.open_nursery() as nursery:
            await self._first(nursery)
            while link.failure is None:
                path = link.path_now
                if path is None:
                    await self._fall_back(nursery)
                elif path.name == "direct" or not self._offered:
                    await link.changed.wait()
                    if link.path_now is None:
                        self._broke(path)
                else:
                    await self._better(nursery, path)

    async def _first(self, nursery: trio.Nursery) -> None:
        if not self._offered or trio.current_time() < self._meter.no_direct_until_s:
            return
        with trio.move_on_after(self._config.dial_grace_s):
            await self._try_direct(nursery)
        if self._link.path_now is None:  # the next links to this peer do not wait for it
            self._meter.no_direct_until_s = trio.current_time() + self._config.direct_retry_s

    def _broke(self, path: Path) -> None:
        logger.info("a %s path to %s broke: %s", path.name, self._link.peer, path.reason)
        if trio.current_time() - path.began_s >= _STEADY_S:
            self._wait_s = self._config.upgrade_min_s
        else:
            self._longer()

    async def _better(self, nursery: trio.Nursery, path: Path) -> None:
        """Give a stream some time, then try for a direct path."""
        link = self._link
        with trio.move_on_after(self._wait_s):
            while link.path_now is path and link.failure is None:
                await link.changed.wait()
        if link.path_now is not path or link.failure is not None:
            return
        with trio.move_on_after(self._config.dial_deadline_s):
            await self._try_direct(nursery)
        if link.path_now is path:
            self._longer()
        else:
            self._meter.no_direct_until_s = 0.0

    def _longer(self) -> None:
        self._wait_s = min(2 * self._wait_s, self._config.upgrade_max_s)

    async def _try_direct(self, nursery: trio.Nursery) -> None:
        first = self._generation + 1
        self._generation += len(self._offered)  # each address that fails uses one up
        try:
            carriers, position = await dial(self._link, self._offered, first, self._rtt_s())
        except Unreachable as unreachable:
            logger.debug("no direct path to %s: %s", self._link.peer, unreachable)
            return
        self._adopt(nursery, carriers, position)

    async def _fall_back(self, nursery: trio.Nursery) -> None:
        """A stream to the peer. Without one, the link is over."""
        link = self._link
        try:
            with trio.fail_after(self._config.recover_deadline_s):
                carrier = StreamCarrier(await self._open_stream())
                position = await self._introduce(carrier)
        except trio.TooSlowError:
            link.fail(PeerLost(link.peer, f"no path to {link.peer} could be made in time"))
        except RemoteFault as fault:
            link.fail(PeerLost(link.peer, f"no path to {link.peer}: {fault}"))
        else:
            self._adopt(nursery, [carrier], position)

    async def _introduce(self, carrier: StreamCarrier) -> int:
        link = self._link
        self._generation += 1
        hello = Hello(link.terms.session, self._generation, 0, 1, link.inbox.received)
        done = False
        try:
            challenge = challenge_of(await carrier.receive_exactly(CHALLENGE_SIZE))
            position = await introduce(carrier, link.keys, hello, challenge)
            done = True
            return position
        finally:
            if not done:
                carrier.close()

    def _adopt(self, nursery: trio.Nursery, carriers: list[Carrier], position: int) -> None:
        try:
            path = self._link.adopt(self._generation, carriers, position)
        except ProtocolViolation as violation:
            for carrier in carriers:
                carrier.close()
            self._link.fail(violation)
            return
        nursery.start_soon(self._link.run_path, path)
