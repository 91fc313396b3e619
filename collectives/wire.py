"""Small letters between members of a run: messages of agreement and heartbeats, over one channel a direction and peer.

A letter may be lost (agreement repeats what matters), never altered. A peer that does not take part, or is not
connected, costs a short pause now and then. What the letters say is not known here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from p2p import Call, Channel, Method, P2pError, PeerId, Rpc, RpcRefusal

log = logging.getLogger("shoal.collectives")

LETTERS_QUEUED_MAX = 512
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 1.0
BODY_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Talk:
    """What a channel is opened with."""

    run: str


@dataclass(frozen=True, slots=True)
class Letter:
    """`kind` "agree" goes to the chain of `tag`, "beat" to the failure detector, "carry" to whom it is for."""

    kind: str
    tag: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing comes back."""


TALK = Method(
    "collectives/talk", Talk, Silence, upstream=Letter, body_bytes_max=BODY_BYTES_MAX, deadline_s=24 * 3600.0
)

Deliver = Callable[[str, Letter], None]


class Mailroom:
    """Takes the letters of all runs of a node to whoever is open here."""

    def __init__(self, rpc: Rpc) -> None:
        self._open: dict[str, Deliver] = {}
        rpc.serve_channel(TALK, self._receive)

    def open(self, run: str, deliver: Deliver) -> None:
        self._open[run] = deliver

    def close(self, run: str) -> None:
        self._open.pop(run, None)

    async def _receive(self, call: Call, talk: Talk, channel: Channel[Letter, Silence]) -> None:
        if talk.run not in self._open:
            raise RpcRefusal("absent", "this node takes no part in the run")
        async for letter in channel:
            deliver = self._open.get(talk.run)
            if deliver is None:
                raise RpcRefusal("absent", "this node has left the run")
            deliver(call.peer, letter)


class Post:
    """Letters to one peer of one run, in order while the channel lasts."""

    def __init__(self, rpc: Rpc, run: str, peer: str) -> None:
        self._rpc, self._run, self._peer = rpc, run, peer
        self._letters: deque[Letter] = deque(maxlen=LETTERS_QUEUED_MAX)
        self._wake = trio.Event()

    def send(self, letter: Letter) -> None:
        """Now or never; the oldest is dropped where too many wait."""
        self._letters.append(letter)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = PAUSE_MIN_S
        while True:
            await self._some()
            try:
                async with self._rpc.open(PeerId(self._peer), TALK, Talk(self._run)) as channel:
                    while True:
                        await self._some()
                        while self._letters:
                            await channel.send(self._letters.popleft())
                            pause_s = PAUSE_MIN_S
            except P2pError as problem:
                log.debug("letters to %s are lost: %s", self._peer, problem)
            self._letters.clear()
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    async def _some(self) -> None:
        while not self._letters:
            self._wake = trio.Event()
            await self._wake.wait()
