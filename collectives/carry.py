"""Letters between members that cannot connect to one another, as two behind NATs cannot: others carry them.

The origin signs each letter for its receiver, and whoever is connected to both passes it on, once; a carrier can lose
letters, as a network can, and do nothing else with them. They are numbered, so that an old sign of life is none.
Bytes of reductions never go this way: who cannot be dialled owns no part. It knows nothing of what letters say.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import trio

from collectives.wire import Letter
from p2p import Identity, PeerId, ProtocolViolation, pack_value, unpack_value, verify

KINDS = ("agree", "beat")
CARRIERS = 2
ORIGINS_MAX = 4096
LETTERS_PER_S_MAX = 500
_DOMAIN = "shoal carried letter 1"


@dataclass(frozen=True, slots=True)
class Carried:
    """A letter of `origin` to `to`. `number` rises with each, over restarts too."""

    run: str
    origin: str
    to: str
    number: int
    letter: Letter
    signature: bytes = b""

    def signed(self) -> bytes:
        return pack_value(replace(self, signature=b""))


class Carrier:
    """Of one run at one node. `post(peer, letter)` sends to a connected peer, `deliver(origin, letter)` takes what
    came for this node; `connected(peer)`, and `members()` who may carry or be carried for."""

    def __init__(
        self,
        run: str,
        me: str,
        identity: Identity,
        post: Callable[[str, Letter], None],
        deliver: Callable[[str, Letter], None],
        connected: Callable[[str], bool],
        members: Callable[[], Iterable[str]],
    ) -> None:
        self._run, self._me, self._identity = run, me, identity
        self._post, self._deliver = post, deliver
        self._connected, self._members = connected, members
        self._number = 0
        self._newest: dict[str, int] = {}
        self._spent: dict[str, tuple[float, int]] = {}

    def send(self, to: str, letter: Letter) -> None:
        """By two others, if there are any."""
        self._number = max(self._number + 1, time.time_ns() // 1_000_000)
        carried = Carried(self._run, self._me, to, self._number, letter)
        carried = replace(carried, signature=self._identity.sign(_DOMAIN, carried.signed()))
        able = [peer for peer in self._members() if peer not in (self._me, to) and self._connected(peer)]
        able.sort(key=lambda peer: hashlib.blake2b(f"{peer}\0{to}".encode()).digest())
        for peer in able[:CARRIERS]:
            self._post(peer, Letter("carry", "", pack_value(carried)))

    def on_letter(self, sender: str, letter: Letter) -> None:
        """A letter of the kind `carry`: to be passed on, or for this node."""
        try:
            carried = unpack_value(Carried, letter.body)
        except ProtocolViolation:
            return
        if carried.run != self._run or carried.letter.kind not in KINDS:
            return
        if carried.to == self._me:
            self._take(carried)
        elif (
            sender == carried.origin
            and carried.to in self._members()
            and self._connected(carried.to)
            and self._may_send(sender)
        ):
            self._post(carried.to, letter)

    def _take(self, carried: Carried) -> None:
        origin = carried.origin
        if origin not in self._newest and (origin not in self._members() or len(self._newest) >= ORIGINS_MAX):
            return
        if not verify(PeerId(origin), _DOMAIN, carried.signed(), carried.signature):
            return
        newest = self._newest.get(origin, -1)
        if carried.letter.kind == "beat" and carried.number <= newest:
            return
        self._newest[origin] = max(newest, carried.number)
        self._deliver(origin, carried.letter)

    def _may_send(self, origin: str) -> bool:
        """At most so many a second for each."""
        now_s = trio.current_time()
        since_s, count = self._spent.get(origin, (now_s, 0))
        if now_s - since_s >= 1:
            since_s, count = now_s, 0
        if count >= LETTERS_PER_S_MAX or (origin not in self._spent and len(self._spent) >= ORIGINS_MAX):
            return False
        self._spent[origin] = since_s, count + 1
        return True
