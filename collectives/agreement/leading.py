"""The coordinator: gathers, declares, declares anew without the dead, proposes, counts, commits.

Everything here is about progress. Safety rests on `Ledger` (what may be promised, voted for and decided) and on
`Lead.finding` (what must be proposed).
"""

from __future__ import annotations

from collections.abc import Iterable

from collectives.agreement.following import Following
from collectives.agreement.gather import Gather
from collectives.agreement.lead import Finding, Lead
from collectives.agreement.messages import (
    Accept,
    Declare,
    Decline,
    Gone,
    Heard,
    Nack,
    Prepare,
    Promise,
    Ready,
    Refused,
    Trouble,
    Voted,
)
from collectives.agreement.types import Ballot, Decided, Declaration, LeftOut, Seat, Value, seed_of
from collectives.errors import Diverged

RESENDS_ALONE_MAX = 10  # of a proposal whose own round is over


class Leading(Following):
    """What a coordinator does; it is one while `self.lead` is set."""

    # What others tell it.

    def on_ready(self, sender: str, message: Ready, now_s: float) -> None:
        if (
            not self.current(sender, message.epoch)
            or message.offer.epoch != self.epoch
            or self.gather is None
        ):
            return
        self.see(message.seen)
        self._hears(sender, message.incarnation)
        for one in message.resigned:
            self.ledger.note(one)
        known = sender in self.gather.offers
        if not self.gather.add(sender, message.incarnation, message.offer, now_s):
            self.send(sender, Refused(message.epoch, message.offer.nonce, "full"))
            return
        lead = self.lead
        if lead is None:
            if self.declined or not self.ledger.seated:
                self.send(sender, Decline(message.epoch, self.heir() or ""))
            else:
                self.send(sender, Heard(message.epoch, self.top))
        elif lead.value is not None:
            self._answer_voter(lead, lead.value, sender)
        elif lead.declaration is None:
            if known:
                self.send(sender, Heard(message.epoch, lead.ballot))
        else:
            self._answer_member(lead, lead.declaration, sender, message, now_s)

    def _answer_voter(self, lead: Lead, value: Value, sender: str) -> None:
        concerned = (
            value.declaration.member(sender) is not None or self.ledger.config.seat(sender) is not None
        )
        if concerned and sender not in lead.votes:
            self.send(sender, self._accept(lead, value))
        else:
            self.send(sender, Heard(self.epoch + 1, lead.ballot))

    def _answer_member(
        self, lead: Lead, declaration: Declaration, sender: str, message: Ready, now_s: float
    ) -> None:
        member = declaration.member(sender)
        if member is not None and member.nonce != message.offer.nonce:
            lead.gone[sender] = "silent"
            lead.redo_at = now_s
        elif member is not None and message.seen < declaration.ballot:
            self.send(sender, Declare(declaration))
        else:
            self.send(sender, Heard(message.epoch, lead.ballot))

    def _hears(self, peer: str, incarnation: int) -> None:
        if peer in self.incarnations or len(self.incarnations) < 4 * self.settings.members_max:
            self.incarnations[peer] = incarnation

    def on_promise(self, sender: str, message: Promise, now_s: float) -> None:
        if not self.current(sender, message.epoch) or self.gather is None:
            return
        for one in message.resigned:
            self.ledger.note(one)
        self._hears(sender, message.incarnation)
        lead = self.lead
        if lead is None or lead.ballot != message.ballot:
            return
        lead.promises[sender] = message
        offer = message.offer
        if offer is None:
            self.gather.drop(sender)
        elif offer.epoch == self.epoch:
            self.gather.add(sender, message.incarnation, offer, now_s)
            member = lead.declaration.member(sender) if lead.declaration is not None else None
            if member is not None and member.nonce != offer.nonce:
                lead.gone[sender] = "silent"
                lead.redo_at = now_s

    def on_nack(self, message: Nack) -> None:
        if self.ledger.decided is None or message.epoch != self.epoch + 1:
            return
        self.see(message.promised)
        lead = self.lead
        if lead is not None and lead.ballot == message.ballot and message.promised > lead.ballot:
            self.step_down()

    def on_trouble(self, sender: str, message: Trouble, now_s: float) -> None:
        lead = self.lead
        if message.epoch != self.epoch + 1 or lead is None or lead.ballot != message.ballot:
            return
        if lead.value is not None:
            if message.why != "mismatch":
                self._answer_voter(lead, lead.value, sender)
        elif lead.declaration is not None and message.without:
            lead.report(sender, message.without, message.why)
            self._redo_by(now_s + self.settings.report_s)

    def _redo_by(self, at_s: float) -> None:
        if self.lead is not None:
            self.lead.redo_at = at_s if self.lead.redo_at is None else min(self.lead.redo_at, at_s)

    def on_gone(self, sender: str, message: Gone, now_s: float) -> None:
        if self.gather is None or message.epoch != self.epoch + 1:
            return
        self.gather.drop(sender, message.nonce)
        lead = self.lead
        if lead is None or lead.declaration is None or lead.value is not None:
            return
        member = lead.declaration.member(sender)
        if member is not None and member.nonce == message.nonce:
            lead.gone[sender] = "silent"
            lead.redo_at = now_s

    def on_voted(self, sender: str, message: Voted) -> None:
        lead = self.lead
        if message.epoch != self.epoch + 1 or lead is None or lead.value is None:
            return
        self._hears(sender, message.incarnation)
        if lead.ballot == message.ballot and lead.value.digest == message.digest:
            lead.votes[sender] = message.incarnation

    def on_suspected(self, peer: str, now_s: float) -> None:
        self.suspected.add(peer)
        self.fetch_elsewhere(peer)
        lead = self.lead
        if lead is not None and lead.declaration is not None and lead.declaration.member(peer) is not None:
            self._redo_by(now_s)

    # What it does by itself.

    def take_the_lead(self, now_s: float) -> None:
        """In a round, and it is on me to coordinate."""
        self.following = self.me
        if self.top == Ballot(0, self.me) and self.zero_free and self.ledger.promised < self.top:
            self.zero_free = False
            self.lead = Lead(self.top, now_s, prepared_at=now_s)
        elif now_s >= self.retry_at:
            self._new_ballot(now_s, None)

    def _new_ballot(self, now_s: float, declaration: Declaration | None) -> Lead:
        """Above all that is known. My own promise is durable before anybody hears of it."""
        ballot = declaration.ballot if declaration is not None else self._next_ballot()
        self.ledger.promise(ballot)
        self.persist()
        self.see(ballot)
        self.drop_stale()
        lead = self.lead = Lead(ballot, now_s, declaration=declaration)
        lead.promises[self.me] = self.promise_of(ballot)
        lead.resend_at = now_s
        return lead

    def _next_ballot(self) -> Ballot:
        return Ballot(max(self.top.number, self.ledger.promised.number) + 1, self.me)

    def drive(self, now_s: float) -> None:
        """After every event, while `self.lead` is set."""
        lead = self.lead
        if lead is None:
            return
        if lead.ballot < self.ledger.promised:
            self.step_down()
        elif lead.value is not None:
            self._count(lead, lead.value, now_s)
        else:
            self._prepare(lead, now_s)

    def _prepare(self, lead: Lead, now_s: float) -> None:
        if lead.needs_promises and now_s >= lead.resend_at:
            self._ask_again(lead, now_s)
        finding = lead.finding(self.ledger, self._is_lost)
        self.unheld = finding.tellers if finding.unheld else ()
        lead.free = finding.free
        if finding.value is not None:
            self._propose(lead, finding, now_s)
            return
        if not finding.free:
            return
        if lead.prepared_at is None:
            lead.prepared_at = now_s
        declaration = lead.declaration
        if declaration is None:
            self._gather(lead, now_s)
        elif (
            self.done is not None and self.declaration is not None and self.declaration.key == declaration.key
        ):
            self._propose(lead, Finding(False, Value(declaration, self.done), (self.me,)), now_s)
        elif lead.redo_at is not None and now_s >= lead.redo_at:
            self._redo(lead, declaration, now_s)

    def _ask_again(self, lead: Lead, now_s: float) -> None:
        """Everybody without whom this cannot go on, and those who may hold what was voted for."""
        lead.resend_at = now_s + self.settings.resend_s
        lead.resends += 1
        members = lead.declaration.peers if lead.declaration is not None else ()
        if lead.declaration is not None:
            silent = [peer for peer in members if peer not in lead.promises]
            self.send_all(silent, Declare(lead.declaration))
            if lead.resends == 1:
                return
        known = self.last_declared.peers if self.last_declared is not None else ()
        voted = [
            peer for one in lead.promises.values() if one.vote for peer in one.vote.value.declaration.peers
        ]
        for peer in dict.fromkeys((*self.ledger.config.peers, *known, *voted)):
            if peer not in members and peer not in lead.promises and peer not in self.ledger.resigned:
                self.send(peer, Prepare(self.epoch + 1, lead.ballot))

    # Gathering.

    def _gather(self, lead: Lead, now_s: float) -> None:
        gather, attempt = self.gather, self.round
        if gather is None or attempt is None:
            return
        lead.wait_until = None
        if self._go_on_with(lead, gather, now_s):
            return
        gather.notice(now_s)
        agreeing = gather.agreeing(self.suspected - {self.me})
        due = self._due_s(gather, agreeing, attempt.deadline_s)
        if agreeing is None or due is None or due > now_s:
            return
        if due == 0.0:
            gather.everybody_came(now_s)
        self._refuse(gather, agreeing)
        if self.me not in agreeing:
            self.lead = None
            self.decline(agreeing)
            self.fail(Diverged(f"our state before epoch {self.epoch + 1} is not the others'", self.epoch + 1))
            return
        self._declare(lead, gather, agreeing, {}, now_s)

    def _due_s(self, gather: Gather, agreeing: list[str] | None, deadline_s: float) -> float | None:
        waited_for = [
            peer
            for peer in (*self.ledger.config.peers, *self.waiting)
            if peer == self.me or (peer not in self.suspected and peer not in self.ledger.resigned)
        ]
        return gather.due_s(agreeing, waited_for, deadline_s - self.settings.hurry_s)

    def _go_on_with(self, lead: Lead, gather: Gather, now_s: float) -> bool:
        """After a takeover: the membership that was being reduced, without those who are lost, so that what was
        exchanged keeps its worth. Whoever is slow to promise is given as long again as the quorum took."""
        known = self.last_declared
        if (
            not lead.needs_promises
            or known is None
            or known.member(self.me) is None
            or lead.prepared_at is None
        ):
            return False
        kept: list[str] = []
        missing = False
        for member in known.members:
            ready = gather.offers.get(member.peer)
            lost = member.peer in self.suspected and member.peer != self.me
            if ready is not None and ready.offer.nonce == member.nonce and not lost:
                missing = missing or (member.peer not in lead.promises)
                kept.append(member.peer)
            else:
                missing = missing or (not lost and member.peer not in lead.promises)
        until = 2 * lead.prepared_at - lead.began_at + self.settings.report_s
        if missing and now_s < until:
            lead.wait_until = until
            return True
        if missing:
            kept = [peer for peer in kept if peer in lead.promises]
        if self.me not in kept or not self._suffices(kept, gather, lead.ballot):
            return False
        why = {peer: "silent" for peer in known.peers if peer not in kept}
        self._declare(lead, gather, kept, why, now_s)
        return True

    def _suffices(self, peers: Iterable[str], gather: Gather, ballot: Ballot) -> bool:
        seated = [
            peer
            for peer in peers
            if peer in gather.offers and self.ledger.has_seat(peer, gather.offers[peer].incarnation)
        ]
        return self.ledger.config.is_quorum(seated, self.ledger.abstaining(ballot))

    def _refuse(self, gather: Gather, agreeing: list[str]) -> None:
        """Those whose layout, codec or state is not the quorum's."""
        model = gather.offers[agreeing[0]].offer
        for peer, (_, offer) in list(gather.offers.items()):
            if peer in agreeing or peer in self.suspected or peer == self.me:
                continue
            same = (offer.layout, offer.codec) == (model.layout, model.codec)
            why = "diverged" if same else "mismatch"
            self.send(peer, Refused(self.epoch + 1, offer.nonce, why))
            gather.drop(peer)

    def _declare(
        self, lead: Lead, gather: Gather, peers: list[str], left: dict[str, str], now_s: float
    ) -> None:
        declaration = self._declaration(lead.ballot, gather, peers, left)
        gather.close()
        lead.declaration = declaration
        lead.resend_at = now_s + self.settings.resend_s
        self.send_all(declaration.peers, Declare(declaration))
        self.start_reducing(declaration)

    def _declaration(
        self, ballot: Ballot, gather: Gather, peers: list[str], left: dict[str, str]
    ) -> Declaration:
        epoch = self.epoch + 1
        members = tuple([gather.member(peer) for peer in peers])
        absent = {peer: "late" for peer in (*gather.config.peers, *gather.offers) if peer not in peers} | left
        offer = gather.offers[peers[0]].offer
        value = self.ledger.decided.value if self.ledger.decided is not None else None
        seed = seed_of(self.run, self.tag, epoch, ballot, members, value.digest if value else b"")
        why = tuple([LeftOut(peer, reason) for peer, reason in sorted(absent.items())])
        return Declaration(self.run, self.tag, epoch, ballot, members, offer.codec, offer.layout, seed, why)

    # Somebody cannot finish.

    def _redo(self, lead: Lead, declaration: Declaration, now_s: float) -> None:
        gather = self.gather
        blamed = lead.blamed(self.me, self.suspected)
        if gather is None or not blamed:
            lead.redo_at = None
            return
        for peer, why in blamed.items():
            member = declaration.member(peer)
            if why != "silent" and member is not None and gather.drop(peer, member.nonce):
                self.send(peer, Refused(self.epoch + 1, member.nonce, why))
        kept = [
            member.peer
            for member in declaration.members
            if member.peer not in blamed
            and (ready := gather.offers.get(member.peer)) is not None
            and ready.offer.nonce == member.nonce
        ]
        ballot = self._next_ballot()
        if not self._suffices(kept, gather, ballot):
            again = gather.agreeing({*self.suspected, *blamed} - set(lead.gone))
            if again is None or self.me not in again or set(again) == set(declaration.peers):
                lead.redo_at = now_s + self.settings.resend_s  # somebody may come back
                return
            kept = again
        left = {one.peer: one.why for one in declaration.left_out} | blamed
        following = self._declaration(ballot, gather, kept, {p: w for p, w in left.items() if p not in kept})
        redone = self._new_ballot(now_s, following)
        self._ask_again(redone, now_s)
        self.start_reducing(following)

    # Voting.

    def _holders(self, lead: Lead) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*lead.holders, *sorted(lead.votes))))

    def _lead_times(self, lead: Lead) -> list[float]:
        """When the coordinator wants to be woken."""
        times: list[float] = []
        if lead.value is not None or lead.needs_promises:
            times.append(lead.resend_at)
        if lead.value is not None or not lead.free:
            return times
        if lead.redo_at is not None:
            times.append(lead.redo_at)
        if lead.declaration is None:
            times += [lead.wait_until] if lead.wait_until is not None else self._gather_times()
        return times

    def _gather_times(self) -> list[float]:
        gather, attempt = self.gather, self.round
        if gather is None or attempt is None:
            return []
        agreeing = gather.agreeing(self.suspected - {self.me})
        due = self._due_s(gather, agreeing, attempt.deadline_s)
        return [] if due is None else [due]

    def _accept(self, lead: Lead, value: Value) -> Accept:
        return Accept(self.epoch + 1, lead.ballot, value, self._holders(lead), lead.tellers)

    def _propose(self, lead: Lead, finding: Finding, now_s: float) -> None:
        """What was found in others' votes goes to all acceptors, what was just reduced to those who reduced it."""
        value = finding.value
        if value is None:
            return
        found = lead.declaration is None or lead.declaration.key != value.declaration.key
        lead.propose(value, finding.holders, finding.tellers)
        lead.resend_at = now_s + self.settings.resend_s
        lead.resends = 0
        seats = self.ledger.config.peers if found else ()
        accept = self._accept(lead, value)
        self.send_all((*value.declaration.peers, *seats), accept)
        self.on_accept(self.me, accept)
        self._count(lead, value, now_s)

    def _count(self, lead: Lead, value: Value, now_s: float) -> None:
        if self.lead is not lead:
            return
        if lead.decides(self.ledger):
            self._commit(lead, value, now_s)
        elif now_s >= lead.resend_at:
            lead.resend_at = now_s + self.settings.resend_s
            lead.resends += 1
            if not self.entered and lead.resends > RESENDS_ALONE_MAX:
                self.lead = None
                return
            if self._may_pass_over(lead):
                self._prepare(self._new_ballot(now_s, None), now_s)
                return
            accept = self._accept(lead, value)
            peers = (*value.declaration.peers, *self.ledger.config.peers)
            self.send_all([peer for peer in peers if peer not in lead.votes], accept)

    def _may_pass_over(self, lead: Lead) -> bool:
        """Too few are left to decide this value, and whoever may have decided it can be asked: a new ballot may find
        that it is not, and go on without the lost ones."""
        return (
            self.entered
            and lead.members is not None
            and lead.is_stranded(lead.members, self.ledger, self._is_lost)
            and not lead.is_any_lost(lead.tellers, self.ledger, self._is_lost)
        )

    def barred_without(self) -> tuple[str, ...]:
        """A value that is found can neither be decided, for too few of its members are left, nor passed over, for one
        who may have decided it is gone too; or nobody has its bytes, and who could tell is gone."""
        lead, config = self.lead, self.ledger.config
        if lead is None:
            return ()
        if lead.value is None or lead.members is None:
            told = [seat for peer in self.unheld if (seat := config.seat(peer)) is not None]
            return tuple([seat.peer for seat in told if self._is_lost(seat)])
        if not lead.is_stranded(lead.members, self.ledger, self._is_lost):
            return ()
        if not lead.is_any_lost(lead.tellers, self.ledger, self._is_lost):
            return ()
        return tuple([seat.peer for seat in lead.members.seats if self._is_lost(seat)])

    def _is_lost(self, seat: Seat) -> bool:
        if seat.peer == self.me:
            return seat.incarnation != self.ledger.incarnation
        known = self.incarnations.get(seat.peer, seat.incarnation)
        return seat.peer in self.suspected or seat.incarnation != known

    def _commit(self, lead: Lead, value: Value, now_s: float) -> None:
        config = lead.members or value.declaration.config()
        decided = Decided(config, value, self.ledger.certificate(lead.ballot, lead.votes))
        offers = self.gather.offers if self.gather is not None else {}
        former = [peer for peer in self.former if peer not in self.suspected]
        told = (*value.declaration.peers, *self.ledger.config.peers, *offers, *former)
        late = [peer for peer in offers if value.declaration.member(peer) is None]
        self.settle(decided, now_s, late, told)
