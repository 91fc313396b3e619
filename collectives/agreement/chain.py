"""`Chain`: events in, instructions out. It dispatches, keeps the time, and knows when it wants to be woken."""

from __future__ import annotations

from collectives.agreement.events import (
    Alive,
    Coming,
    Enter,
    Event,
    Failed,
    Held,
    Instruction,
    Leave,
    Left,
    Met,
    Received,
    Reduced,
    Stuck,
    Suspected,
    Withdraw,
)
from collectives.agreement.leading import Leading
from collectives.agreement.messages import (
    Accept,
    Ask,
    Commit,
    Declare,
    Decline,
    Gone,
    Heard,
    Message,
    Nack,
    Prepare,
    Promise,
    Ready,
    Refused,
    Resign,
    Trouble,
    Voted,
)
from collectives.agreement.types import Config, Offer, Saved, Settings
from collectives.errors import RoundFailed, Superseded


class Chain(Leading):
    """The rounds of one (run, tag) at one peer. See the package's docstring for how to drive it.

    `config`: C_0 for founders, None for whoever joins (then tell it whom it Met). `saved` has precedence.
    """

    def __init__(
        self,
        me: str,
        run: str,
        tag: str,
        config: Config | None,
        settings: Settings | None = None,
        *,
        incarnation: int = 0,
        saved: Saved | None = None,
    ) -> None:
        super().__init__(me, run, tag, config, settings or Settings(), incarnation, saved)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """What is to be done, in order."""
        if self.ledger.left:
            if isinstance(event, Enter):
                return [Failed(event.offer.nonce, Superseded("the run is being left", 0))]
            return []
        self.now_s = now_s
        self._dispatch(event, now_s)
        if not self.ledger.left:
            self._advance(now_s)
        out, self.out = self.out, []
        return out

    def _dispatch(self, event: Event, now_s: float) -> None:
        match event:
            case Received(sender, message):
                self._receive(sender, message, now_s)
            case Reduced(ballot, digest):
                self.on_reduced(ballot, digest)
            case Stuck(ballot, without, why):
                self.on_stuck(ballot, without, why, now_s)
            case Held(epoch, digest):
                self.on_held(epoch, digest)
            case Enter():
                self._enter(event, now_s)
            case Withdraw():
                self.close_round()
            case Suspected(peer):
                if peer in self.suspected or len(self.suspected) < 4 * self.settings.members_max:
                    self.on_suspected(peer, now_s)
            case Alive(peer):
                self._on_alive(peer)
            case Coming(peer, took_s):
                self.expect(peer, took_s)
            case Met(peers):
                self.meet(peers)
                self.ask_at = now_s
                self.ask(now_s)
            case Leave():
                self._leave()

    def _receive(self, sender: str, message: Message, now_s: float) -> None:
        if sender == self.me:
            return
        match message:
            case Commit():
                self.learn(message, now_s)
            case Ask(epoch):
                self._on_ask(sender, epoch)
            case Resign(_, decided):
                self.learn(Commit(decided), now_s)
                self._on_resign(sender, message, now_s)
            case Ready():
                self.on_ready(sender, message, now_s)
            case _ if self.ledger.decided is None:
                self.send(sender, Ask(-1))
            case _:
                self._receive_current(sender, message, now_s)
        if sender == self.following:
            self.word_at = now_s

    def _receive_current(self, sender: str, message: Message, now_s: float) -> None:
        match message:
            case Declare(declaration):
                self.on_declare(sender, declaration)
            case Accept():
                self.on_accept(sender, message)
            case Voted():
                self.on_voted(sender, message)
            case Promise():
                self.on_promise(sender, message, now_s)
            case Prepare():
                self.on_prepare(sender, message)
            case Nack():
                self.on_nack(message)
            case Trouble():
                self.on_trouble(sender, message, now_s)
            case Gone():
                self.on_gone(sender, message, now_s)
            case Heard(epoch, _):
                if epoch == self.epoch + 1:
                    self.on_heard(message)
            case Decline(epoch, _):
                if epoch == self.epoch + 1:
                    self.on_decline(sender, message)
            case Refused(epoch, _, _):
                if epoch == self.epoch + 1:
                    self.on_refused(sender, message)

    # The caller.

    def _enter(self, event: Enter, now_s: float) -> None:
        offer = event.offer
        if self.round is not None:
            error: RoundFailed = Superseded("another round of this tag is open", offer.epoch + 1)
            self.out.append(Failed(offer.nonce, error))
            return
        if not self.journaled:
            self.persist()  # from now on a restart is known to be one
        if self.awaiting is not None and offer.epoch == self.epoch:
            self._give_up_bytes()
        self.open_round(event)
        if offer.epoch < self.epoch:
            self._miss_nothing(offer)
            self.fail(self._behind(offer))
        else:
            self._begin(now_s)

    def _miss_nothing(self, offer: Offer) -> None:
        """One epoch behind, as after a crash between decision and delivery: its bytes may still be had."""
        decided = self.ledger.decided
        if self.awaiting is not None or decided is None or offer.epoch != self.epoch - 1:
            return
        if decided.value is not None and decided.certificate is not None:
            if decided.value.digest in self.ledger.held:
                self.deliver(decided)
            else:
                self.fetch_decided(decided)

    def _begin(self, now_s: float) -> None:
        attempt = self.round
        if attempt is None or self.gather is None or attempt.offer.epoch != self.epoch:
            return
        self.gather.add(self.me, self.ledger.incarnation, attempt.offer, now_s)
        self.following = None
        self.ask_at = now_s + self.settings.takeover_s
        self.declined = False
        self.hint = None
        self.passed.discard(self.me)

    def _leave(self) -> None:
        if self.round is not None:
            self.fail(Superseded("the run is being left", self.epoch + 1))
        config, decided = self.config, self.ledger.decided
        resignation = self.ledger.resign()
        self.lead = None
        self.persist()
        if config is not None and decided is not None:
            self.send_all((*config.peers, *self.contacts), Resign(resignation, decided))
        self.out.append(Left())

    def _on_ask(self, sender: str, epoch: int) -> None:
        decided = self.ledger.decided
        if decided is not None:
            self.part((sender, *self.former), decided.config)
            if epoch < self.epoch:
                self.tell_decided(sender, decided, epoch)

    def _on_alive(self, peer: str) -> None:
        """Whoever is no member may have missed why."""
        self.suspected.discard(peer)
        if self.ledger.decided is not None and peer in self.former:
            self.tell_decided(peer, self.ledger.decided, -1)

    def _on_resign(self, sender: str, message: Resign, now_s: float) -> None:
        if self.ledger.decided is None or not self.ledger.note(message.resignation):
            return
        peer = message.resignation.seat.peer
        if sender == peer:  # who leaves says it only once
            self.send_all([one for one in self.ledger.config.peers if one != peer], message)
        self.former = tuple([one for one in self.former if one != peer])
        if self.gather is not None:
            self.gather.drop(peer)
        lead = self.lead
        if lead is not None and lead.declaration is not None and lead.declaration.member(peer) is not None:
            lead.gone[peer] = "silent"
            lead.redo_at = now_s

    # Time.

    def _advance(self, now_s: float) -> None:
        if self.round is not None and now_s >= self.round.deadline_s:
            self.expire()
        if self.ledger.decided is None:
            self.ask(now_s)
            return
        if self.round is not None and self.round.offer.epoch > self.epoch:
            self.ask(now_s)
        elif self.entered:
            self._in_round(now_s)
        if self.lead is not None:
            self.drive(now_s)
        if not self.entered:
            self._decline_if_late(now_s)

    def _in_round(self, now_s: float) -> None:
        if self.gather is not None and self.me not in self.gather.offers:
            self._begin(now_s)
        missing = self.stopped_without()
        if missing is not None:
            self.lonely_at = now_s if self.lonely_at is None else self.lonely_at
            self.ask(now_s)  # it may be long decided that others hold the seats
            if now_s >= self.lonely_at + self.settings.no_quorum_s:
                self.fail(self.no_quorum(missing))
                return
        else:
            self.lonely_at = None
        if self.lead is None:
            self.follow(now_s)
            if self.following == self.me:
                self.take_the_lead(now_s)

    def _decline_if_late(self, now_s: float) -> None:
        """Others wait for me to coordinate, and I am in no round: another one should."""
        due = self._late_s()
        if due is not None and now_s >= due and self.gather is not None:
            self.decline(list(self.gather.offers))

    def _late_s(self) -> float | None:
        gather = self.gather
        if gather is None or not gather.offers or self.declined or self.lead is not None:
            return None
        if not self.ledger.seated:
            return 0.0
        return None if gather.quorum_at is None else gather.quorum_at + self.grace.seconds

    @property
    def wake_s(self) -> float | None:
        """When to say Tick, if nothing else happens before."""
        if self.ledger.left:
            return None
        times: list[float] = []
        attempt = self.round
        if attempt is not None:
            times.append(attempt.deadline_s)
            if self.lonely_at is not None and self.entered:
                times += [self.lonely_at + self.settings.no_quorum_s, self.ask_at]
        if self.ledger.decided is None:
            if self.contacts:
                times.append(self.ask_at)
        elif attempt is not None and attempt.offer.epoch > self.epoch:
            times.append(self.ask_at)
        elif self.entered and self.lead is None:
            times.append(self.retry_at if self.following == self.me else self.poke_at)
        if self.lead is not None:
            times += self._lead_times(self.lead)
        elif not self.entered and (late := self._late_s()) is not None:
            times.append(late)
        return min(times, default=None)

    def validate(self) -> None:
        """RuntimeError if what must always hold does not."""
        self.ledger.validate()
        lead = self.lead
        if lead is not None and lead.ballot < self.ledger.promised:
            raise RuntimeError("leading below a promise")
        if lead is not None and lead.ballot.owner != self.me:
            raise RuntimeError("leading somebody else's ballot")
        if self.declaration is not None and self.declaration.epoch != self.epoch + 1:
            raise RuntimeError("reducing for another epoch")
        if self.gather is not None and len(self.gather.offers) > self.settings.members_max:
            raise RuntimeError("too many offers")
