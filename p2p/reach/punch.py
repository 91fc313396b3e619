"""Punching a hole: both ends dial each other at once, from the ports that they listen on.

Each end's first packet opens its own router for the other's answers. The two dials become one connection, or the
listener accepts what the other end dialled; either way both know beforehand who begins the handshake. It knows sockets;
when and where to punch is decided by the cores.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID

from p2p.compat.swarm import MendedSwarm, root_reason
from p2p.compat.tcp import Endpoint, MendedTcpStream, TcpListener, connect_from

logger = logging.getLogger(__name__)

TRY_S = 1.6
"""Long enough for the second packet that the system sends, a second after the first."""
AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Hole:
    """What to punch: from a port of ours to those of a peer. `begins`: this end begins the handshake."""

    peer: str
    source: Endpoint
    targets: Sequence[Endpoint]
    begins: bool


async def punch(swarm: MendedSwarm, hole: Hole, within_s: float) -> bool:
    """Whether a direct connection was made."""
    listeners = [one for one in swarm.listeners.values() if isinstance(one, TcpListener)]
    made = False

    async def take(stream: trio.SocketStream) -> None:
        nonlocal made
        wrapped = MendedTcpStream(stream, "punched")
        try:
            await swarm.take_over(wrapped, ID.from_base58(hole.peer), initiator=hole.begins)
        except Exception as error:  # noqa: BLE001 - whatever answered there may make the upgrade raise anything
            logger.debug("what answered through the hole to %s: %s", hole.peer, root_reason(error))
            await wrapped.close()
            return
        made = True
        nursery.cancel_scope.cancel()

    async def knock(target: Endpoint) -> None:
        while True:
            with contextlib.suppress(OSError), trio.move_on_after(TRY_S):
                stream = await connect_from(hole.source, target)
                await take(stream)
            await trio.sleep(AGAIN_S)

    with trio.move_on_after(within_s):
        try:
            async with trio.open_nursery() as nursery:
                for target in hole.targets:
                    for listener in listeners:
                        listener.expected[target] = lambda stream: nursery.start_soon(take, stream)
                    nursery.start_soon(knock, target)
        finally:
            for listener in listeners:
                for target in hole.targets:
                    listener.expected.pop(target, None)
    return made


__all__ = ["Hole", "punch"]
