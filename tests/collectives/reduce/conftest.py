"""A mesh of exchanges in one thread, and declarations for them."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from collectives.agreement import Ballot, Declaration, Member
from collectives.reduce import Exchange, weighted_mean
from collectives.reduce.layout import Layout, Vector
from collectives.reduce.settings import DEFAULTS

torch.set_num_threads(1)


def declare(members, *, codec="fp32", number=0):
    """A declaration of members given as names, (name, weight) pairs or Members."""
    full = []
    for one in members:
        if isinstance(one, str):
            one = (one, 1.0)
        if isinstance(one, tuple):
            one = Member(one[0], 0, sum(one[0].encode()) + 7, float(one[1]))
        full.append(one)
    seed = bytes([number]) + ",".join(m.peer for m in full).encode().ljust(31, b"\0")[:31]
    return Declaration("run", "tag", 1, Ballot(number, full[0].peer), tuple(full), codec, b"", seed)


def without(declaration, *gone):
    left = [m for m in declaration.members if m.peer not in gone]
    return declare(left, codec=declaration.codec, number=declaration.ballot.number + 1)


class Mesh:
    """Links are FIFO queues of copied frames. `step` moves one frame, chosen by `rng`."""

    def __init__(self, tensors, declaration, settings=DEFAULTS, seed=None):
        self.tensors = tensors
        self.rng = random.Random(seed) if seed is not None else None
        self.nodes = {
            m.peer: Exchange(m.peer, tensors[m.peer], declaration, settings) for m in declaration.members
        }
        self.queues = {(a, b): [] for a in self.nodes for b in self.nodes if a != b}
        self.dead = set()
        self.frames = 0
        self.tamper = None

    def live(self):
        return [name for name in self.nodes if name not in self.dead]

    def kill(self, name):
        self.dead.add(name)
        for pair in self.queues:
            if name in pair:
                self.queues[pair].clear()
        for other in self.live():
            self.nodes[other].dropped(name)

    def send(self, a, b):
        """Asks a for its next frame for b; whether there was one."""
        if a in self.dead or b in self.dead or b not in self.nodes[a].peers:
            return False
        frame = self.nodes[a].next_frame(b)
        if frame is None:
            return False
        payload = b"".join(bytes(part) for part in frame.payload)
        assert len(payload) == frame.payload_bytes
        item = (frame.header, payload)
        if self.tamper is not None:
            item = self.tamper(a, b, frame, item)
        if item is not None:
            self.queues[a, b].append(item)
        return True

    def deliver(self, a, b):
        queue = self.queues[a, b]
        if not queue or a in self.dead or b in self.dead or not self.nodes[b].wants_frames(a):
            return False
        header, payload = queue.pop(0)
        node = self.nodes[b]
        buffer = node.buffer_for(a, header, len(payload))
        buffer[:] = payload
        node.arrived(a, header, buffer)
        self.frames += 1
        return True

    def step(self):
        """One send or delivery; whether anything could be done."""
        pairs = list(self.queues)
        if self.rng is not None:
            self.rng.shuffle(pairs)
        for a, b in pairs:
            first, second = (self.deliver, self.send)
            if self.rng is not None and self.rng.random() < 0.5:
                first, second = second, first
            if first(a, b) or second(a, b):
                return True
        return False

    def run(self, steps=None):
        while steps is None or steps > 0:
            if not self.step():
                return False
            if steps is not None:
                steps -= 1
        return True

    def rebase(self, declaration):
        for name in self.live():
            if declaration.member(name) is not None:
                self.nodes[name].rebase(declaration)


def reference(groups):
    """The weighted mean as its definition reads, in plain numpy: groups of (weight, values)."""
    sums = []
    for group in groups:
        terms = [np.float32(weight) * values for weight, values in group if weight > 0]
        if terms:
            acc = terms[0]
            for term in terms[1:]:
                acc = acc + term
            sums.append(acc)
    if not sums:
        return np.zeros_like(groups[0][0][1])
    acc = sums[0]
    for term in sums[1:]:
        acc = acc + term
    return acc / np.float32(math.fsum(weight for group in groups for weight, _ in group))


def expected(tensors, declaration, plan=None, codec=None):
    """The definition, applied to whole vectors: flat, or grouped as the plan groups."""
    layout = Layout.of(tensors[declaration.members[0].peer])
    vectors = {
        m.peer: Vector(layout, tensors[m.peer]).read(0, layout.elements).copy() for m in declaration.members
    }
    units = plan.units if plan is not None else [(n,) for n in range(len(declaration.members))]
    groups = [
        [(declaration.members[n].weight, vectors[declaration.members[n].peer]) for n in unit]
        for unit in units
    ]
    mean = reference(groups)
    assert weighted_mean(groups).tobytes() == mean.tobytes()
    out = layout.empty()
    Vector(layout, out).write(0, mean)
    return out


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(declare=declare, without=without, Mesh=Mesh, expected=expected)
