"""What one acceptor has promised, voted for, holds and knows to be decided: the facts that safety rests on.

It says which promises and votes are allowed and which sets of them suffice, resignations included. It sends nothing and
knows no time. `saved()` is what must be durable before anybody hears of a promise, a vote or a decision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from collectives.agreement.types import (
    NO_BALLOT,
    Ballot,
    Certificate,
    Config,
    Decided,
    Resignation,
    Saved,
    Seat,
    Value,
    Vote,
)

DEPARTED_MAX = 256


class Ledger:
    """`epoch` is that of the last decision known here, -1 if none is; acceptors vote on `epoch + 1`."""

    def __init__(self, me: str, config: Config | None, incarnation: int, saved: Saved | None) -> None:
        self.me = me
        self.incarnation = incarnation
        self.decided = Decided(config) if config is not None else None
        self.promised = NO_BALLOT
        self.vote: Vote | None = None
        self.left = False
        self.held: set[bytes] = set()  # digests whose bytes are here
        self.resigned: dict[str, Resignation] = {}  # of seats of this epoch
        self.departed: dict[
            str, Resignation
        ] = {}  # of others: they may be members, and so hold the next seats
        if saved is not None:
            self.decided = saved.decided
            if not saved.left:
                self.incarnation = saved.incarnation
                self.promised = saved.promised
                self.vote = saved.vote
        self.epoch = -1 if self.decided is None else self.decided.config.epoch

    @property
    def config(self) -> Config:
        """Only where something is decided."""
        if self.decided is None:
            raise RuntimeError("no configuration is known yet")
        return self.decided.config

    @property
    def seated(self) -> bool:
        """I am an acceptor of the next epoch."""
        return self.decided is not None and self.has_seat(self.me, self.incarnation)

    def has_seat(self, peer: str, incarnation: int) -> bool:
        seat = self.config.seat(peer)
        return seat is not None and seat.incarnation == incarnation

    def saved(self) -> Saved:
        return Saved(self.incarnation, self.decided, self.promised, self.vote, self.left)

    # What this acceptor does.

    def promise(self, ballot: Ballot) -> bool:
        """True if it is new, and so must be saved."""
        if ballot <= self.promised:
            return False
        self.promised = ballot
        return True

    def cast(self, ballot: Ballot, value: Value, tellers: tuple[str, ...]) -> None:
        """Only what is held, and nothing below a promise."""
        if ballot < self.promised or value.digest not in self.held:
            raise RuntimeError(f"a vote in {ballot} for {value.digest.hex()} is not allowed")
        self.promised = ballot
        self.vote = Vote(ballot, value, tellers)

    def useless(self, wanted: bytes) -> list[bytes]:
        """Forgets what is held and neither decided, voted for nor `wanted`."""
        keep = {wanted}
        if self.vote is not None:
            keep.add(self.vote.value.digest)
        if self.decided is not None and self.decided.value is not None:
            keep.add(self.decided.value.digest)
        gone = sorted(self.held - keep)
        self.held &= keep
        return gone

    def begin(self) -> None:
        """A reduction begins, and the bytes of what is decided are let go: should the next result be the same bytes,
        they must come anew."""
        if self.decided is not None and self.decided.value is not None:
            digest = self.decided.value.digest
            if self.vote is None or self.vote.value.digest != digest:
                self.held.discard(digest)

    def decide(self, decided: Decided) -> set[bytes]:
        """Moves on to the next epoch; gives the digests that nobody needs any more."""
        keep = decided.value.digest if decided.value is not None else b""
        gone = {digest for digest in self.held if digest != keep}
        self.held -= gone
        self.decided = decided
        self.epoch = decided.config.epoch
        self.promised = NO_BALLOT
        self.vote = None
        resigned = self.departed | self.resigned
        self.resigned = {
            peer: one for peer, one in resigned.items() if self.has_seat(peer, one.seat.incarnation)
        }
        self.departed = {}
        return gone

    # Resignations. One for an earlier epoch says that its acceptor never did anything in this one.

    def resign(self) -> Resignation:
        """My own: final. Nothing is promised, voted for or counted afterwards."""
        self.left = True
        return Resignation(Seat(self.me, self.incarnation), self.epoch + 1, self.promised, self.vote)

    def note(self, resignation: Resignation) -> bool:
        """True if it was not known and matters in this epoch."""
        peer = resignation.seat.peer
        if peer in self.resigned or resignation.epoch > self.epoch + 1 or peer == self.me:
            return False
        if self.has_seat(peer, resignation.seat.incarnation):
            self.resigned[peer] = resignation
            return True
        known = self.departed.get(peer)
        if known == resignation or (known is None and len(self.departed) >= DEPARTED_MAX):
            return False
        self.departed[peer] = resignation
        return True

    def notes(self) -> tuple[Resignation, ...]:
        """What others should know of."""
        return (*self.resigned.values(), *self.departed.values())

    def has_resigned(self, peer: str, incarnation: int) -> bool:
        one = self.resigned.get(peer) or self.departed.get(peer)
        return one is not None and one.seat.incarnation == incarnation

    def frozen(self, peer: str) -> tuple[Ballot, Vote | None]:
        one = self.resigned[peer]
        return (one.promised, one.vote) if one.epoch == self.epoch + 1 else (NO_BALLOT, None)

    def abstaining(self, ballot: Ballot) -> tuple[str, ...]:
        """Who does not count among the voters of `ballot`. One that promised a higher ballot still does: those who
        prepared that ballot may have relied on it."""
        return tuple([peer for peer in self.resigned if self.frozen(peer)[0] <= ballot])

    # Which sets suffice.

    def may_read(self, promised: Collection[str]) -> bool:
        """These promises, with the resignations known, show every vote that may have decided something."""
        return self.config.is_quorum(promised, self.resigned)

    def may_decide(self, voters: Mapping[str, int], ballot: Ballot, value: Value, members: Config) -> bool:
        """These votes in `ballot` decide `value`: a quorum of the acceptors, and more than half of those who form the
        next configuration (`members`), so that whoever decides the next epoch includes somebody who holds this one's
        bytes, and two hold them wherever there are two. `voters`: peer -> incarnation."""
        acceptors = [peer for peer, number in voters.items() if self.has_seat(peer, number)]
        if not self.config.is_quorum(acceptors, self.abstaining(ballot)):
            return False
        holders = [seat.peer for seat in members.seats if voters.get(seat.peer) == seat.incarnation]
        return self.is_majority(holders, members)

    def is_majority(self, peers: Iterable[str], members: Config) -> bool:
        """More than half of `members`; those who resigned do not count."""
        gone = [seat.peer for seat in members.seats if self.has_resigned(seat.peer, seat.incarnation)]
        return 2 * len(set(peers) - set(gone)) > len(members.seats) - len(gone)

    def certifies(self, decided: Decided) -> bool:
        """Whether the certificate of the next epoch holds, as far as can be told from here."""
        value, certificate = decided.value, decided.certificate
        if value is None or certificate is None:
            return False
        return self.config.is_quorum(certificate.voters, certificate.resigned)

    def certificate(self, ballot: Ballot, voters: Collection[str]) -> Certificate:
        return Certificate(ballot, tuple(sorted(voters)), self.abstaining(ballot))

    def validate(self) -> None:
        if self.vote is not None and self.vote.ballot > self.promised:
            raise RuntimeError("a vote above the promise")
        if self.vote is not None and self.vote.value.declaration.epoch != self.epoch + 1:
            raise RuntimeError("a vote of another epoch")
        if any(not self.has_seat(peer, one.seat.incarnation) for peer, one in self.resigned.items()):
            raise RuntimeError("the resignation of somebody without a seat")
