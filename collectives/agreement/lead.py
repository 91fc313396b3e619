"""What a coordinator knows in one ballot: promises, who is in the way, votes. Bookkeeping only: the chain acts on it.

A ballot has one owner and, once `value` is set, one value for ever. `finding` is where Paxos lives: what the promises
oblige this ballot to propose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from collectives.agreement.ledger import Ledger
from collectives.agreement.messages import Promise
from collectives.agreement.types import Ballot, Config, Declaration, Seat, Value

NOBODY: tuple[str, ...] = ()
Lost = Callable[[Seat], bool]  # dead, as far as can be told, or not the one any more that had this seat


class Finding(NamedTuple):
    """`free`: anything may be proposed. Otherwise `value` (held by `holders`) must be, or, where it is None, it is not
    known yet what: promises are missing, or the bytes of what was voted for (`unheld`: `tellers` have not answered)."""

    free: bool
    value: Value | None = None
    holders: tuple[str, ...] = NOBODY
    tellers: tuple[str, ...] = NOBODY
    unheld: bool = False


WAIT = Finding(free=False)
FREE = Finding(free=True)


@dataclass(slots=True)
class Lead:
    """One ballot of mine."""

    ballot: Ballot
    began_at: float
    promises: dict[str, Promise] = field(default_factory=dict)
    prepared_at: float | None = None  # when the promises sufficed
    free: bool = False  # they oblige to nothing
    declaration: Declaration | None = None
    value: Value | None = None
    holders: tuple[str, ...] = NOBODY
    tellers: tuple[str, ...] = NOBODY  # of `value`
    members: Config | None = None  # the configuration that `value` forms
    votes: dict[str, int] = field(default_factory=dict)  # peer -> incarnation
    reports: dict[str, tuple[tuple[str, ...], str]] = field(
        default_factory=dict
    )  # reporter -> (without, why)
    gone: dict[str, str] = field(default_factory=dict)  # members that will not finish -> why
    redo_at: float | None = None  # when to declare anew without those in the way
    wait_until: float | None = None  # for the promises of those whose contributions are half exchanged
    resend_at: float = 0.0
    resends: int = 0

    @property
    def needs_promises(self) -> bool:
        return self.ballot.number > 0

    def finding(self, ledger: Ledger, lost: Lost) -> Finding:
        """The highest vote binds: its value may be decided. It does not where all its tellers answered (a promise or a
        resignation): then none of them knows it decided, and none will ever count its votes. That is made use of where
        nobody has its bytes any more, and where too few of its members are left to decide it."""
        if not self.needs_promises:
            return FREE
        answered = {peer for peer, one in self.promises.items() if ledger.has_seat(peer, one.incarnation)}
        if not ledger.may_read(answered):
            return WAIT
        votes = [vote for peer in answered if (vote := self.promises[peer].vote) is not None]
        votes += [vote for peer in ledger.resigned if (vote := ledger.frozen(peer)[1]) is not None]
        if not votes:
            return FREE
        vote = max(votes, key=lambda one: one.ballot)
        holders = self._holders(vote.value, ledger)
        asked = [peer for peer in vote.tellers if peer not in answered and peer not in ledger.resigned]
        if holders and not self.is_stranded(vote.value.declaration.config(), ledger, lost):
            return Finding(False, vote.value, holders, vote.tellers)
        if not asked:
            return FREE
        if holders and self.is_any_lost(asked, ledger, lost):
            return Finding(False, vote.value, holders, vote.tellers)
        return WAIT if holders else Finding(False, tellers=tuple(asked), unheld=True)

    def is_any_lost(self, peers: Iterable[str], ledger: Ledger, lost: Lost) -> bool:
        """Somebody among these will not answer as the acceptor that it was."""
        return any((seat := ledger.config.seat(peer)) is None or lost(seat) for peer in peers)

    def is_stranded(self, members: Config, ledger: Ledger, lost: Lost) -> bool:
        """Too few of those who would form the next configuration are left to vote for it."""
        return not ledger.is_majority([seat.peer for seat in members.seats if not lost(seat)], members)

    def _holders(self, value: Value, ledger: Ledger) -> tuple[str, ...]:
        found = [peer for peer, one in self.promises.items() if value.digest in one.held]
        if value.digest in ledger.held and ledger.me not in found:
            found.append(ledger.me)
        return tuple(sorted(found))

    def propose(self, value: Value, holders: tuple[str, ...], tellers: tuple[str, ...]) -> None:
        if self.value is not None:
            raise RuntimeError(f"{self.ballot} has a value already")
        self.value = value
        self.holders = holders
        self.tellers = tuple(dict.fromkeys((*tellers, self.ballot.owner)))
        self.members = value.declaration.config()
        self.redo_at = None

    def decides(self, ledger: Ledger) -> bool:
        if self.value is None or self.members is None:
            return False
        return ledger.may_decide(self.votes, self.ballot, self.value, self.members)

    # Who is in the way.

    def report(self, reporter: str, without: Collection[str], why: str) -> None:
        self.reports[reporter] = (tuple(without), why)

    def blamed(self, me: str, suspected: Collection[str]) -> dict[str, str]:
        """Members to leave out -> why. Silence is mutual: each report of it is an edge, and as few members as possible
        (greedily: the one with most edges, never the coordinator, the last-ranked of equals) cover them all."""
        if self.declaration is None:
            return {}
        members = self.declaration.peers
        blamed = {peer: why for peer, why in self.gone.items() if peer in members}
        blamed |= {peer: "silent" for peer in members if peer in suspected and peer != me}
        edges: set[frozenset[str]] = set()
        for reporter, (without, why) in self.reports.items():
            for peer in without:
                if peer == me and reporter != me:
                    blamed.setdefault(reporter, why)
                elif why != "silent" and peer in members:
                    blamed.setdefault(peer, why)
                elif peer in members and reporter in members and peer != reporter:
                    edges.add(frozenset((peer, reporter)))
        place = {peer: number for number, peer in enumerate(members)}
        edges = {edge for edge in edges if not any(peer in blamed for peer in edge)}
        while edges:
            degrees: dict[str, int] = {}
            for edge in edges:
                for peer in edge:
                    if peer != me:
                        degrees[peer] = degrees.get(peer, 0) + 1
            worst = max(degrees, key=lambda peer: (degrees[peer], place[peer]))
            blamed[worst] = "silent"
            edges = {edge for edge in edges if worst not in edge}
        blamed.pop(me, None)
        return blamed
