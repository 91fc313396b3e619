"""The acceptor and the member: promises, votes, fetches, and whom to follow.

Every rule that says no is here or in the ledger. It never proposes anything: `leading.py` does.
"""

from __future__ import annotations

from collectives.agreement.core import Core
from collectives.agreement.events import Reduce, Release
from collectives.agreement.messages import (
    HELD_MAX,
    Accept,
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
from collectives.agreement.types import NO_BALLOT, Ballot, Declaration
from collectives.errors import Diverged, Excluded


class Following(Core):
    """What a member does about the messages of a coordinator."""

    def _may_own(self, sender: str, ballot: Ballot) -> bool:
        seats = self.ledger.config.seats
        if ballot.owner != sender or self.ledger.config.seat(sender) is None:
            return False
        return ballot.number > 0 or sender == seats[0].peer

    def _yield_to(self, ballot: Ballot) -> None:
        """Whoever promised a ballot counts no votes for lower ones any more: a value that all who voted for it have
        lost is passed over on the strength of this."""
        self.see(ballot)
        self.drop_stale()
        if self.lead is not None and self.lead.ballot < self.ledger.promised:
            self.step_down()

    def drop_stale(self) -> None:
        if self.pending is not None and self.pending.ballot < self.ledger.promised:
            self.pending = None

    def promise_of(self, ballot: Ballot) -> Promise:
        vote = self.ledger.vote
        offer = self.round.offer if self.round is not None and self.entered else None
        return Promise(
            self.epoch + 1,
            ballot,
            self.ledger.incarnation,
            vote,
            tuple(sorted(self.ledger.held)[:HELD_MAX]),
            offer,
            self.ledger.notes(),
        )

    def on_prepare(self, sender: str, message: Prepare) -> None:
        if not self.current(sender, message.epoch) or not self._may_own(sender, message.ballot):
            return
        self._promise(sender, message.ballot)

    def _promise(self, sender: str, ballot: Ballot) -> bool:
        if ballot < self.ledger.promised:
            self.send(sender, Nack(self.epoch + 1, ballot, self.ledger.promised))
            return False
        if self.ledger.promise(ballot):
            self.persist()
        self._yield_to(ballot)
        self.send(sender, self.promise_of(ballot))
        return True

    def on_declare(self, sender: str, declaration: Declaration) -> None:
        ballot = declaration.ballot
        if not self.current(sender, declaration.epoch) or not self._may_own(sender, ballot):
            return
        if (declaration.run, declaration.tag) != (self.run, self.tag):
            return
        if ballot < self.ledger.promised:
            self.send(sender, Nack(self.epoch + 1, ballot, self.ledger.promised))
            return
        if self.last_declared is None or self.last_declared.ballot < ballot:
            self.last_declared = declaration
            self._adopt(sender, declaration)
        if ballot.number > 0:
            self._promise(sender, ballot)
        else:
            self.see(ballot)

    def _adopt(self, sender: str, declaration: Declaration) -> None:
        """Reduces it, unless I am not (any more) in it. What I voted for stays: whoever declares may not know of it."""
        member = declaration.member(self.me)
        attempt = self.round
        if member is None:
            self.stop_reducing()
            return
        if attempt is None or attempt.offer.nonce != member.nonce or not self.entered:
            self.send(sender, Gone(self.epoch + 1, member.nonce))
            return
        self.start_reducing(declaration)

    def start_reducing(self, declaration: Declaration) -> None:
        """A ballot that declares anew found nothing that is or will be decided, so earlier results of mine are of no
        use, but for the one I voted for."""
        for digest in self.ledger.useless(self.pending.value.digest if self.pending is not None else b""):
            self.out.append(Release(self.epoch + 1, digest))
        self.ledger.begin()
        self.declaration = declaration
        self.last_declared = declaration
        self.done = None
        self.stuck = False
        self.out.append(Reduce(declaration))

    def on_accept(self, sender: str, message: Accept) -> None:
        if not self.current(sender, message.epoch) or not self._may_own(sender, message.ballot):
            return
        declaration = message.value.declaration
        if (declaration.run, declaration.tag, declaration.epoch) != (self.run, self.tag, self.epoch + 1):
            return
        if message.ballot < self.ledger.promised:
            self.send(sender, Nack(self.epoch + 1, message.ballot, self.ledger.promised))
            return
        self.see(message.ballot)
        vote = self.ledger.vote
        if vote is not None and vote.ballot == message.ballot:
            if vote.value.digest == message.value.digest:
                self._say_voted(message)
            return
        self.pending = message
        if not self.vote_if_held():
            self._get_bytes(message)

    def _get_bytes(self, message: Accept) -> None:
        """The data plane's own result is waited for where it can still come; otherwise the bytes are fetched."""
        active = self.declaration
        value = message.value
        if active is not None and active.key == value.declaration.key:
            if self.done is not None:  # and it is another one: no vote
                trouble = Trouble(self.epoch + 1, message.ballot, (), "mismatch")
                self.send(message.ballot.owner, trouble)
                return
            if not self.stuck and active.ballot == message.ballot:
                return
        elif active is not None:
            self.stop_reducing()
        self.fetch(value, message.holders)

    def vote_if_held(self) -> bool:
        self.drop_stale()
        pending = self.pending
        if pending is None or pending.value.digest not in self.ledger.held:
            return False
        self.pending = None
        self.fetching = None
        self.ledger.cast(pending.ballot, pending.value, pending.tellers)
        self.persist()
        self._yield_to(pending.ballot)
        self._say_voted(pending)
        return True

    def _say_voted(self, message: Accept) -> None:
        """Also to myself, if I coordinate."""
        lead = self.lead
        if message.ballot.owner != self.me:
            digest = message.value.digest
            voted = Voted(self.epoch + 1, message.ballot, self.ledger.incarnation, digest)
            self.send(message.ballot.owner, voted)
        elif lead is not None and lead.ballot == message.ballot:
            lead.votes[self.me] = self.ledger.incarnation

    # The data plane.

    def on_reduced(self, ballot: Ballot, digest: bytes) -> None:
        active = self.declaration
        if active is None or active.ballot != ballot or self.done is not None:
            if digest not in self.ledger.held:
                self.on_held(self.epoch, digest)  # of what was decided meanwhile, or of no use
            return
        self.done = digest
        self.ledger.held.add(digest)
        if not self.vote_if_held() and self.pending is not None:
            self._get_bytes(self.pending)

    def on_stuck(self, ballot: Ballot, without: frozenset[str], why: str, now_s: float) -> None:
        active = self.declaration
        if active is None or active.ballot != ballot or self.done is not None:
            return
        self.stuck = True
        if self.pending is not None and self.pending.value.declaration.key == active.key:
            self.fetch(self.pending.value, self.pending.holders)
        elif self.lead is not None and self.lead.ballot == ballot:
            self.on_trouble(self.me, Trouble(self.epoch + 1, ballot, tuple(sorted(without)), why), now_s)
        else:
            self.send(self.top.owner, Trouble(self.epoch + 1, ballot, tuple(sorted(without)), why))

    def on_trouble(self, sender: str, message: Trouble, now_s: float) -> None:
        """Leading's matter."""
        raise RuntimeError("a follower was asked to lead")

    def on_held(self, epoch: int, digest: bytes) -> None:
        decided = self.ledger.decided
        if self.fetching is not None and self.fetching.digest == digest:
            self.fetching = None  # what is held is released by the ledger's rules alone
        if decided is not None and decided.value is not None and decided.value.digest == digest:
            self.ledger.held.add(digest)
            if self.awaiting is not None:
                self.deliver(self.awaiting)
        elif epoch == self.epoch + 1 and len(self.ledger.held) < HELD_MAX:
            self.ledger.held.add(digest)
            self.vote_if_held()
        else:
            self.out.append(Release(epoch, digest))

    # Whom to follow.

    def usable(self, peer: str) -> bool:
        if peer in self.passed or peer in self.ledger.resigned:
            return False
        if peer == self.me:
            return self.ledger.seated and self.entered
        return peer not in self.suspected

    def target(self) -> str | None:
        """Who coordinates, as far as can be told: the owner of the highest ballot, else the one it named, else the
        first in rank that may answer, those first who know the declaration."""
        if self.hint is not None and self.usable(self.hint):
            return self.hint
        if self.usable(self.top.owner):
            return self.top.owner
        peers = self.ledger.config.peers
        if self.last_declared is not None:
            members = self.last_declared.peers
            peers = tuple(
                [one for one in peers if one in members] + [one for one in peers if one not in members]
            )
        for peer in peers:
            if self.usable(peer):
                return peer
        self.passed.clear()
        self.declined = False
        return next((peer for peer in peers if self.usable(peer)), None)

    def follow(self, now_s: float) -> None:
        """In a round and not coordinating: keeps asking whoever should."""
        target = self.target()
        if target != self.following:
            self.following = target
            self.word_at = now_s
            self.poke_at = now_s
        if target == self.me or now_s < self.poke_at or self.round is None:
            return
        if target is None:  # everybody is suspected
            self.poke_at = now_s + self.settings.resend_s
            return
        if now_s - self.word_at > self.settings.takeover_s:
            self.passed.add(target)
            self.following = None
            self.follow(now_s)
            return
        self.poke_at = now_s + self.settings.resend_s
        if self.last_declared is None and now_s >= self.ask_at:  # perhaps all this was decided long ago
            self.ask(now_s)
            self.ask_at = now_s + self.settings.takeover_s
        seen = self.last_declared.ballot if self.last_declared is not None else NO_BALLOT
        ready = Ready(self.epoch + 1, self.ledger.incarnation, self.round.offer, seen, self.ledger.notes())
        self.send(target, ready)

    def on_heard(self, message: Heard) -> None:
        self.see(message.ballot)
        if message.ballot.owner == self.me and self.lead is None:  # others wait for me
            self.passed.discard(self.me)
            self.hint = None

    def on_decline(self, sender: str, message: Decline) -> None:
        self.passed.add(sender)
        if message.heir != sender and self.ledger.config.seat(message.heir) is not None:
            self.hint = message.heir

    def on_refused(self, sender: str, message: Refused) -> None:
        attempt = self.round
        if attempt is None or attempt.offer.nonce != message.nonce:
            return
        if self.ledger.config.seat(sender) is None:
            return
        epoch = message.epoch
        if message.why == "diverged":
            self.fail(Diverged(f"our state before epoch {epoch} is not the others'", epoch))
        else:
            why = "denied" if message.why == "full" else message.why
            self.fail(Excluded(f"no place in epoch {epoch}: {message.why}", epoch, why))
