"""What must always hold in the simulated world, and what nobody could mend."""

import hashlib
from fractions import Fraction

from collectives.agreement import messages as ms
from collectives.errors import Behind, Diverged, Excluded

FOUND_WITHIN_S = 1.0  # whoever looks for bytes, and knows who may hold them, finds them


class Violation(AssertionError):
    """A rule was broken."""


def digest_of(mean):
    return hashlib.blake2b(f"{mean.numerator}/{mean.denominator}".encode(), digest_size=16).digest()


class Checks:
    """Of a world: mixed into it."""

    def check_send(self, node, message):
        """What is said must be on disk."""
        kind = type(message)
        disk = node.disk
        if kind is ms.Voted:
            vote = disk and disk.vote
            if not vote or vote.ballot != message.ballot or vote.value.digest != message.digest:
                raise Violation(f"seed {self.seed}: {node.name} says a vote that is not on disk")
        elif kind is ms.Promise:
            if disk is None or disk.promised < message.ballot or disk.vote != message.vote:
                raise Violation(f"seed {self.seed}: {node.name} promises what is not on disk")
        elif kind is ms.Commit and message.decided.value is not None:
            self.check_commit(node, message.decided.config.epoch)

    def check_commit(self, node, epoch):
        disk = node.disk
        if disk is None or disk.decided is None or disk.decided.config.epoch < epoch:
            raise Violation(f"seed {self.seed}: {node.name} tells a commit that is not on disk")

    def check_decided(self, decided):
        epoch, value = decided.config.epoch, decided.value
        if value is None:
            return
        key = (value.declaration.key, value.digest)
        known = self.decided.get(epoch)
        if known is not None:
            if known[0] != key or known[1] != decided.config:
                raise Violation(f"seed {self.seed}: epoch {epoch} is decided twice")
            return
        self.stats["commits"] += 1
        self.decided[epoch] = (key, decided.config)
        self.values[epoch] = value
        self.check_value(epoch, value)

    def check_value(self, epoch, value):
        total = Fraction(0)
        weights = 0
        for member in value.declaration.members:
            offer = self.offers.get((member.peer, member.nonce))
            if offer is None or offer[0] != epoch - 1 or offer[2] != member.weight:
                raise Violation(f"seed {self.seed}: epoch {epoch} names an offer of {member.peer} never made")
            if offer[3] != self.states.get(epoch - 1):
                raise Violation(f"seed {self.seed}: {member.peer} took part in {epoch} on another state")
            if offer[4]:
                raise Violation(f"seed {self.seed}: epoch {epoch} holds a contribution that is not finite")
            if isinstance(self.told.get((member.peer, member.nonce)), Excluded | Diverged):
                self.stats["wrongly_excluded"] = self.stats.get("wrongly_excluded", 0) + 1
            total += offer[1] * offer[2]
            weights += offer[2]
        if value.digest != digest_of(total / weights):
            raise Violation(f"seed {self.seed}: epoch {epoch} is not the mean over its members")

    def note_heard(self, node, message):
        if type(message) is ms.Commit:
            node.heard |= {one.config.epoch for one in (message.decided, *getattr(message, "earlier", ()))}
        elif type(message) is ms.Resign:
            node.heard.add(message.decided.config.epoch)

    def check_told(self, node, one):
        """A member that was counted is never told Behind while it holds the result and was told that it is decided, nor
        once it knows that and could have had the bytes from another member for a while."""
        self.told[node.name, one.nonce] = one.error
        epoch = self.offers[node.name, one.nonce][0] + 1
        value = self.values.get(epoch)
        member = value and value.declaration.member(node.name)
        if not member or member.nonce != one.nonce:
            return
        if isinstance(one.error, Excluded | Diverged):
            self.stats["wrongly_excluded"] = self.stats.get("wrongly_excluded", 0) + 1
        if not isinstance(one.error, Behind):
            return
        self.stats["counted_behind"] += 1
        if epoch not in node.heard and epoch not in node.known_at:
            self.stats["counted_unheard"] += 1
        elif value.digest in node.results:
            raise Violation(
                f"seed {self.seed}: {node.name} holds epoch {epoch}, counts in it, and is told Behind"
            )
        elif epoch in node.known_at and (holder := self.holder_for(node, epoch, value.digest)):
            raise Violation(
                f"seed {self.seed}: {node.name} counts in {epoch}, {holder} has it, and it is told Behind"
            )

    def holder_for(self, node, epoch, digest):
        """Who holds these bytes and could be asked by `node`, for long enough."""
        for peer in self.values[epoch].declaration.peers:
            other = self.nodes[peer]
            if other is node or other.gone or other.paused_until > self.now or digest not in other.results:
                continue
            if not self.reach(node.name, other.name) or (other.name, node.name) in self.blocked:
                continue
            since = (node.known_at[epoch], other.held_at[digest], node.changed_at, other.changed_at)
            if self.now - max(since) > FOUND_WITHIN_S:
                return other.name
        return None

    def excuse(self):
        """What nobody could mend: too many seats without their journal, or all bytes of an epoch lost."""
        top = max(self.decided)
        if all(node.state_epoch < top for node in self.nodes.values() if not node.gone):
            return "every copy of a decided result was lost at once"
        top = max(node.chain.epoch for node in self.nodes.values() if not node.gone)
        config = self.decided[top][1]
        seated, resigned = set(), set()
        for node in self.nodes.values():
            seat = config.seat(node.name)
            if seat is not None and not node.gone and seat.incarnation == node.chain.ledger.incarnation:
                seated.add(node.name)
            if not node.gone and node.chain.epoch == top:
                resigned |= set(node.chain.ledger.resigned)
        if not config.is_quorum(seated, resigned):
            return "a quorum of seats lost their journals or left"
        known = set()
        for node in self.nodes.values():
            if not node.gone and node.chain.epoch == top:
                known |= {one.seat for one in node.chain.ledger.notes()}
        unheld = stranded = False
        for node in self.nodes.values():
            vote = node.chain.ledger.vote  # a leaver's too
            if vote is None or node.chain.epoch != top:
                continue
            tellers = [config.seat(peer) for peer in vote.tellers]
            if all(seat in known or self.is_there(seat.peer, seat.incarnation) for seat in tellers):
                continue  # it can be passed over
            digest = vote.value.digest
            unheld = unheld or not any(digest in one.results for one in self.nodes.values() if not one.gone)
            members = [one for one in vote.value.declaration.config().seats if one not in known]
            alive = [one for one in members if self.is_there(one.peer, one.incarnation)]
            stranded = stranded or 2 * len(alive) <= len(members)
        if unheld:
            return "the bytes of a vote are lost, and so is one who may have counted it"
        if stranded:
            return "most members of a value that was voted for are lost, and so is one who may have counted the votes"
        return None

    def is_there(self, name, incarnation):
        node = self.nodes[name]
        return not node.gone and node.chain.ledger.incarnation == incarnation
