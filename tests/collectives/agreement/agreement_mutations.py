"""Rules of the protocol, each broken on purpose, through `patch(owner, name, new)`."""

from collectives.agreement import types as ty
from collectives.agreement.chain import Chain
from collectives.agreement.core import Core
from collectives.agreement.following import Following
from collectives.agreement.gather import Gather
from collectives.agreement.lead import FREE, Lead
from collectives.agreement.leading import Leading
from collectives.agreement.ledger import Ledger
from collectives.agreement.messages import Commit
from collectives.agreement.types import NO_BALLOT


def half_is_a_quorum(patch):
    def is_quorum(self, peers, without=()):
        seats = [seat.peer for seat in self.seats if seat.peer not in without]
        return bool(seats) and 2 * sum(peer in peers for peer in seats) >= len(seats)

    patch(ty.Config, "is_quorum", is_quorum)


def one_vote_decides(patch):
    patch(Ledger, "may_decide", lambda self, voters, ballot, value, members: bool(voters))
    patch(Ledger, "certifies", lambda self, decided: True)


def votes_for_bytes_not_held(patch):
    def get_bytes(self, message):
        self.ledger.held.add(message.value.digest)
        self.vote_if_held()

    patch(Following, "_get_bytes", get_bytes)


def nothing_is_saved(patch):
    patch(Core, "persist", lambda self: setattr(self, "journaled", True))


def promises_are_not_saved(patch):
    old = Ledger.promise

    def promise(self, ballot):
        old(self, ballot)
        return False

    patch(Ledger, "promise", promise)


def votes_found_are_ignored(patch):
    old = Lead.finding

    def finding(self, ledger, lost):
        found = old(self, ledger, lost)
        return FREE if found.value is not None or found.unheld else found

    patch(Lead, "finding", finding)


def the_lowest_vote_is_taken(patch):
    patch(Lead.finding, "max", min)


def lost_bytes_are_passed_over_too_soon(patch):
    old = Lead.finding

    def finding(self, ledger, lost):
        found = old(self, ledger, lost)
        return FREE if found.unheld else found

    patch(Lead, "finding", finding)


def only_the_last_teller_is_remembered(patch):
    def propose(self, value, holders, tellers, old=Lead.propose):
        old(self, value, holders, ())

    patch(Lead, "propose", propose)


def votes_below_a_promise(patch):
    def cast(self, ballot, value, tellers):
        self.vote = ty.Vote(ballot, value, tellers)
        self.promised = max(self.promised, ballot)

    def on_accept(self, sender, message, old=Following.on_accept):
        promised = self.ledger.promised
        self.ledger.promised = min(promised, message.ballot)
        old(self, sender, message)
        self.ledger.promised = max(promised, self.ledger.promised)

    patch(Ledger, "cast", cast)
    patch(Following, "on_accept", on_accept)
    patch(Ledger, "validate", lambda self: None)


def what_leavers_voted_is_forgotten(patch):
    patch(Ledger, "frozen", lambda self, peer: (NO_BALLOT, None))


def leavers_never_count(patch):
    patch(Ledger, "abstaining", lambda self, ballot: tuple(self.resigned))


def restarts_begin_with_ballot_zero(patch):
    def init(self, *given, old=Core.__init__):
        old(self, *given)
        self.zero_free = True

    patch(Core, "__init__", init)


def any_attempt_will_do(patch):
    def adopt(self, sender, declaration):
        if declaration.member(self.me) is not None and self.entered:
            self.start_reducing(declaration)

    def on_ready(self, lead, declaration, sender, message, now_s):
        pass

    patch(Following, "_adopt", adopt)
    patch(Leading, "_answer_member", on_ready)


def lost_journals_keep_their_seats(patch):
    patch(Ledger, "has_seat", lambda self, peer, incarnation: self.config.seat(peer) is not None)


def old_ballots_are_still_counted(patch):
    def yield_to(self, ballot):
        self.see(ballot)
        self.drop_stale()

    def drive(self, now_s, old=Leading.drive):
        lead = self.lead
        if lead is not None and lead.value is not None:
            self._count(lead, lead.value, now_s)
        else:
            old(self, now_s)

    patch(Following, "_yield_to", yield_to)
    patch(Leading, "drive", drive)
    patch(Leading, "on_nack", lambda self, message: None)
    patch(Chain, "validate", lambda self: None)


def rounds_do_not_expire(patch):
    patch(Core, "expire", lambda self: None)


def states_are_not_compared(patch):
    def agreeing(self, without):
        peers = [peer for peer in self.offers if peer not in without]
        seated = [peer for peer in peers if self._seated(peer)]
        return sorted(peers) if self.config.is_quorum(seated, self.resigned) else None

    patch(Gather, "agreeing", agreeing)


def nobody_takes_over(patch):
    def take(self, now_s, old=Leading.take_the_lead):
        if self.top == ty.Ballot(0, self.me) and self.zero_free:
            old(self, now_s)

    patch(Leading, "take_the_lead", take)


def nothing_is_asked_again(patch):
    patch(Leading, "_ask_again", lambda self, lead, now_s: setattr(lead, "resend_at", now_s + 1.0))


def decisions_come_twice(patch):
    def deliver(self, decided, old=Core.deliver):
        old(self, decided)
        old(self, decided)

    patch(Core, "deliver", deliver)


def what_was_missed_is_missed_for_ever(patch):
    patch(Core, "_stands_on", lambda self, epoch: False)


def only_the_last_decision_is_told(patch):
    def tell(self, peer, decided, known):
        self.send(peer, Commit(decided, tuple(sorted(self.waiting)), self.former))

    patch(Core, "tell_decided", tell)


def voters_alone_are_asked_for_bytes(patch):
    def fetch(self, decided):
        self.awaiting = decided
        self.fetch(decided.value, decided.certificate.voters)

    patch(Core, "fetch_decided", fetch)


def the_dead_are_asked_first(patch):
    patch(Core, "fetch_elsewhere", lambda self, peer: None)


def whoever_cannot_go_on_waits_for_its_deadline(patch):
    patch(Leading, "barred_without", lambda self: ())


MUTATIONS = [
    half_is_a_quorum,
    one_vote_decides,
    votes_for_bytes_not_held,
    nothing_is_saved,
    promises_are_not_saved,
    votes_found_are_ignored,
    the_lowest_vote_is_taken,
    lost_bytes_are_passed_over_too_soon,
    only_the_last_teller_is_remembered,
    votes_below_a_promise,
    what_leavers_voted_is_forgotten,
    leavers_never_count,
    restarts_begin_with_ballot_zero,
    any_attempt_will_do,
    lost_journals_keep_their_seats,
    old_ballots_are_still_counted,
    rounds_do_not_expire,
    states_are_not_compared,
    nobody_takes_over,
    nothing_is_asked_again,
    decisions_come_twice,
    what_was_missed_is_missed_for_ever,
    only_the_last_decision_is_told,
    voters_alone_are_asked_for_bytes,
    the_dead_are_asked_first,
    whoever_cannot_go_on_waits_for_its_deadline,
]
