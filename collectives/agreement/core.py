"""The state that the two halves of a chain share, how an epoch ends and how a round ends.

`following.py` and `leading.py` build on it, `chain.py` is the whole. No clock and no I/O: `self.out` collects what is
to be done, in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from collectives.agreement.events import (
    Abandon,
    Committed,
    Enter,
    Failed,
    Fetch,
    Instruction,
    Lagging,
    Persist,
    Release,
    Send,
)
from collectives.agreement.gather import Gather, Grace
from collectives.agreement.lead import Lead
from collectives.agreement.ledger import Ledger
from collectives.agreement.messages import (
    EARLIER_MAX,
    FORMER_MAX,
    Accept,
    Ask,
    Commit,
    Decline,
    Gone,
    Message,
)
from collectives.agreement.types import (
    NO_BALLOT,
    Ballot,
    Config,
    Decided,
    Declaration,
    Offer,
    Saved,
    Settings,
    Value,
)
from collectives.errors import Behind, Excluded, NoQuorum, RoundExpired, RoundFailed

NAMED_MAX = 3  # of those who are missed, in a message for people


@dataclass(frozen=True, slots=True)
class Round:
    """What the caller waits for."""

    offer: Offer
    deadline_s: float


class Core:
    """One (run, tag) at one peer."""

    def __init__(
        self,
        me: str,
        run: str,
        tag: str,
        config: Config | None,
        settings: Settings,
        incarnation: int,
        saved: Saved | None,
    ) -> None:
        self.me = me
        self.run = run
        self.tag = tag
        self.settings = settings
        self.ledger = Ledger(me, config, incarnation, saved)
        self.out: list[Instruction] = []
        self.round: Round | None = None
        self.awaiting: Decided | None = None  # the last decision, while its bytes are not here
        self.earlier: tuple[Decided, ...] = ()  # those before it that were heard of here, one after another
        self.suspected: set[str] = set()
        self.contacts: tuple[str, ...] = ()
        self.former: tuple[str, ...] = ()  # belonged to the run, or wanted to, and are no members now
        self.waiting: frozenset[str] = (
            frozenset()
        )  # were left out of the last epoch, and may come for this one
        self.coming: tuple[str, ...] = ()  # transfer the state, and may come for the next one
        self.grace = Grace(settings)
        self.journaled = saved is not None
        self.zero_free = saved is None  # whoever restarts may have used ballot 0 already
        self.lonely_at: float | None = None
        self.ask_at = 0.0
        self.now_s = 0.0
        self.meet((*self.ledger.config.peers,) if self.ledger.decided is not None else ())
        self.meet(config.peers if config is not None else ())
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.lead: Lead | None = None
        self.declaration: Declaration | None = None  # what the data plane is at
        self.last_declared: Declaration | None = None
        self.done: bytes | None = None  # the digest of its result
        self.stuck = False
        self.pending: Accept | None = None  # to be voted for once its bytes are here
        self.fetching: Value | None = None
        self.holders: tuple[str, ...] = ()  # of what is being fetched
        self.passed: set[str] = set()  # would-be coordinators that do not answer, or declined
        self.hint: str | None = None  # who should coordinate, says one that declined
        self.following: str | None = None
        self.word_at = 0.0
        self.poke_at = 0.0
        self.retry_at = 0.0
        self.pushed = 0
        self.declined = False
        self.unheld: tuple[str, ...] = ()  # who could tell whether that is decided whose bytes nobody has
        self.incarnations: dict[str, int] = {}  # as peers said in this epoch
        self.top = NO_BALLOT  # the highest ballot heard of
        self.gather: Gather | None = None
        if self.ledger.decided is not None:
            config = self.ledger.config
            self.top = max(Ballot(0, config.seats[0].peer), self.ledger.promised)
            self.gather = Gather(config, self.settings, self.grace, self.ledger.resigned)

    # What is known.

    @property
    def epoch(self) -> int:
        """Of the last decision known here; -1 where nothing is known yet."""
        return self.ledger.epoch

    @property
    def config(self) -> Config | None:
        return None if self.ledger.decided is None else self.ledger.decided.config

    @property
    def entered(self) -> bool:
        """In a round for the very next epoch."""
        return self.round is not None and self.round.offer.epoch == self.epoch

    def send(self, peer: str, message: Message) -> None:
        if peer != self.me:
            self.out.append(Send(peer, message))

    def send_all(self, peers: Iterable[str], message: Message) -> None:
        for peer in dict.fromkeys(peers):
            self.send(peer, message)

    def persist(self) -> None:
        self.journaled = True
        self.out.append(Persist(self.ledger.saved()))

    def see(self, ballot: Ballot) -> None:
        """A ballot that exists, if its owner may own one."""
        if ballot > self.top and self.ledger.config.seat(ballot.owner) is not None:
            self.top = ballot
            self.hint = None
            self.passed.discard(ballot.owner)

    def step_down(self) -> None:
        """Another one has a higher ballot. Whoever is pushed aside waits a little, longer each time, and not as long as
        others do, before it tries again."""
        self.lead = None
        self.pushed += 1
        turn = 1 + sum(self.me.encode()) % 7
        self.retry_at = self.now_s + self.settings.backoff_s * turn * min(self.pushed, 8) / 4

    def current(self, sender: str, epoch: int) -> bool:
        """Whether a message belongs to the epoch being decided. Who is behind is told what it missed, who is ahead is
        asked."""
        if self.ledger.decided is not None and epoch == self.epoch + 1:
            return True
        if self.ledger.decided is not None and epoch <= self.epoch:
            self.tell_decided(sender, self.ledger.decided, epoch - 1)
        else:
            self.send(sender, Ask(self.epoch))
        return False

    def meet(self, peers: Iterable[str]) -> None:
        """Whom to ask what is decided, should everybody of the last configuration be gone: the latest met first."""
        known = dict.fromkeys((*peers, *self.contacts))
        known.pop(self.me, None)
        self.contacts = tuple(known)[: self.settings.members_max]

    def expect(self, peer: str, took_s: float) -> None:
        """It may arrive in time for this epoch or, if that is being reduced already, for the next one."""
        if peer in self.coming or len(self.waiting) >= self.settings.members_max:
            return
        self.coming = (*self.coming, peer)[: self.settings.members_max]
        self.waiting |= {peer}
        self.grace.learn(took_s)

    def decision(self) -> Commit | None:
        """What is known to be decided, for whoever takes over a state from here."""
        decided = self.ledger.decided
        return (
            None
            if decided is None
            else Commit(decided, tuple(sorted(self.waiting)), self.former, self.earlier)
        )

    def part(self, peers: Iterable[str], config: Config) -> None:
        """Whom to tell what is decided, though they are no members: whoever they know may have left for good."""
        known = [peer for peer in dict.fromkeys(peers) if peer != self.me and config.seat(peer) is None]
        self.former = tuple(known)[:FORMER_MAX]

    def ask(self, now_s: float) -> None:
        """Whoever knows more than I do answers."""
        if now_s >= self.ask_at:
            self.ask_at = now_s + self.settings.resend_s
            self.send_all(self.contacts, Ask(self.epoch))

    def tell_decided(self, peer: str, decided: Decided, known: int) -> None:
        """`known`: the last epoch that `peer` knows of; it may hold what was decided since, and wait for that word."""
        earlier = tuple([one for one in self.earlier if one.config.epoch > known])
        self.send(peer, Commit(decided, tuple(sorted(self.waiting)), self.former, earlier))

    # Bytes.

    def fetch(self, value: Value, holders: Iterable[str]) -> None:
        if self.fetching is not None and self.fetching.digest != value.digest:
            self.out.append(Release(self.fetching.declaration.epoch, self.fetching.digest))
        self.fetching = value
        self.holders = tuple([peer for peer in dict.fromkeys(holders) if peer != self.me])
        self._order_fetch(value)

    def _order_fetch(self, value: Value) -> None:
        """From those who seem to be alive first: a dead one may not say that it gives nothing."""
        if self.holders:
            self.out.append(Fetch(value, tuple(sorted(self.holders, key=self.suspected.__contains__))))

    def fetch_decided(self, decided: Decided) -> None:
        """Whoever voted held the bytes, and any other member may have them by now."""
        self.awaiting = decided
        if decided.value is not None and decided.certificate is not None:
            self.fetch(decided.value, (*decided.certificate.voters, *decided.value.declaration.peers))

    def fetch_elsewhere(self, peer: str) -> None:
        """`peer` is suspected just now."""
        if self.fetching is not None and peer in self.holders and not self.suspected.issuperset(self.holders):
            self._order_fetch(self.fetching)

    def stop_reducing(self) -> None:
        if self.declaration is not None and self.done is None:
            self.out.append(Abandon(self.declaration.ballot))
        self.declaration = None
        self.done = None
        self.stuck = False

    # How an epoch ends.

    def learn(self, message: Commit, now_s: float) -> None:
        """Somebody says what is decided; the form was checked on arrival."""
        for one in message.earlier:
            if self.epoch >= 0 and one.config.epoch == self.epoch + 1 and self._may_be(one):
                self.settle(one, now_s, ())
        decided = message.decided
        if decided.config.epoch > self.epoch and self._may_be(decided):
            self.former = (*self.former, *message.former)
            self.settle(decided, now_s, message.waiting)

    def _may_be(self, decided: Decided) -> bool:
        """Whether it is of this chain, and, as far as can be told from here, certified."""
        value = decided.value
        if value is not None and (value.declaration.run, value.declaration.tag) != (self.run, self.tag):
            return False
        return decided.config.epoch != self.epoch + 1 or self.epoch < 0 or self.ledger.certifies(decided)

    def settle(
        self, decided: Decided, now_s: float, waiting: Iterable[str], told: Iterable[str] = ()
    ) -> None:
        """`decided` is true: move on, and tell these."""
        before, epoch = self.epoch, decided.config.epoch
        value, last = decided.value, self.ledger.decided
        missed = self.awaiting
        if self.declaration is not None and (value is None or self.declaration.key != value.declaration.key):
            self.stop_reducing()
        elif self.declaration is not None and self.done is None:
            self.out.append(Abandon(self.declaration.ballot))
        fetching = self.fetching
        known = self.ledger.config.peers if self.ledger.decided is not None else ()
        leavers = {*self.ledger.resigned, *self.ledger.departed}
        offered = self.gather.offers if self.gather is not None else ()
        gone = self.ledger.decide(decided)
        if last is not None and last.value is not None:
            self.earlier = (*self.earlier, last)[-EARLIER_MAX:]
        left = value.declaration.left_out if value is not None else ()
        late = [one.peer for one in left if one.why in ("late", "silent")]
        self.waiting = frozenset(
            tuple(dict.fromkeys((*waiting, *late, *self.coming)))[: self.settings.members_max]
        )
        self.coming = ()
        self.persist()
        voters = decided.certificate.voters if decided.certificate is not None else ()
        for peer in dict.fromkeys(told):
            self.tell_decided(peer, decided, before if peer in voters else before - 1)
        if fetching is not None and (value is None or fetching.digest != value.digest):
            gone.add(fetching.digest)
        if missed is not None and missed.value is not None:
            gone.add(missed.value.digest)
        for digest in sorted(gone):
            self.out.append(Release(before + 1, digest))
        self.awaiting = None
        self.lonely_at = None
        self.zero_free = True
        self._new_epoch()
        self.meet(decided.config.peers)
        former = (*sorted(self.waiting), *offered, *known, *self.former)
        self.part([peer for peer in former if peer not in leavers], decided.config)
        self.word_at = now_s
        if (
            value is not None
            and epoch == before + 1
            and before >= 0
            and (missed is None or self._stands_on(before))
        ):
            self._settle_next(decided, value)
        else:
            self._jump(decided)

    def _stands_on(self, epoch: int) -> bool:
        """The caller has the state of `epoch` from elsewhere: what was missed of it is not missed any more."""
        return self.round is not None and self.round.offer.epoch >= epoch

    def _settle_next(self, decided: Decided, value: Value) -> None:
        attempt = self.round
        member = value.declaration.member(self.me)
        mine = attempt is not None and member is not None and member.nonce == attempt.offer.nonce
        if attempt is not None and not mine and attempt.offer.epoch < self.epoch:
            if member is None:
                why = next((one.why for one in value.declaration.left_out if one.peer == self.me), "late")
                self.fail(Excluded(f"epoch {self.epoch} went on without us: {why}", self.epoch, why))
            else:
                self.fail(self._behind(attempt.offer))
        if value.digest in self.ledger.held:
            self.deliver(decided)
        elif not self._stands_on(self.epoch):
            self.fetch_decided(decided)

    def _jump(self, decided: Decided) -> None:
        if self.round is not None and self.round.offer.epoch < self.epoch:
            self.fail(self._behind(self.round.offer))
        if self.round is None or self.round.offer.epoch != self.epoch:
            peers = tuple([peer for peer in decided.config.peers if peer != self.me])
            self.out.append(Lagging(self.epoch, peers))

    def deliver(self, decided: Decided) -> None:
        """Decided, and its bytes are here."""
        value, certificate = decided.value, decided.certificate
        if value is None or certificate is None:
            return
        self.awaiting = None
        self.fetching = None
        nonce = None
        member = value.declaration.member(self.me)
        if self.round is not None and member is not None and member.nonce == self.round.offer.nonce:
            nonce = member.nonce
            self.round = None
        self.out.append(Committed(decided.config.epoch, value, certificate, nonce))

    # How a round ends.

    def _behind(self, offer: Offer) -> Behind:
        known = [one for one in (*self.earlier, self.ledger.decided) if one is not None]
        counted = None
        for one in known:
            if one.value is not None and one.config.epoch == offer.epoch + 1:
                counted = one.value.declaration.member(self.me) is not None
        return Behind(f"epoch {self.epoch} is committed already", offer.epoch + 1, self.epoch, counted)

    def fail(self, error: RoundFailed) -> None:
        """Ends the open round. What was voted for stays, and so do its bytes."""
        attempt = self.round
        if attempt is None:
            return
        self.close_round()
        self.out.append(Failed(attempt.offer.nonce, error))

    def close_round(self) -> None:
        """Tells whoever counts on us, so that nobody waits for a deadline."""
        attempt = self.round
        self.round = None
        self.lonely_at = None
        if attempt is None or self.gather is None or attempt.offer.epoch != self.epoch:
            return
        self.gather.drop(self.me)
        self.stop_reducing()
        gone = Gone(self.epoch + 1, attempt.offer.nonce)
        lead = self.lead
        if lead is None:
            self.send(self.following or self.top.owner, gone)
        elif lead.value is None:
            self.lead = None
            self.decline(lead.declaration.peers if lead.declaration is not None else self.gather.offers)

    def decline(self, peers: Iterable[str]) -> None:
        """I do not coordinate this epoch."""
        self.declined = True
        self.passed.add(self.me)
        self.hint = self.heir()
        self.send_all(peers, Decline(self.epoch + 1, self.hint or ""))

    def heir(self) -> str | None:
        """The best-ranked acceptor that is ready, but for me."""
        gather = self.gather
        if gather is None:
            return None
        for seat in gather.config.seats:
            ready = gather.offers.get(seat.peer)
            if seat.peer == self.me or ready is None or ready.incarnation != seat.incarnation:
                continue
            if seat.peer not in self.suspected and seat.peer not in self.passed:
                return seat.peer
        return None

    def is_lonely(self) -> bool:
        """No quorum is left among those not suspected."""
        config = self.ledger.config
        if not self.suspected and not self.ledger.resigned:
            return False
        alive = [peer for peer in config.peers if peer == self.me or peer not in self.suspected]
        return not config.is_quorum(alive, self.ledger.resigned)

    def stopped_without(self) -> tuple[str, ...] | None:
        """Whose return is waited for, as long as nothing can be decided without them; None while it can."""
        if not self.is_lonely():
            return self.barred_without() or None
        away = self.suspected - self.ledger.resigned.keys()
        return tuple([peer for peer in self.ledger.config.peers if peer in away])

    def barred_without(self) -> tuple[str, ...]:
        """Leading's matter."""
        return ()

    def no_quorum(self, missing: tuple[str, ...]) -> NoQuorum:
        """With the next step."""
        epoch = self.epoch + 1
        if self.is_lonely():
            why = f"too few of epoch {epoch - 1}'s members are here to decide epoch {epoch}"
        elif self.unheld:
            why = f"epoch {epoch} may be decided, and nobody here holds its bytes"
        else:
            why = f"epoch {epoch} may be decided, and too few of its members are here to tell"
        names = ", ".join(missing[:NAMED_MAX]) + (" and others" if len(missing) > NAMED_MAX else "")
        then = f"wait for {names}" if missing else "wait for them"
        then += ", or, where they are gone for good, open a new run from the newest state that is left"
        return NoQuorum(f"{why}; {then}", epoch, missing)

    def open_round(self, event: Enter) -> None:
        self.round = Round(event.offer, event.deadline_s)

    def _give_up_bytes(self) -> None:
        """The caller has the state already, from elsewhere."""
        awaiting, self.awaiting, self.fetching = self.awaiting, None, None
        if awaiting is not None and awaiting.value is not None:
            self.out.append(Release(awaiting.config.epoch, awaiting.value.digest))

    def expire(self) -> None:
        """The deadline has come."""
        epoch = self.epoch + 1
        if self.round is not None and self.round.offer.epoch > self.epoch >= 0:
            self.fail(NoQuorum(f"nobody told us how epoch {self.round.offer.epoch} was decided", epoch))
        elif self.awaiting is not None and self.round is not None:
            self.fail(self._behind(self.round.offer))
        elif self.ledger.decided is None:
            self.fail(NoQuorum("nobody told us who belongs to the run", 0))
        elif (missing := self.stopped_without()) is not None or self.unheld:
            self.fail(self.no_quorum(missing or self.unheld))
        elif self.lead is not None and self.lead.declaration is None and self.lead.value is None:
            self.fail(NoQuorum(f"too few of epoch {epoch - 1}'s members are ready", epoch))
        else:
            self.fail(RoundExpired(f"epoch {epoch} is not decided yet", epoch))
