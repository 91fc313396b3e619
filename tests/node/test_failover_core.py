"""Decisions about broken streams without streams: a world of nodes that die, hang, crawl and wake, under seeds."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from node.serve.failover import (
    Began,
    Broke,
    Came,
    Choose,
    Close,
    Failover,
    GiveUp,
    Join,
    Joined,
    Mended,
    Patience,
    Probe,
    Reported,
    Tick,
    Unmended,
    Waiting,
)
from node.serve.protocol import StageRef, StageReport

LAYERS = ((0, 2), (2, 4), (4, 6), (6, 8))
PROMPT = 5


class World:
    """Four spans, `copies` nodes each; a token takes 4 ms of an able chain. Nodes are up, dead, hung or slow."""

    def __init__(self, seed, copies=3):
        self.chance = random.Random(seed)
        self.state = {f"{a}-{n}": "up" for a, _ in LAYERS for n in range(copies)}
        self.core = Failover(PROMPT, Patience(mend_s=3.0))
        self.now, self.queue, self.order = 0.0, [], itertools.count()
        self.tokens, self.gave_up = 0, ""
        self.stalls, self.last_s = [], 0.0
        chain = self.sought((), frozenset())
        self.tell(Began(chain, 0.02, 0.004))
        self.tell(Waiting())
        self.later(0.004, self.step, 0)

    def later(self, after_s, act, *args):
        heapq.heappush(self.queue, (self.now + after_s, next(self.order), act, args))

    def sought(self, kept, avoid):
        chain = []
        for start, end in LAYERS:
            there = [s for s in kept if s.start == start]
            able = [n for n in self.state if n.startswith(f"{start}-") and n not in avoid]
            able = [n for n in able if self.state[n] != "dead"]
            if not there and not able:
                return None
            chain.append(there[0] if there else StageRef(self.chance.choice(able), start, end))
        return tuple(chain)

    def tell(self, event):
        todo = self.core.handle(event, self.now)
        while todo:
            order = todo.pop(0)
            if isinstance(order, Choose):
                chain = self.sought(order.kept, order.avoid)
                todo += self.core.handle(Mended(chain, 0.01) if chain else Unmended(), self.now)
            elif isinstance(order, Join):
                assert order.epoch == self.core.epoch
                self.later(0.01, self.join, order.epoch)
                self.notice(order.epoch)
            elif isinstance(order, Probe):
                self.later(order.within_s if self.any("hung") else 0.002, self.report, order.epoch)
            elif isinstance(order, GiveUp):
                self.gave_up = order.peer
            else:
                assert isinstance(order, Close)
        self.core.validate()

    def any(self, state):
        return any(self.state[s.peer] == state for s in self.core.chain)

    def notice(self, epoch):
        for stage in self.core.chain:
            if self.state[stage.peer] == "dead":
                self.later(0.003, self.tell, Broke(epoch, stage.peer))

    def join(self, epoch):
        if epoch != self.core.epoch or self.any("dead"):
            return
        if self.any("hung"):
            self.later(0.05, self.join, epoch)
        else:
            self.tell(Joined(epoch))
            self.later(0.004, self.step, epoch)

    def step(self, epoch):
        if epoch != self.core.epoch or self.any("dead"):
            return
        if self.any("hung"):
            self.later(0.05, self.step, epoch)
            return
        self.tokens += 1
        self.stalls.append(self.now - self.last_s)
        self.last_s = self.now
        self.tell(Came(self.tokens))
        self.tell(Waiting())
        self.later(0.9 if self.any("slow") else 0.004, self.step, epoch)

    def report(self, epoch):
        done = PROMPT + self.tokens
        reports = {}
        for at, stage in enumerate(self.core.chain):
            state = self.state[stage.peer]
            busy_s = self.now - self.last_s if state == "slow" else 0.0
            able = state in ("up", "slow")
            reports[at] = StageReport(stage.start, epoch, done, done - 1, busy_s) if able else None
        self.tell(Reported(epoch, reports))

    def change(self):
        """Something happens to a node; nobody who serves a span alone is lost for good."""
        stage = self.chance.choice(self.core.chain)
        self.state[stage.peer] = self.chance.choice(["dead", "hung", "slow", "dead"])
        self.notice(self.core.epoch)
        back = self.chance.uniform(0.2, 2.0)
        self.later(back, self.state.__setitem__, stage.peer, "up")

    def run(self, until_s):
        while self.now < until_s and not self.gave_up:
            at = self.queue[0][0] if self.queue else until_s
            if self.core.wake_s <= at:
                self.now = max(self.now, self.core.wake_s)
                self.tell(Tick())
            elif self.queue:
                self.now, _, act, args = heapq.heappop(self.queue)
                act(*args)
            else:
                self.now = until_s


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_goes_on_whatever_happens_to_its_nodes(seed):
    world = World(seed)
    for number in range(12):
        world.later(0.3 + number * 0.8 * world.chance.random() * 2, world.change)
    world.run(30.0)
    before = world.tokens
    assert not world.gave_up
    world.run(31.0)
    assert world.tokens > before + 50
    assert world.core.epoch >= 3


@pytest.mark.parametrize(("what", "most_s"), [("dead", 0.1), ("hung", 1.0), ("slow", 5.0)])
def test_a_stall_is_short(what, most_s):
    world = World(1)
    world.run(1.0)
    world.state[world.core.chain[2].peer] = what
    world.notice(0)
    world.run(9.0)
    assert world.core.epoch == 1
    assert max(world.stalls) < most_s
    assert world.tokens > 1000


def test_two_that_hang_are_replaced_at_once():
    world = World(2)
    world.run(1.0)
    for at in (0, 3):
        world.state[world.core.chain[at].peer] = "hung"
    world.run(3.0)
    assert world.core.epoch == 1


def test_where_nobody_can_take_a_place_it_ends_in_time_and_names_the_lost():
    world = World(3, copies=1)
    world.run(1.0)
    world.state["4-0"] = "dead"
    world.notice(0)
    world.run(60.0)
    assert world.gave_up == "4-0"
    assert 3.9 < world.now < 4.5


def test_who_comes_back_meanwhile_is_taken():
    world = World(3, copies=1)
    world.run(1.0)
    world.state["4-0"] = "dead"
    world.notice(0)
    world.later(1.5, world.state.__setitem__, "4-0", "up")
    world.run(4.0)
    assert not world.gave_up
    assert world.tokens > 400


def test_what_an_older_chain_says_is_not_heard():
    world = World(4)
    world.run(1.0)
    first = world.core.chain
    world.tell(Broke(0, first[1].peer))
    assert world.core.epoch == 1
    assert first[1] not in world.core.chain
    chain = world.core.chain
    world.tell(Broke(0, chain[2].peer))
    world.tell(Reported(0, dict.fromkeys(range(4))))
    world.tell(Joined(0))
    assert (world.core.epoch, world.core.chain) == (1, chain)


def report(core, **changes):
    """Reports of a chain that is at rest, but for what `changes` says of some stages: {"s1": {...}}."""
    done = PROMPT + core.tokens
    found = {}
    for at, stage in enumerate(core.chain):
        fields = {"epoch": core.epoch, "given": done, "done": done - (at == 3), "busy_s": 0.0}
        found[at] = StageReport(stage.start, **(fields | changes.get(f"s{at}", {})))
    return found


@pytest.mark.parametrize(
    ("changes", "guilty", "times"),
    [
        ({"s2": {"busy_s": 9.0}}, 2, 1),
        ({"s1": {"done": 14}, "s2": {"given": 13}}, 2, 2),
        ({"s3": {"done": 15}}, 3, 2),
        ({"s1": {"epoch": -1}}, 1, 2),
        ({"s0": {"given": 12}, "s3": {"done": 14}}, 3, 2),
    ],
)
def test_reports_name_who_is_at_fault_once_it_is_sure(changes, guilty, times):
    world = World(5)
    world.run(0.05)
    core = world.core
    before = core.chain
    for number in range(times):
        core.wake_s = world.now
        orders = core.handle(Tick(), world.now)
        assert isinstance(orders[0], Probe)
        if changes.get("s0") or changes.get("s3", {}).get("done", 0) == 15:
            core.tokens = 10
        else:
            core.tokens = 9
        orders = core.handle(Reported(0, report(core, **changes)), world.now)
        assert bool(orders) == (number == times - 1)
    assert before[guilty].peer in orders[0].avoid
