"""One tag of a run at one node: drives the chain, keeps its journal, and gives rounds their results.

Events wait in a queue and are handled one at a time; an instruction is finished before the next one begins, so that
what must be durable is, before anything that rests on it is sent. Bytes are `data`'s matter, decisions the chain's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from collectives.agreement import (
    Abandon,
    Certificate,
    Coming,
    Committed,
    Config,
    Enter,
    Event,
    Failed,
    Fetch,
    Held,
    Instruction,
    Lagging,
    Leave,
    Left,
    Message,
    Offer,
    Persist,
    Received,
    Reduce,
    Release,
    Saved,
    Send,
    Settings,
    Tick,
    Value,
    Withdraw,
)
from collectives.agreement.chain import Chain
from collectives.data import Plane
from collectives.errors import CollectiveError, RoundExpired
from collectives.journal import Journal
from collectives.whole import Whole
from p2p import pack_value, unpack_value

log = logging.getLogger("shoal.collectives")

EXPECTED_MAX = 8  # times that one is waited for which is overtaken and never arrives
EXPECTED_PEERS_MAX = 1024
END_EARLY_S = (
    0.05  # the chain ends a round by itself, with the better reason, this long before the caller goes
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A committed epoch, with its bytes. `nonce` as in Committed."""

    epoch: int
    value: Value
    certificate: Certificate
    whole: Whole | None
    nonce: int | None


@dataclass(eq=False, slots=True)
class Attempt:
    """A round of the caller's that is under way."""

    offer: Offer
    ended: trio.Event
    outcome: Outcome | None = None
    error: CollectiveError | None = None


class TagShell:
    """Made by Run; `run` must be running for anything to happen."""

    def __init__(
        self,
        me: str,
        run: str,
        tag: str,
        *,
        config: Config | None,
        settings: Settings,
        incarnation: int,
        journal: Journal,
        plane: Plane,
        send: Callable[[str, str, Message], None],
        letters_max: int,
    ) -> None:
        self.tag = tag
        self.plane = plane
        self._me = me
        self._key = f"chain/{tag}"
        stored = journal.get(self._key)
        saved = None if stored is None else unpack_value(Saved, stored)
        self.chain = Chain(me, run, tag, config, settings, incarnation=incarnation, saved=saved)
        self.restored = saved is not None
        self.missed: deque[Outcome] = deque()
        self.lagging: Lagging | None = None
        self.attempt: Attempt | None = None
        self.left = trio.Event()
        self.changed = trio.Event()
        self.caller_epoch = 0
        self.transfer_s = 0.0  # what the last transfer of a state took, while no round was won since
        self._expected: dict[str, tuple[int, int]] = {}  # times, and in which epoch last
        self._journal = journal
        self._send = send
        self._events: deque[Event] = deque()
        self._letters = 0
        self._letters_max = letters_max
        self._wake = trio.Event()

    # ---- events

    def tell(self, event: Event) -> None:
        """Handled in turn. What comes from peers is dropped where too much of it waits."""
        if isinstance(event, Received):
            if self._letters >= self._letters_max:
                return
            self._letters += 1
        self._events.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises JournalError: a chain that cannot remember must not go on."""
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Received):
                    self._letters -= 1
                for one in self.chain.handle(event, trio.current_time()):
                    await self._perform(one)
                self._tell_changed()
            await self._idle()

    async def _idle(self) -> None:
        wake_s = self.chain.wake_s
        self._wake = trio.Event()
        deadline = trio.current_time() + 3600 if wake_s is None else wake_s
        with trio.move_on_at(deadline) as scope:
            await self._wake.wait()
        if scope.cancelled_caught:
            self.tell(Tick())

    def _tell_changed(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    # ---- instructions

    async def _perform(self, one: Instruction) -> None:
        match one:
            case Send(peer, message):
                self._send(self.tag, peer, message)
            case Persist(saved):
                await self._journal.put(self._key, pack_value(saved))
            case Reduce(declaration):
                self.plane.reduce(declaration)
            case Abandon(ballot):
                self.plane.abandon(ballot)
            case Fetch(value, holders):
                self.plane.fetch(value, holders)
            case Release(_, digest):
                self.plane.release(digest)
            case Committed():
                self._committed(one)
            case Lagging():
                log.info("tag %s: epoch %d is decided elsewhere", self.tag, one.epoch)
                self.lagging = one
            case Failed(nonce, error):
                self._end(nonce, None, error)
            case Left():
                self.left.set()

    def expect(self, peer: str, took_s: float) -> None:
        """It transfers a state again, because rounds went on during the last transfer, which took so long. Whoever
        never arrives is waited for a few times only."""
        times, epoch = self._expected.get(peer, (0, -1))
        if epoch == self.chain.epoch or times >= EXPECTED_MAX:
            return
        if peer in self._expected or len(self._expected) < EXPECTED_PEERS_MAX:
            self._expected[peer] = times + 1, self.chain.epoch
            self.tell(Coming(peer, took_s))

    def _committed(self, one: Committed) -> None:
        for peer in one.value.declaration.peers:
            self._expected.pop(peer, None)
        whole = self.plane.whole(one.value.digest)
        outcome = Outcome(one.epoch, one.value, one.certificate, whole, one.nonce)
        if one.nonce is None or not self._end(one.nonce, outcome, None):
            self.missed.append(outcome)

    def _end(self, nonce: int, outcome: Outcome | None, error: CollectiveError | None) -> bool:
        """False if the caller does not wait for it any more."""
        attempt = self.attempt
        if attempt is None or attempt.offer.nonce != nonce:
            return False
        attempt.outcome, attempt.error = outcome, error
        attempt.ended.set()
        self.attempt = None
        return True

    # ---- the caller

    async def attempt_round(self, offer: Offer, deadline_s: float) -> Outcome:
        """One round, from Enter to its end. Raises RoundFailed, at `deadline_s` at the latest: also where the chain
        waits for its disk just then."""
        attempt = self.attempt = Attempt(offer, trio.Event())
        self.tell(Enter(offer, deadline_s - END_EARLY_S))
        try:
            with trio.move_on_at(deadline_s):
                await attempt.ended.wait()
        except trio.Cancelled:
            if attempt.outcome is not None:
                self.missed.append(attempt.outcome)
            else:
                self._give_up(attempt)
            raise
        if attempt.error is not None:
            raise attempt.error
        if attempt.outcome is None:
            self._give_up(attempt)
            raise RoundExpired(f"epoch {offer.epoch + 1} is not decided yet", offer.epoch + 1)
        return attempt.outcome

    def _give_up(self, attempt: Attempt) -> None:
        """What is decided all the same counts as missed."""
        if self.attempt is attempt:
            self.attempt = None
            self.tell(Withdraw())

    def abort(self, nonce: int, error: CollectiveError) -> None:
        """The caller's own tensors cannot be used: its attempt ends with this error."""
        if self.attempt is not None and self.attempt.offer.nonce == nonce:
            self._end(nonce, None, error)
            self.tell(Withdraw())

    async def leave(self) -> None:
        """Resign, for good."""
        self.tell(Leave())
        await self.left.wait()

    def held(self, epoch: int, digest: bytes) -> None:
        self.tell(Held(epoch, digest))
