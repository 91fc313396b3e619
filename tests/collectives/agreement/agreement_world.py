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

from agreement_checks import Checks, Violation, digest_of
from agreement_trouble import Trouble, plan_of

from collectives.agreement import chain as chain_module
from collectives.agreement import events as ev
from collectives.agreement.types import Offer, Settings, founding

RUN, TAG = "run", "outer"
SETTINGS = Settings(
    resend_s=0.3, takeover_s=1.0, grace_first_s=0.2, grace_max_s=1.0, hurry_s=0.3, no_quorum_s=2.0
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
    heard: set = field(default_factory=set)  # epochs that it was told the decision of
    known_at: dict = field(default_factory=dict)  # epoch -> when it took the decision for true
    held_at: dict = field(default_factory=dict)  # digest -> since when its bytes are here
    changed_at: float = 0.0  # when its links, or itself, last came, went, stopped or woke
    wake_at: float | None = None
    lagging: bool = False
    odd: bool = False  # offers on a state that nobody else has


class World(Trouble, Checks):
    node_type = Node

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
        self.values = {}  # by epoch
        self.told = {}  # (peer, nonce) -> the error that ended it
        self.states = {0: b"0"}
        self.stats = {
            "commits": 0,
            "failed": 0,
            "handled": 0,
            "counted": 0,
            "counted_behind": 0,
            "counted_unheard": 0,
        }
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

    # Nodes.

    def boot(self, node):
        node.up = True
        node.boot += 1
        node.inbox.clear()
        node.active = None
        node.got = {}
        node.nonce = None
        node.wanted = {}
        node.heard, node.known_at = set(), {}
        node.held_at = dict.fromkeys(node.results, self.now)
        node.told_down = set()
        node.wake_at = None
        node.lagging = False
        config = self.config0 if node.founder else None
        node.chain = self.chain_type(
            node.name, RUN, TAG, config, self.settings, incarnation=node.incarnation, saved=node.disk
        )
        if node.disk is not None or node.chain.config is None:
            others = tuple(name for name in self.nodes if name != node.name)
            self.tell(node, ev.Met(others))
        if node.disk is not None:
            for digest, epoch in sorted(node.results.items()):
                self.tell(node, ev.Held(epoch, digest))
        self.at(self.rng.random() * 0.3, "enter", node.name, node.boot)

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
        if type(event) is ev.Received:
            self.note_heard(node, event.message)
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

    def on_persist(self, node, one):
        saved = one.saved
        if saved.vote is not None and (node.disk is None or node.disk.vote != saved.vote):
            digest = saved.vote.value.digest
            if digest not in node.results:
                raise Violation(f"seed {self.seed}: {node.name} votes for bytes it does not hold")
        if saved.decided is not None and (node.disk is None or node.disk.decided != saved.decided):
            self.check_decided(saved.decided)
            node.known_at[saved.decided.config.epoch] = self.now
        node.disk = saved

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
        self.nodes[name].changed_at = self.now
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
        if rng.random() < 0.2:  # it may get a state that its chain has not heard of
            self.catch_up(node)
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
        """State transfer: from anybody who is up and has it. Everybody hears of it."""
        for other in self.nodes.values():
            if other is not node and other.up and not other.gone and self.reach(node.name, other.name):
                self.tell(other, ev.Coming(node.name, self.rng.choice((0.05, 0.5, 10.0))))
        for other in self.nodes.values():
            there = not other.gone and self.reach(node.name, other.name) and other.paused_until <= self.now
            if there and other is not node and other.state_epoch >= max(node.chain.epoch, node.state_epoch):
                node.state_epoch, node.state = other.state_epoch, other.state
                node.lagging = False
                late_s = self.rng.choice(
                    (0.0, 0.0, 0.1, 1.0)
                )  # a caller may be given its state by other means
                self.do_learn(node.name, other.name, other.chain.decision(), late_s)
                return

    def do_learn(self, name, source, decision, late_s):
        """What is decided comes with a state, surely, if not at once."""
        node = self.nodes[name]
        if late_s > 0 or not node.up or node.paused_until > self.now:
            self.at(late_s or 0.2, "learn", name, source, decision, 0.0)
        else:
            self.tell(node, ev.Received(source, decision))

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
            self.stats["counted"] += 1
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
        self.check_told(node, one)
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
        for digest in [one for one, epoch in node.results.items() if epoch < node.active.epoch]:
            del node.results[digest]  # whoever missed it transfers the state
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
            node.held_at[digest] = self.now
            self.tell(node, ev.Reduced(declaration.ballot, digest))
            return
        self.at(self.plan.reduce_s * (0.3 + self.rng.random()), "work", name, boot, declaration)

    def on_fetch(self, node, one):
        digest = one.value.digest
        known = digest in node.wanted
        node.wanted[digest] = (one.value.declaration.epoch, one.holders)
        if not known:
            self.at(self.plan.fetch_s * (0.5 + self.rng.random()), "fetch", node.name, node.boot, digest)

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
                    node.held_at[digest] = self.now
                    self.tell(node, ev.Held(epoch, digest))
                    return
        self.at(0.3 + self.rng.random() * 0.1, "fetch", name, boot, digest)
