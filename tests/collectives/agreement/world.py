"""A simulated world for chains: one seed, one history of faults, every rule checked while it runs.

Links lose, delay, double and reorder; nodes crash (between any two instructions too), come back with their journal,
with or without the bytes they held, or with an empty disk; they pause and wake, are cut off from one another, are
suspected rightly and wrongly, leave and join. Then everything heals, and the run must go on. The data plane is exact: a
result is the digest of the exact weighted mean of what its members offered.
"""

import hashlib
import heapq
import random
from dataclasses import dataclass, field
from fractions import Fraction

from collectives.agreement import chain as chain_module
from collectives.agreement import events as ev
from collectives.agreement import messages as ms
from collectives.agreement.types import Offer, Settings, founding

RUN, TAG = "run", "outer"
SETTINGS = Settings(
    resend_s=0.3, takeover_s=1.0, grace_first_s=0.2, grace_max_s=1.0, hurry_s=0.3, no_quorum_s=2.0
)
KILL_AT = (ms.Ready, ms.Declare, ms.Prepare, ms.Promise, ms.Accept, ms.Voted, ms.Commit, ev.Persist)


class Violation(AssertionError):
    """A rule was broken."""


KINDS = {
    "mixed": "crash crash bytes disk pause pause split split cut oneway leave join wrong trap all",
    "duels": "wrong wrong pause pause oneway cut trap trap crash split",
    "comers and goers": "leave leave join join pause trap crash split",
    "losses": "bytes bytes disk disk crash crash all trap pause split",
}


@dataclass
class Plan:
    """How hard the world is, drawn from the seed."""

    kinds: list
    nodes: int
    loss: float
    double: float
    slow: float  # share of messages that take up to seconds
    delay_s: float
    reduce_s: float
    faults_until_s: float
    faults: int
    wrong: int  # suspicions of nobody in particular
    epochs_after: int = 2


def plan_of(rng):
    name = rng.choice(list(KINDS))
    duels = name == "duels"
    return Plan(
        kinds=KINDS[name].split(),
        nodes=rng.choice((2, 3, 3, 3, 4, 4, 5)),
        loss=rng.choice((0.0, 0.0, 0.02, 0.1, 0.25)),
        double=rng.choice((0.0, 0.05)),
        slow=rng.choice((0.02, 0.1, 0.3) if duels else (0.0, 0.02, 0.08)),
        delay_s=rng.choice((0.01, 0.05, 0.2) if duels else (0.002, 0.01, 0.05)),
        reduce_s=rng.choice((0.01, 0.05) if duels else (0.02, 0.2, 0.6)),
        faults_until_s=rng.choice((3.0, 6.0)),
        faults=rng.randint(1, 8),
        wrong=rng.randint(5, 40) if duels else 0,
    )


@dataclass
class Node:
    name: str
    disk: object = None  # Saved
    incarnation: int = 0
    founder: bool = True
    chain: object = None
    up: bool = False
    gone: bool = False  # left for good
    boot: int = 0
    paused_until: float = 0.0
    inbox: list = field(default_factory=list)  # what came while it was paused
    state_epoch: int = 0
    state: bytes = b"0"
    results: dict = field(default_factory=dict)  # digests whose bytes are here -> epoch
    wanted: dict = field(default_factory=dict)  # digest -> (epoch, holders)
    nonce: int | None = None  # of the open round
    deadline_s: float = 0.0
    value: Fraction = Fraction(0)
    weight: int = 0
    active: object = None  # the declaration being reduced
    got: dict = field(default_factory=dict)  # (peer, nonce) -> (value, weight)
    since: float = 0.0
    told_down: set = field(default_factory=set)  # whom its failure detector suspects
    last_committed: int = 0
    wake_at: float | None = None
    lagging: bool = False
    odd: bool = False  # offers on a state that nobody else has


class World:
    def __init__(self, seed, settings=SETTINGS, chain=None):
        self.rng = random.Random(seed)
        self.seed = seed
        self.plan = plan_of(self.rng)
        self.settings = settings
        self.chain_type = chain or chain_module.Chain
        self.now = 0.0
        self.queue = []
        self.count = 0
        self.nonces = 0
        self.names = [f"n{k}" for k in range(self.plan.nodes)]
        self.config0 = founding(RUN, TAG, self.names)
        self.nodes = {name: Node(name) for name in self.names}
        self.blocked = set()  # ordered pairs that cannot talk
        self.healed = False
        self.offers = {}  # (peer, nonce) -> (epoch, value, weight, state, bad)
        self.decided = {0: (None, self.config0)}
        self.states = {0: b"0"}
        self.stats = {"commits": 0, "failed": 0, "handled": 0}
        self.trap = None  # (type, how many, before)
        self.excused = None
        self.trace = None
        for node in self.nodes.values():
            self.boot(node)
        self.schedule_faults()

    # The clockwork.

    def at(self, delay, kind, *args):
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay, self.count, kind, args))

    def log(self, *what):
        if self.trace is not None:
            self.trace.append((round(self.now, 4), *what))

    def run(self):
        """Until the end of all, or Violation."""
        limit_s = self.plan.faults_until_s + 60.0
        queue = self.queue
        while queue:
            when, _, kind, args = heapq.heappop(queue)
            self.now = max(self.now, when)
            if self.now > limit_s:
                break
            getattr(self, "do_" + kind)(*args)
            if self.healed and kind == "commit_check" and self.finished():
                return self
        if not self.finished():
            self.excused = self.excuse()
            if self.excused is None:
                raise Violation(f"seed {self.seed}: no progress after healing: {self.picture()}")
        return self

    def finished(self):
        if not self.healed:
            return False
        goal = self.heal_epoch + self.plan.epochs_after
        return all(node.state_epoch >= goal for node in self.nodes.values() if not node.gone)

    def picture(self):
        return {
            node.name: (node.state_epoch, node.chain.epoch if node.chain else None, node.up, node.gone)
            for node in self.nodes.values()
        }

    def excuse(self):
        """What nobody could mend: too many seats without their journal, or all bytes of an epoch lost."""
        top = max(self.decided)
        if all(node.state_epoch < top for node in self.nodes.values() if not node.gone):
            return "every copy of a decided result was lost at once"
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
        dead = {seat.peer for seat in config.seats} - seated - resigned
        members = set()
        unheld = False
        for node in self.nodes.values():
            vote = node.chain.ledger.vote  # a leaver's too
            if vote is not None and node.chain.epoch == top:
                unheld = unheld or not any(
                    vote.value.digest in one.results for one in self.nodes.values() if not one.gone
                )
                owners = vote.value.declaration.config()
                alive = {
                    one.name
                    for one in self.nodes.values()
                    if not one.gone
                    and (seat := owners.seat(one.name))
                    and seat.incarnation == one.chain.ledger.incarnation
                }
                if not owners.is_quorum(alive):
                    members.add(node.name)
        if unheld and dead:
            return "the bytes of a vote are lost, and so is a seat that might know more"
        if members:
            return "most members of a value that was voted for are lost for good"
        return None

    # Nodes.

    def boot(self, node):
        node.up = True
        node.boot += 1
        node.inbox.clear()
        node.active = None
        node.got = {}
        node.nonce = None
        node.wanted = {}
        node.told_down = set()
        node.wake_at = None
        node.lagging = False
        config = self.config0 if node.founder else None
        node.chain = self.chain_type(
            node.name, RUN, TAG, config, self.settings, incarnation=node.incarnation, saved=node.disk
        )
        if node.chain.config is None:
            others = tuple(name for name in self.nodes if name != node.name)
            self.tell(node, ev.Met(others))
        if node.disk is not None:
            for digest, epoch in sorted(node.results.items()):
                self.tell(node, ev.Held(epoch, digest))
        self.at(self.rng.random() * 0.3, "enter", node.name, node.boot)

    def crash(self, node, back_after, keep_bytes=False, lose_disk=False):
        if not node.up or node.gone:
            return
        self.log("crash", node.name, "disk lost" if lose_disk else "")
        node.up = False
        node.paused_until = 0.0
        if not keep_bytes:
            node.results = {}
        if lose_disk:
            node.disk = None
            node.founder = False
            node.incarnation = 1_000_000 + self.count
            node.results = {}
            node.state_epoch, node.state = -1, b""
            node.last_committed = 0
        self.changed(node.name)
        self.at(back_after, "restart", node.name)

    def do_restart(self, name):
        node = self.nodes[name]
        if not node.up and not node.gone:
            self.log("restart", name)
            self.boot(node)
            self.changed(name)

    # Events into a chain, instructions out of it.

    def tell(self, node, event):
        if not node.up or node.gone:
            return
        if node.paused_until > self.now:
            node.inbox.append(event)
            return
        self.stats["handled"] += 1
        out = node.chain.handle(event, self.now)
        node.chain.validate()
        if self.trace is not None:
            self.log(node.name, event, out)
        boot = node.boot
        for one in out:
            self.perform(node, one)
            if node.boot != boot or not node.up:
                return
        wake = node.chain.wake_s
        if wake is not None and wake <= self.now and type(event) is ev.Tick:
            raise Violation(f"seed {self.seed}: {node.name} asks to be woken for ever")
        if wake is not None and (node.wake_at is None or wake < node.wake_at or node.wake_at < self.now):
            node.wake_at = wake
            self.at(max(wake - self.now, 0.001), "wake", node.name, boot)

    def do_wake(self, name, boot):
        node = self.nodes[name]
        if node.boot != boot or not node.up:
            return
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now, "wake", name, boot)
            return
        node.wake_at = None
        wake = node.chain.wake_s
        if wake is not None and wake <= self.now + 1e-9:
            self.tell(node, ev.Tick())
        elif wake is not None:
            node.wake_at = wake
            self.at(wake - self.now, "wake", name, boot)

    def do_resume(self, name, boot):
        node = self.nodes[name]
        if node.boot != boot or not node.up or node.paused_until > self.now:
            return
        self.changed(name)
        inbox, node.inbox = node.inbox, []
        for event in inbox:
            self.tell(node, event)
        self.tell(node, ev.Tick())

    def sprung(self, node, kind):
        """Whether the trap kills this node here."""
        if self.trap is None or self.trap[0] is not kind or self.healed:
            return False
        self.trap[1] -= 1
        if self.trap[1] > 0:
            return False
        self.trap = None
        if self.rng.random() < 0.75:
            self.trap = [self.rng.choice(KILL_AT), self.rng.randint(1, 8)]
        return True

    def perform(self, node, one):
        kind = type(one)
        what = type(one.message) if kind is ev.Send else kind
        sprung = self.trap is not None and self.sprung(node, what)
        if sprung and self.rng.random() < 0.5:
            self.fall(node)
            if not node.up:
                return
            sprung = False
        if kind is ev.Send:
            self.check_send(node, one.message)
            self.post(node.name, one.peer, one.message)
        else:
            getattr(self, "on_" + kind.__name__.lower())(node, one)
        if sprung:
            self.fall(node)

    def fall(self, node):
        rng = self.rng
        chance = rng.random()
        if chance < 0.2 and "disk" in self.plan.kinds and self.plan.nodes > 2:
            self.crash(node, rng.uniform(0.2, 2.0), lose_disk=True)
        elif chance < 0.3 and "leave" in self.plan.kinds:
            self.at(0.0, "leave", node.name)
        elif chance < 0.5:
            self.crash(node, rng.uniform(0.2, 3.0), keep_bytes=rng.random() < 0.3)
        elif chance < 0.8:
            others = [name for name in self.names if name != node.name]
            pairs = {(node.name, one) for one in others} | {(one, node.name) for one in others}
            self.block(pairs, rng.uniform(0.5, 3.0))
        else:
            self.pause(node, rng.uniform(0.5, 3.0))

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

    def on_persist(self, node, one):
        saved = one.saved
        if saved.vote is not None and (node.disk is None or node.disk.vote != saved.vote):
            digest = saved.vote.value.digest
            if digest not in node.results:
                raise Violation(f"seed {self.seed}: {node.name} votes for bytes it does not hold")
        if saved.decided is not None and (node.disk is None or node.disk.decided != saved.decided):
            self.check_decided(saved.decided)
        node.disk = saved

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
            total += offer[1] * offer[2]
            weights += offer[2]
        if value.digest != digest_of(total / weights):
            raise Violation(f"seed {self.seed}: epoch {epoch} is not the mean over its members")

    # The network.

    def reach(self, a, b):
        return (a, b) not in self.blocked and self.nodes[a].up and self.nodes[b].up

    def post(self, src, dst, message):
        rng, plan = self.rng, self.plan
        if dst not in self.nodes or (src, dst) in self.blocked:
            return
        chance = rng.random()
        if not self.healed and chance < plan.loss:
            return
        copies = 2 if chance > 1.0 - plan.double else 1
        for _ in range(copies):
            delay = plan.delay_s * (0.5 + rng.random())
            if rng.random() < plan.slow:
                delay = rng.uniform(0.0, 4.0)
            self.at(delay, "arrive", src, dst, message)

    def do_arrive(self, src, dst, message):
        if (src, dst) not in self.blocked:
            self.tell(self.nodes[dst], ev.Received(src, message))

    def changed(self, name):
        """Failure detectors notice in a while."""
        for other in self.nodes:
            if other != name:
                self.at(self.rng.uniform(0.1, 1.0), "detect", other, name)
                self.at(self.rng.uniform(0.1, 1.0), "detect", name, other)

    def do_detect(self, observer, other):
        node, far = self.nodes[observer], self.nodes[other]
        if not node.up or node.gone:
            return
        fine = self.reach(observer, other) and (other, observer) not in self.blocked
        fine = fine and far.paused_until <= self.now and not far.gone
        self.judge(node, other, fine)

    def judge(self, node, other, fine):
        if fine and other in node.told_down:
            node.told_down.discard(other)
            self.tell(node, ev.Alive(other))
        elif not fine and other not in node.told_down:
            node.told_down.add(other)
            self.tell(node, ev.Suspected(other))

    # The trainer.

    def do_enter(self, name, boot):
        node = self.nodes[name]
        if node.boot != boot or not node.up or node.gone or node.nonce is not None:
            return
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now + 0.01, "enter", name, boot)
            return
        if self.healed and node.state_epoch >= self.heal_epoch + self.plan.epochs_after + 1:
            return
        if node.state_epoch < node.chain.epoch:
            self.catch_up(node)
            self.at(0.3, "enter", name, boot)
            return
        rng = self.rng
        self.nonces += 1
        nonce = self.nonces
        node.nonce = nonce
        node.value = Fraction(rng.randint(-1000, 1000))
        node.weight = rng.randint(1, 50)
        node.active = None
        node.got = {}
        limit = rng.uniform(3.0, 8.0) if self.healed else rng.choice((1.0, 2.5, 5.0))
        node.deadline_s = self.now + limit
        bad = not self.healed and rng.random() < 0.02
        odd = b"other" if rng.random() < 0.03 and self.may_be_odd(node) else b""
        node.odd = bool(odd)
        offer = Offer(node.state_epoch, nonce, float(node.weight), b"layout", node.state + odd)
        self.offers[name, nonce] = (node.state_epoch, node.value, node.weight, node.state + odd, bad)
        self.at(limit + 0.05, "overdue", name, boot, nonce)
        self.tell(node, ev.Enter(offer, node.deadline_s))
        if not self.healed and rng.random() < 0.03:
            self.at(rng.uniform(0.0, 1.0), "withdraw", name, boot, nonce)

    def may_be_odd(self, node):
        """A state that is not the others' is recognised where a quorum has the right one."""
        config = node.chain.config
        others = [one for one in self.nodes.values() if one.odd and one is not node]
        if "leave" in self.plan.kinds:
            return False
        return not self.healed and config is not None and len(config.seats) > 2 and not others

    def do_withdraw(self, name, boot, nonce):
        node = self.nodes[name]
        if node.boot == boot and node.up and node.nonce == nonce and node.paused_until <= self.now:
            node.nonce = None
            self.tell(node, ev.Withdraw())
            self.at(0.2, "enter", name, boot)

    def do_overdue(self, name, boot, nonce):
        node = self.nodes[name]
        if node.boot != boot or not node.up or node.nonce != nonce or node.gone:
            return
        if node.paused_until > self.now or self.now > node.deadline_s + 0.06:
            self.at(max(node.paused_until - self.now, 0.0) + 0.05, "overdue2", name, boot, nonce)
            return
        raise Violation(f"seed {self.seed}: the round of {name} did not end by its deadline")

    def do_overdue2(self, name, boot, nonce):
        node = self.nodes[name]
        if node.boot == boot and node.up and node.nonce == nonce and not node.gone:
            if node.paused_until > self.now:
                self.at(node.paused_until - self.now + 0.05, "overdue2", name, boot, nonce)
                return
            raise Violation(f"seed {self.seed}: the round of {name} did not end by its deadline")

    def catch_up(self, node):
        """State transfer: from anybody who is up and has it."""
        for other in self.nodes.values():
            there = not other.gone and self.reach(node.name, other.name) and other.paused_until <= self.now
            if there and other is not node and other.state_epoch >= node.chain.epoch:
                node.state_epoch, node.state = other.state_epoch, other.state
                node.lagging = False
                return

    def on_committed(self, node, one):
        if one.epoch <= node.last_committed:
            raise Violation(f"seed {self.seed}: {node.name} is told epoch {one.epoch} again")
        if one.value.digest not in node.results:
            raise Violation(f"seed {self.seed}: {node.name} commits bytes it does not hold")
        if self.decided.get(one.epoch, (None,))[0] != (one.value.declaration.key, one.value.digest):
            raise Violation(f"seed {self.seed}: {node.name} commits epoch {one.epoch} that is not on disk")
        node.last_committed = one.epoch
        if one.nonce is not None:
            if one.nonce != node.nonce:
                raise Violation(f"seed {self.seed}: {node.name} is told of a round that is not open")
            node.nonce = None
            self.at(self.rng.random() * 0.1, "enter", node.name, node.boot)
        if node.state_epoch == one.epoch - 1:
            node.state = hashlib.blake2b(node.state + one.value.digest, digest_size=8).digest()
            node.state_epoch = one.epoch
            known = self.states.setdefault(one.epoch, node.state)
            if known != node.state:
                raise Violation(f"seed {self.seed}: two states of epoch {one.epoch}")
        self.at(0.0, "commit_check")

    def do_commit_check(self):
        pass

    def on_failed(self, node, one):
        self.stats["failed"] += 1
        if one.nonce != node.nonce:
            raise Violation(f"seed {self.seed}: {node.name} hears twice of one round")
        node.nonce = None
        self.log(node.name, "failed", repr(one.error))
        self.at(0.1 + self.rng.random() * 0.3, "enter", node.name, node.boot)

    def on_lagging(self, node, one):
        node.lagging = True

    def on_left(self, node, one):
        node.gone = True

    # The data plane.

    def on_reduce(self, node, one):
        node.active = one.declaration
        node.since = self.now
        self.at(self.plan.reduce_s * (0.2 + self.rng.random()), "work", node.name, node.boot, one.declaration)

    def on_abandon(self, node, one):
        if node.active is not None and node.active.ballot == one.ballot:
            node.active = None

    def do_work(self, name, boot, declaration):
        node = self.nodes[name]
        if node.boot != boot or not node.up or node.active is not declaration:
            return
        if node.paused_until > self.now:
            self.at(node.paused_until - self.now + 0.01, "work", name, boot, declaration)
            return
        missing, bad = [], []
        for member in declaration.members:
            key = (member.peer, member.nonce)
            if key in node.got:
                continue
            far = self.nodes[member.peer]
            active = far.active
            there = far.up and far.paused_until <= self.now and active is not None
            if (
                not there
                or active.key != declaration.key
                or (
                    far is not node and ((name, far.name) in self.blocked or (far.name, name) in self.blocked)
                )
            ):
                missing.append(member.peer)
            elif self.offers[far.name, far.nonce][4] if far.nonce is not None else False:
                bad.append(member.peer)
            else:
                node.got[key] = (far.value, far.weight)
        if bad and name not in bad:
            self.tell(node, ev.Stuck(declaration.ballot, frozenset(bad), "nonfinite"))
        elif missing or bad:
            if missing and self.now - node.since > 0.6 + self.plan.reduce_s:
                self.tell(node, ev.Stuck(declaration.ballot, frozenset(missing), "silent"))
        else:
            parts = [node.got[member.peer, member.nonce] for member in declaration.members]
            mean = sum((value * weight for value, weight in parts), Fraction(0)) / sum(w for _, w in parts)
            digest = digest_of(mean)
            node.results[digest] = declaration.epoch
            self.tell(node, ev.Reduced(declaration.ballot, digest))
            return
        self.at(self.plan.reduce_s * (0.3 + self.rng.random()), "work", name, boot, declaration)

    def on_fetch(self, node, one):
        digest = one.value.digest
        known = digest in node.wanted
        node.wanted[digest] = (one.value.declaration.epoch, one.holders)
        if not known:
            self.at(self.plan.delay_s * 2, "fetch", node.name, node.boot, digest)

    def on_release(self, node, one):
        node.wanted.pop(one.digest, None)
        node.results.pop(one.digest, None)

    def do_fetch(self, name, boot, digest):
        node = self.nodes[name]
        if node.boot != boot or not node.up or digest not in node.wanted:
            return
        epoch, holders = node.wanted[digest]
        if node.paused_until <= self.now:
            for holder in holders:
                far = self.nodes.get(holder)
                if far is None or digest not in far.results or far.gone or far.paused_until > self.now:
                    continue
                if self.reach(name, holder) and (holder, name) not in self.blocked:
                    del node.wanted[digest]
                    node.results[digest] = epoch
                    self.tell(node, ev.Held(epoch, digest))
                    return
        self.at(0.3 + self.rng.random() * 0.1, "fetch", name, boot, digest)

    # Faults.

    def schedule_faults(self):
        rng, plan = self.rng, self.plan
        if rng.random() < 0.6:
            self.trap = [rng.choice(KILL_AT), rng.randint(1, 3 * plan.nodes)]
        for _ in range(plan.faults):
            self.at(rng.uniform(0.0, plan.faults_until_s), "fault")
        for _ in range(plan.wrong):
            self.at(rng.uniform(0.0, plan.faults_until_s), "wrong")
        self.at(plan.faults_until_s, "heal")

    def do_wrong(self):
        """Somebody is suspected, or trusted, for no reason."""
        one, other = self.rng.choice(self.names), self.rng.choice(self.names)
        if one != other:
            node = self.nodes[one]
            self.judge(node, other, other in node.told_down)
            self.at(self.rng.uniform(0.2, 1.0), "detect", one, other)

    def do_leave(self, name):
        self.leave(self.nodes[name])

    def do_fault(self):
        rng = self.rng
        node = self.nodes[rng.choice(self.names)]
        kind = rng.choice(self.plan.kinds)
        self.log("fault", kind, node.name)
        if kind in ("crash", "bytes"):
            self.crash(node, rng.uniform(0.1, 3.0), keep_bytes=kind == "crash")
        elif kind == "all" and rng.random() < 0.3:
            for one in list(self.nodes.values()):
                self.crash(one, rng.uniform(0.1, 1.0), keep_bytes=rng.random() < 0.3)
        elif kind == "disk" and self.plan.nodes > 2 and rng.random() < 0.5:
            self.crash(node, rng.uniform(0.1, 2.0), lose_disk=True)
        elif kind == "pause":
            self.pause(node, rng.uniform(0.3, 4.0))
        elif kind == "split":
            side = {name for name in self.names if rng.random() < 0.5}
            pairs = {(a, b) for a in self.names for b in self.names if (a in side) != (b in side)}
            self.block(pairs, rng.uniform(0.3, 3.0))
        elif kind in ("cut", "oneway"):
            other = rng.choice(self.names)
            if other != node.name:
                pairs = {(node.name, other)} | ({(other, node.name)} if kind == "cut" else set())
                self.block(pairs, rng.uniform(0.3, 3.0))
        elif kind == "leave":
            self.leave(node)
        elif kind == "join" and len(self.nodes) < 7:
            self.join(f"j{len(self.nodes)}")
        elif kind == "wrong":
            self.do_wrong()
        elif kind == "trap" and self.trap is None:
            self.trap = [rng.choice(KILL_AT), rng.randint(1, 6)]

    def leave(self, node):
        if sum(not one.gone for one in self.nodes.values()) > 2:
            self.tell(node, ev.Leave())
            self.changed(node.name)

    def join(self, name):
        node = Node(name, founder=False, incarnation=5000 + self.count, state_epoch=-1, state=b"")
        self.nodes[name] = node
        self.names.append(name)
        self.boot(node)

    def pause(self, node, seconds):
        if node.up and not node.gone:
            node.paused_until = self.now + seconds
            self.at(seconds, "resume", node.name, node.boot)
            self.changed(node.name)

    def block(self, pairs, seconds):
        self.blocked |= pairs
        for name in sorted({a for a, _ in pairs}):
            self.changed(name)
        self.at(seconds, "unblock", pairs)

    def do_unblock(self, pairs):
        self.blocked -= pairs
        for name in sorted({a for a, _ in pairs}):
            self.changed(name)

    def do_heal(self):
        self.healed = True
        self.trap = None
        self.blocked = set()
        self.heal_epoch = max(self.decided)
        for node in self.nodes.values():
            if node.paused_until > self.now:
                node.paused_until = self.now
                self.at(0.0, "resume", node.name, node.boot)
            self.at(0.5, "restart", node.name)
        for node in list(self.nodes):
            self.changed(node)
        self.at(1.2, "settle")

    def do_settle(self):
        """The detectors tell the truth by now."""
        for one in self.nodes:
            for other in self.nodes:
                if one != other:
                    self.do_detect(one, other)


def digest_of(mean):
    return hashlib.blake2b(f"{mean.numerator}/{mean.denominator}".encode(), digest_size=16).digest()
