"""The simulated world, and a handful of chains that a test drives by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import agreement_mutations
import agreement_world

from collectives.agreement import events as ev
from collectives.agreement.chain import Chain
from collectives.agreement.types import Offer, Settings, founding


@pytest.fixture
def world():
    return agreement_world


@pytest.fixture
def mutations():
    return {one.__name__: one for one in agreement_mutations.MUTATIONS}


class Table:
    """Chains of one run around a table: messages lie in `post` until the test hands them on."""

    def __init__(self, names="abc", settings=None):
        self.config = founding("run", "outer", names)
        self.ranked = self.config.peers
        self.settings = settings or Settings()
        self.chains = {name: Chain(name, "run", "outer", self.config, self.settings) for name in self.ranked}
        self.post = []  # (sender, receiver, message)
        self.did = {name: [] for name in self.ranked}
        self.saved = {}
        self.now = 0.0
        self.nonces = 0

    def tell(self, name, event):
        out = self.chains[name].handle(event, self.now)
        self.chains[name].validate()
        for one in out:
            if isinstance(one, ev.Send):
                self.post.append((name, one.peer, one.message))
            else:
                self.did[name].append(one)
            if isinstance(one, ev.Persist):
                self.saved[name] = one.saved
        return out

    def enter(self, *names, limit_s=10.0, **more):
        for name in names or self.ranked:
            self.nonces += 1
            epoch = self.chains[name].epoch
            offer = Offer(**{"epoch": epoch, "nonce": self.nonces, "weight": 1.0, "state": b"s", **more})
            self.tell(name, ev.Enter(offer, self.now + limit_s))

    def deliver(self, wanted=lambda sender, receiver, message: True, rounds=50):
        """Hands on what is wanted, again and again, until nothing wanted is left; the rest stays in `post`."""
        for _ in range(rounds):
            now, self.post = self.post, []
            taken = [one for one in now if wanted(*one) and one[1] in self.chains]
            self.post = [one for one in now if one not in taken]
            if not taken:
                return
            for sender, receiver, message in taken:
                self.tell(receiver, ev.Received(sender, message))

    def pass_time(self, seconds, *names):
        """Ticks whoever asked for it."""
        until = self.now + seconds
        while True:
            due = [
                (chain.wake_s, name)
                for name, chain in self.chains.items()
                if (not names or name in names) and chain.wake_s is not None and chain.wake_s <= until
            ]
            if not due:
                break
            wake_s, name = min(due)
            self.now = max(self.now, wake_s)
            self.tell(name, ev.Tick())
        self.now = until

    def run(self, seconds, step_s=0.1):
        """Time passes and everything is handed on."""
        for _ in range(round(seconds / step_s)):
            self.deliver()
            self.pass_time(step_s)
        self.deliver()

    def reduced(self, *names, digest=b"result"):
        for name in names or self.ranked:
            declaration = self.chains[name].declaration
            if declaration is not None:
                self.tell(name, ev.Reduced(declaration.ballot, digest))

    def restart(self, name):
        self.chains[name] = Chain(
            name, "run", "outer", self.config, self.settings, saved=self.saved.get(name)
        )

    def said(self, name, kind):
        return [one for one in self.did[name] if isinstance(one, kind)]

    def committed(self, name):
        return [(one.epoch, one.value.digest, one.nonce is not None) for one in self.said(name, ev.Committed)]


@pytest.fixture
def table():
    return Table
