"""Who takes part in an epoch, and what was decided: a pure core that no clock, socket or disk can reach.

WORDS. A chain is the sequence of rounds of one (run, tag). Epoch e decides one *value*: a declaration (who takes part,
with which weights, in which order) and the digest of the result's bytes. *Configuration* C_e: the members of the value
of epoch e, C_0 the founders. Its *seats* (peer, incarnation) are the acceptors of epoch e+1, ranked by rendezvous hash
of (run, tag, e+1). A *quorum* of C: more than half of its seats, or exactly half with the best-ranked. A *ballot*
(number, owner) orders the attempts within an epoch.

PROTOCOL. Paxos for each epoch, where what is proposed is first reduced.
 gather    Members send Ready(offer) to the coordinator: the owner of the highest ballot heard of, at first the
           best-ranked, who owns ballot 0. It answers Heard while it waits.
 declare   Once everybody not suspected is ready, or a quorum is and a learnt grace is over, the coordinator sends
           Declare(members). Those whose layout, codec or state is not the quorum's are Refused.
 reduce    The data plane works. Who cannot finish says Trouble; the coordinator leaves out the dead and the bad in a
           new ballot, whose Declare also asks for promises, so that the reduction goes on meanwhile.
 vote      The coordinator that holds the whole result sends Accept(ballot, value). A member votes (Voted) for what it
           holds only, after saving the vote; what it lacks it fetches from holders. One ballot has one digest, the
           coordinator's; a member with another one says Trouble(mismatch) and does not vote. Proposals and votes
           name the value's *tellers*: the owners of all ballots in which it was proposed, one after another.
 commit    Votes of a quorum of C_{e-1} and of more than half of the declared members (those who resigned do not count)
           decide. They are counted by the ballot's owner alone, which saves the decision, sends Commit to all, and
           C_e takes over.
 takeover  A coordinator that is suspected, silent, resigned or declines (its caller is late) is passed over by rank.
           Ballots above 0 begin with Prepare; the answers (Promise) carry the last vote, the digests held, the offer.
           From a quorum of them: the value of the highest vote must be proposed, unless it can be passed over (3);
           without any vote the membership that was being reduced goes on without the lost ones, else a new one is
           gathered. The same after a proposal for which too few of its members are left: its owner begins anew.
 catch-up  Whatever belongs to an earlier epoch is answered with Commit(last decision, certificate); the bytes are
           fetched, or, several epochs behind, the state is transferred (Lagging). A zombie hears the same. Who was
           a member, was late or asked, and is no member, is told decisions unasked, and Commit passes its name on: all
           that it knows of may have left. Whoever was overtaken while it transferred is waited for within the grace, or
           rounds that follow at once would leave it behind for ever (Coming). Commit carries a few decisions before it
           (not to voters, who know them), so that whoever was counted in one of them and holds its bytes still gets its
           result. Bytes of an epoch whose state the caller has from elsewhere are not fetched, nor missed.
 leaving   A resignation freezes an acceptor: its last promise and vote travel with it.

STATES of an acceptor: (epoch decided, promised ballot, last vote), saved before anybody hears of a change. Of a member:
no round, gathering, reducing, done, voted. Of a coordinator: preparing, gathering, reducing, voting.

WHY IT CANNOT FORK.
 1. Nobody votes below its promise, and one ballot has one value: numbers above 0 are promised to oneself, durably,
    before use; ballot 0 is not used by whoever restarted in this epoch.
 2. Reading quorums meet voting quorums. With resignations R known to the reader and R' to the counter: a voter in R
    shows its vote; somebody in R' abstains only if it never promised more than the ballot, so it cannot be among the
    reader's promises; the rest are quorums of shrinking sets, of which two always meet (tests enumerate all cases).
 3. A value is passed over only if all its tellers answered a higher ballot with a promise or a resignation. Then none
    of them knows it decided, and none will ever count its votes: whoever promises a ballot never counts votes for lower
    ones again. Ballots below the first teller's were found free, those between two tellers' had no quorum, or their
    votes would have been found instead. So nothing below the higher ballot is, or will be, decided. It is done where
    nobody has the bytes any more, and where so many of the members are dead that the rest cannot decide it.
 4. Who lost its journal has another incarnation, and so no seat. (C_0's founders have incarnation 0: a founder without
    journal must be started as a joiner.)
INVARIANTS checked in simulation after every step: one value an epoch; one state an epoch; every result is the exact
weighted mean over the attempts its declaration names, all on the state of the epoch before; what is said is on disk;
votes are for bytes held; each epoch is delivered once, in order; every round ends by its deadline; nobody that was
counted is told Behind while it holds the result and was told that it is decided, nor when it knows that and could have
had the bytes from somebody reachable for a second; after healing, the next epochs are decided. docs/round.pml is a
model of the commit for spin.
What nobody can mend is named, and stops the chain rather than forking it: a quorum of seats gone for good without
resigning (of two, the best-ranked); more than half of a voted-for membership likewise, where one of its tellers is gone
too and may have decided it; all bytes and states of a decided epoch lost. Nobody can do better: whoever is not heard of
may be deciding on the other side of a partition, or have decided before it died. Rounds then fail with a NoQuorum that
names who is missing; where they are gone for good, a new run from the newest state is the way on.

HOW A SHELL DRIVES `Chain` (one for each run and tag):
- One thread of control: `for one in chain.handle(event, now_s): do(one)`, instructions strictly in order. `now_s` is
  a monotonic clock. Call `handle(Tick(), now)` when `wake_s` (None: not needed) has come; `wake_s` may change with
  every event. Events that arise while instructions are done (Held, Reduced) wait for their turn.
- `Persist(saved)` must be durable (fsync) before any later Send, Committed or Failed of this chain is done. The next
  one replaces it. If it cannot be written the chain must not be used any more. After a restart: `Chain(..., saved=)`,
  `Met(peers)`, and Held(epoch, digest) for every result whose bytes survived.
- `Send` may be lost, doubled and overtaken. Route it by (run, tag); only the authenticated sender counts.
- `Reduce(declaration)` while another is under way means rebase. Tag frames with `declaration.key`; a contribution
  belongs to (peer, nonce). Answer with Reduced or Stuck, also late: the chain ignores what is old. Stuck may be
  repeated.
- Every whole result reported by Reduced or Held stays servable to peers (by digest) until its `Release`, or, to make
  room, until the `Reduce` of a later epoch: whoever has not fetched it by then transfers the state.
- `Committed` of an epoch that the caller's state already holds (it was transferred meanwhile) is to be ignored.
- A state is handed on together with `Chain.decision()`, which the receiver's chain is told before the next Enter: all
  who know that its epoch is decided may be gone afterwards.
- `Offer.nonce` must be new for each Enter, also across restarts (random or nanoseconds).
- `incarnation` must be new (random or nanoseconds) whenever there is no `saved`, or saved.left is set; founders
  that create a run use 0. A founder without its journal is a joiner: `config=None` and Met.
- `Leave` between rounds, where one can choose: who leaves may take along the only bytes of its vote. The last seat of
  a configuration should not leave before somebody else has one.
- Suspected/Alive come from `Detector.poll`, or from any other; wrong ones cost time, never safety.
"""

from collectives.agreement.chain import Chain
from collectives.agreement.detector import Detector, DetectorSettings, Health
from collectives.agreement.events import (
    Abandon,
    Alive,
    Coming,
    Committed,
    Enter,
    Event,
    Failed,
    Fetch,
    Held,
    Instruction,
    Lagging,
    Leave,
    Left,
    Met,
    Persist,
    Received,
    Reduce,
    Reduced,
    Release,
    Send,
    Stuck,
    Suspected,
    Tick,
    Withdraw,
)
from collectives.agreement.messages import Message, pack_message, unpack_message
from collectives.agreement.types import (
    Ballot,
    Certificate,
    Config,
    Decided,
    Declaration,
    LeftOut,
    Member,
    Offer,
    Saved,
    Seat,
    Settings,
    Value,
    founding,
)

__all__ = [
    "Abandon",
    "Alive",
    "Ballot",
    "Certificate",
    "Chain",
    "Coming",
    "Committed",
    "Config",
    "Decided",
    "Declaration",
    "Detector",
    "DetectorSettings",
    "Enter",
    "Event",
    "Failed",
    "Fetch",
    "Health",
    "Held",
    "Instruction",
    "Lagging",
    "Leave",
    "Left",
    "LeftOut",
    "Member",
    "Message",
    "Met",
    "Offer",
    "Persist",
    "Received",
    "Reduce",
    "Reduced",
    "Release",
    "Saved",
    "Seat",
    "Send",
    "Settings",
    "Stuck",
    "Suspected",
    "Tick",
    "Value",
    "Withdraw",
    "founding",
    "pack_message",
    "unpack_message",
]
