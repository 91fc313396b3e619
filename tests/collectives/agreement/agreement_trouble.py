"""The faults of the simulated world: what may go wrong, how often, and how it heals."""

from dataclasses import dataclass

from collectives.agreement import events as ev
from collectives.agreement import messages as ms

KILL_AT = (ms.Ready, ms.Declare, ms.Prepare, ms.Promise, ms.Accept, ms.Voted, ms.Commit, ev.Persist)

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
    fetch_s: float
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
        fetch_s=rng.choice((0.01, 0.1, 0.6)),
        faults_until_s=rng.choice((3.0, 6.0)),
        faults=rng.randint(1, 8),
        wrong=rng.randint(5, 40) if duels else 0,
    )


class Trouble:
    """Of a world: mixed into it."""

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
        node = self.node_type(name, founder=False, incarnation=5000 + self.count, state_epoch=-1, state=b"")
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
