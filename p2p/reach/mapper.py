"""Keeps a port of the home's router forwarded to this node, where the router does that for whoever asks.

It tries when members could not connect, renews, gives up for ever longer, and takes the forwarding back at the end.
What a forwarding is worth only members' knocks tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from p2p.reach.upnp import Forwarding, Gateway, UpnpFailed, find_gateway, forward, take_back

logger = logging.getLogger(__name__)

AGAIN_S = 600.0
AGAIN_MAX_S = 4 * 3600.0
PERMANENT_LOOK_S = 1200.0
TAKE_BACK_S = 0.5


class PortMapper:
    """One a node. `forwarding` is what holds now; `changed` is called when it is another."""

    def __init__(self, port: Callable[[], int], changed: Callable[[], None]) -> None:
        self.forwarding: Forwarding | None = None
        self.problem = ""
        self._port = port
        self._changed = changed
        self._gateway: Gateway | None = None
        self._due_s = 0.0
        self._failed = 0

    def forget(self) -> None:
        """The network is another one, and so is its router."""
        self.forwarding, self._gateway, self._due_s, self._failed = None, None, 0.0, 0

    async def run(self, wanted: Callable[[], bool], tick_s: float) -> None:
        """Until cancelled; then the forwarding is taken back."""
        try:
            while True:
                await trio.sleep(tick_s)
                if trio.current_time() >= self._due_s and (wanted() or self.forwarding is not None):
                    await self._keep()
        finally:
            if self.forwarding is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + TAKE_BACK_S):
                    try:
                        await take_back(self.forwarding)
                    except (UpnpFailed, OSError, trio.TooSlowError) as failure:
                        logger.info("the router was not told that its port is free: %s", failure)

    async def _keep(self) -> None:
        before = self.forwarding
        try:
            self._gateway = self._gateway or await find_gateway()
            self.forwarding = await forward(
                self._gateway, self._port(), before.outer[1] if before else self._port()
            )
        except (UpnpFailed, OSError, trio.TooSlowError) as failure:
            self.problem = str(failure) or "it does not answer in time"
            self.forwarding, self._gateway = None, None
            self._due_s = trio.current_time() + min(AGAIN_S * 2 ** min(self._failed, 10), AGAIN_MAX_S)
            self._failed += 1
            logger.info("the router forwards no port: %s", self.problem)
        else:
            self.problem, self._failed = "", 0
            self._due_s = trio.current_time() + (self.forwarding.lease_s / 2 or PERMANENT_LOOK_S)
        if (before and before.outer) != (self.forwarding and self.forwarding.outer):
            self._changed()
