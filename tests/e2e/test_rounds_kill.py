"""Members of a run that are killed and stopped at random instants: nobody forks, nobody lies, everybody comes back."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PEER = Path(__file__).with_name("rounds_peer.py")
ROOT = PEER.parents[2]
POLL_S = 0.01
LATE_S = 0.5  # a busy machine may give a process its turn this late


def pause(seconds=POLL_S):
    """Leave the processor to the members; every use is a poll with a deadline, or chaos keeping its own time."""
    threading.Event().wait(seconds)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Member:
    """A member's processes, one after another, and all that they logged."""

    def __init__(self, index, directory):
        self.index = index
        self.key = str(directory / f"key-{index}")
        self.log_path = directory / f"log-{index}"
        self.journal = str(directory / f"journal-{index}")
        self.pid = None
        self.stopped_at = None
        self.due_s = None
        self.naps = []  # (from, to) of each stop; clocks are the machine's, the same for all
        self.entries = []
        self._read = 0

    @property
    def up(self):
        return self.pid is not None and self.stopped_at is None

    @property
    def entered(self):
        return max((one["epoch"] for one in self.entries if one["what"] == "enters"), default=0)

    @property
    def epoch(self):
        return max((one["epoch"] for one in self.entries if one["what"] in ("commit", "fetched")), default=0)

    def look(self):
        """Read what is new in the log; a line torn by a kill is skipped."""
        if not self.log_path.exists():
            return
        with self.log_path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read += whole
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError):
                self.entries.append(json.loads(line))


class Oracle:
    """A run of `count` members over `rounds` epochs, and the chaos that befalls it."""

    def __init__(
        self, directory, count, rounds, *, deadline_s=20.0, seed=1, level="WARNING", sizes=None, think_s=0.1
    ):
        """`sizes`: of other tensors than the small ones whose mean is checked."""
        self.rng = random.Random(seed)
        self.rounds = rounds
        self.deadline_s = deadline_s
        self.level = level
        self.sizes, self.think_s = sizes, think_s
        self.members = [Member(index, directory) for index in range(count)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.zygote = subprocess.Popen(
            [sys.executable, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=environment, cwd=directory,
        )  # fmt: skip
        self.hear()
        self.peers = self.order(peer_of=[member.key for member in self.members])["peers"]
        self.ports = dict(zip(self.peers, free_ports(count), strict=True))
        self.faults = defaultdict(int)
        self.coordinators_hit = 0

    def hear(self):
        line = self.zygote.stdout.readline()
        assert line, "the zygote ended"
        return json.loads(line)

    def order(self, **what):
        self.zygote.stdin.write(json.dumps(what) + "\n")
        return self.hear()

    def spawn(self, member, rejoin=False):
        member.pid = self.order(
            log=str(member.log_path), key=member.key, journal=member.journal, port=self.ports[self.peers[member.index]],
            ports=self.ports, founders=self.peers, rounds=self.rounds, deadline_s=self.deadline_s, rejoin=rejoin,
            peers_min=1 if rejoin else len(self.members) - 1, linger_s=3600.0, level=self.level,
            think_s=self.think_s, sizes=self.sizes, check=self.sizes is None,
            settings={"members_min": len(self.members) // 2 + 1},
        )["pid"]  # fmt: skip

    def signal(self, member, number):
        os.kill(member.pid, number)

    def kill(self, member):
        self.signal(member, signal.SIGKILL)
        self.order(reap=member.pid)
        member.pid = member.stopped_at = None

    def stop(self, member):
        self.signal(member, signal.SIGSTOP)
        member.stopped_at = time.monotonic()

    def wake(self, member):
        member.naps.append((member.stopped_at, time.monotonic()))
        member.stopped_at = None
        self.signal(member, signal.SIGCONT)

    def look(self):
        """The newest epoch anybody has committed."""
        for member in self.members:
            member.look()
        return max(member.epoch for member in self.members)

    def wait(self, condition, wait_s, why):
        end_s = time.monotonic() + wait_s
        while not condition(self.look()):
            if time.monotonic() > end_s:
                pytest.fail(f"not within {wait_s:g} s: {why}\n{self.tails()}")
            pause()

    def run(self, fault_share, wait_s):
        """Until every member has all epochs; chaos in `fault_share` of them."""
        for member in self.members:
            self.spawn(member)
        end_s = time.monotonic() + wait_s
        before, began_s, typical_s = 0, time.monotonic(), 0.5
        pending = None
        while True:
            epoch = self.look()
            now_s = time.monotonic()
            if epoch > before:
                typical_s += 0.2 * (min(now_s - began_s, 1.0) / (epoch - before) - typical_s)
                before, began_s = epoch, now_s
                if 0 < epoch < self.rounds - 2 and self.rng.random() < fault_share:
                    pending = now_s + self.rng.uniform(0, typical_s)
            if pending is not None and now_s >= pending:
                pending = None
                self.strike(now_s)
            self.revive(now_s, everybody=epoch >= self.rounds)
            if all(member.up and member.epoch >= self.rounds for member in self.members):
                return
            if now_s > end_s:
                pytest.fail(
                    f"after {wait_s:g} s: epochs {[member.epoch for member in self.members]}\n{self.tails()}"
                )
            pause()

    def strike(self, now_s):
        up = [member for member in self.members if member.up]
        if len(up) <= len(self.members) // 2 + 1:
            return
        newest = self.newest()
        first = self.members[self.peers.index(newest["first"])]
        # Whoever decided the last epoch holds it; more than half of those must live on, or its bytes are gone for good.
        seated = [self.members[self.peers.index(peer)] for peer in newest["members"]]
        if 2 * (sum(member in up for member in seated) - 1) <= len(seated):
            return
        victim = first if first in up and self.rng.random() < 0.4 else self.rng.choice(up)
        self.coordinators_hit += victim is first
        if self.rng.random() < 0.5:
            self.kill(victim)
            self.faults["kill"] += 1
            victim.due_s = now_s + self.rng.uniform(0.05, 0.8)
        else:
            self.stop(victim)
            self.faults["stop"] += 1
            victim.due_s = now_s + self.rng.choice([self.rng.uniform(0.05, 0.5), self.rng.uniform(1.0, 4.0)])

    def newest(self, epoch=None):
        """The entry of the newest commit, or of that of `epoch`."""
        found = (one for member in self.members for one in member.entries if one["what"] == "commit")
        return max((one for one in found if epoch in (None, one["epoch"])), key=lambda one: one["epoch"])

    def revive(self, now_s, everybody):
        for member in self.members:
            if member.due_s is not None and (now_s >= member.due_s or everybody):
                member.due_s = None
                if member.stopped_at is not None:
                    self.wake(member)
                else:
                    self.spawn(member, rejoin=True)

    def commits(self, member, epoch=None):
        """What `member` committed with all others there, or in `epoch`: entries with their times."""
        everybody = len(self.members)
        return [
            one for one in member.entries
            if one["what"] == "commit" and "began" in one
            and (one["epoch"] == epoch if epoch is not None else len(one["members"]) == everybody)
        ]  # fmt: skip

    def hit(self, victim, kill):
        """Kill or stop `victim` in the midst of a round. Seconds until the first of the others suspected it, until the
        last did or had the round's result without it, by how much the round took longer than usual, and until it was
        a member again. None where it had done its part before."""
        took = sorted(one["took_s"] for member in self.members for one in self.commits(member)[-5:])
        usual_s = took[len(took) // 2]
        epoch = self.look() + 1
        self.wait(lambda _: all(one.entered >= epoch for one in self.members), 30, "everybody's round")
        pause(self.rng.uniform(0.1, 0.9) * usual_s)
        struck_s, since_s, peer = time.monotonic(), time.time(), self.peers[victim.index]
        (self.kill if kill else self.stop)(victim)
        others = [member for member in self.members if member is not victim]
        self.wait(lambda _: all(one.epoch >= epoch for one in others), 30, "the round without it")
        found = None
        ends = [(one, end) for one in others for end in self.commits(one, epoch)]
        if len(ends) == len(others) and peer not in ends[0][1]["members"]:
            suspected = [self.suspected_s(one, peer, since_s) for one, _ in ends]
            over = [end["began"] + end["took_s"] - struck_s for _, end in ends]
            known = max(min(pair) for pair in zip(suspected, over, strict=True))
            found = min(suspected), known, max(end["took_s"] for _, end in ends) - usual_s
        if kill:
            self.spawn(victim, rejoin=True)
        else:
            self.wake(victim)
        since, back_s = self.look(), time.monotonic()
        self.wait(
            lambda _: all(self.commits(one) and self.commits(one)[-1]["epoch"] > since for one in self.members),
            60, "a round of all after its return",
        )  # fmt: skip
        return None if found is None else (*found, time.monotonic() - back_s)

    def suspected_s(self, member, peer, since_s):
        """How long after `since_s` its log says that `member` suspected `peer`; infinity if it does not."""
        for line in Path(str(member.log_path) + ".err").read_text().splitlines():
            when, _, text = line.partition(" ")
            if text == f"shoal.collectives {peer} is suspected" and float(when) >= since_s - 0.001:
                return float(when) - since_s
        return math.inf

    def tails(self):
        lines = []
        for member in self.members:
            lines.append(
                f"-- {member.index} {self.peers[member.index]} pid {member.pid} stopped {member.stopped_at}"
            )
            lines += [str(one) for one in member.entries[-4:]]
            error = Path(str(member.log_path) + ".err")
            if error.exists():
                lines += error.read_text()[-1500:].splitlines()
        return "\n".join(lines)

    def close(self):
        for member in self.members:
            if member.pid:
                with contextlib.suppress(ProcessLookupError):
                    self.signal(member, signal.SIGCONT)
                self.kill(member)
        self.zygote.stdin.close()
        self.zygote.wait(10)
        self.zygote.stdout.close()

    # What must hold.

    def check(self):
        """Figures of the run, after everything was found to be true."""
        by_epoch = defaultdict(list)
        for member in self.members:
            for one in member.entries:
                if one["what"] == "commit":
                    by_epoch[one["epoch"]].append((self.peers[member.index], one))
        assert set(by_epoch) == set(range(1, self.rounds + 1)), "an epoch that nobody saw"
        for epoch, seen in by_epoch.items():
            for key in ("digest", "state", "members"):
                assert len({json.dumps(one[key]) for _, one in seen}) == 1, f"epoch {epoch} forked: {key}"
            assert all(one["exact"] for _, one in seen), f"epoch {epoch} is not the mean of its members"
            assert {peer for peer, one in seen if one["own"]} <= set(seen[0][1]["members"]), epoch
        states = {epoch: seen[0][1]["state"] for epoch, seen in by_epoch.items()}
        fetched = [one for member in self.members for one in member.entries if one["what"] == "fetched"]
        for one in fetched:
            assert one["epoch"] == 0 or one["state"] == states[one["epoch"]], (
                "a state that was never committed"
            )
        for member in self.members:
            last = [one for one in member.entries if one["what"] in ("commit", "fetched")][-1]
            assert (last["epoch"], last["state"]) == (self.rounds, states[self.rounds]), (
                "not the same at the end"
            )
        took = sorted(one["took_s"] for seen in by_epoch.values() for _, one in seen if one["own"])
        return {
            "rounds": self.rounds,
            "faults": dict(self.faults),
            "coordinators_hit": self.coordinators_hit,
            "failed_attempts": sum(
                one["what"] == "failed" for member in self.members for one in member.entries
            ),
            "rejoins": len(fetched),
            "zombies": self.zombies(by_epoch),
            "round_median_s": took[len(took) // 2],
            "round_p99_s": took[len(took) * 99 // 100],
            "attempt_max_s": max(one["took_s"] for one in self.attempts()),
            "deadline_s": self.deadline_s,
            "latest_end_s": self.latest_end(),
            "members": dict(
                sorted(Counter(len(seen[0][1]["members"]) for seen in by_epoch.values()).items())
            ),
        }

    def attempts(self):
        return [one for member in self.members for one in member.entries if "began" in one]

    def latest_end(self):
        """How long after its deadline (before: negative), or after it woke up later, the latest attempt ended."""
        latest = -math.inf
        for member in self.members:
            for one in member.entries:
                if "began" in one:
                    due_s = one["began"] + self.deadline_s
                    end_s = one["began"] + one["took_s"]
                    awake_s = [end for begin, end in member.naps if begin <= due_s <= end <= end_s]
                    latest = max(latest, end_s - max([due_s, *awake_s]))
        return latest

    def zombies(self, by_epoch):
        """How many woke up after an epoch was committed without them: all that each said of it agrees with the others,
        and it was no member whose attempt it is. (That values agree is checked by epoch.)"""
        found = 0
        for member in self.members:
            peer = self.peers[member.index]
            for begin, end in member.naps:
                passed = {
                    epoch
                    for epoch, seen in by_epoch.items()
                    if any(other != peer and begin < one["at"] < end for other, one in seen)
                }
                without = {epoch for epoch in passed if peer not in by_epoch[epoch][0][1]["members"]}
                found += bool(without)
                for one in member.entries:
                    if one["what"] == "commit" and one["epoch"] in without:
                        assert not one["own"], f"a zombie committed epoch {one['epoch']}"
        return found


@pytest.fixture
def oracle(tmp_path):
    made = []

    def make(*args, **more):
        made.append(Oracle(tmp_path, *args, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_members_that_are_killed_and_stopped_never_fork_a_run(oracle):
    run = oracle(4, 30, deadline_s=8.0, seed=3)
    run.run(fault_share=0.35, wait_s=90)
    found = run.check()
    assert sum(found["faults"].values()) >= 3
    assert found["latest_end_s"] < LATE_S


@pytest.mark.slow
def test_coordinators_that_wake_up_after_their_epoch_has_passed_commit_nothing(oracle):
    run = oracle(4, 1_000_000, deadline_s=20.0, seed=1)
    for member in run.members:
        run.spawn(member)
    shut_out = 0
    for _ in range(3):
        run.wait(
            lambda epoch: epoch > 0 and all(one.epoch >= epoch - 1 for one in run.members), 60, "a round"
        )
        newest = run.newest()
        zombie = run.members[run.peers.index(newest["first"])]
        passed = newest["epoch"] + 1
        run.wait(lambda epoch, z=zombie, e=passed: z.entered >= e, 30, "the coordinator's next round")
        run.stop(zombie)
        run.wait(lambda epoch, e=passed: epoch >= e + 2, 30, "rounds without it")
        known = len(zombie.entries)
        members = run.newest(passed)["members"]
        run.wake(zombie)
        run.wait(lambda epoch, z=zombie, e=passed: z.epoch >= epoch - 1 > e, 30, "the zombie's return")
        said = [one for one in zombie.entries[known:] if one["what"] == "commit" and one["epoch"] == passed]
        assert all(one["digest"] == run.newest(passed)["digest"] for one in said)
        if run.peers[zombie.index] not in members:
            shut_out += 1
            assert not any(one["own"] for one in said)
    assert shut_out > 0, "no epoch went on without its coordinator"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "detect_s", "added_s"), [("kill", 0.5, 1.0), ("stop", 2.0, 2.5)])
def test_a_death_amid_a_round_is_noticed_and_costs_little(oracle, kind, detect_s, added_s):
    """Medians over twelve hits of random members, coordinators among them, at random instants of rounds over 16 MiB
    that follow at once. SHOAL_ORACLE_SEED makes it another run."""
    seed = int(os.environ.get("SHOAL_ORACLE_SEED", "5"))
    run = oracle(4, 1_000_000, deadline_s=30.0, seed=seed, level="INFO", sizes=[4 << 20])
    for member in run.members:
        run.spawn(member)
    run.wait(lambda _: all(len(run.commits(one)) >= 5 for one in run.members), 60, "the first rounds")
    hits = []
    tries = 0
    while len(hits) < 12 and tries < 60:
        tries += 1
        found = run.hit(run.rng.choice(run.members), kind == "kill")
        hits += [] if found is None else [found]
    assert len(hits) == 12
    names = ("suspected_s", "known_s", "added_s", "back_s")
    figures = {
        name: {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}
        for name, values in zip(names, zip(*hits, strict=True), strict=True)
    }
    took = sorted(one["took_s"] for member in run.members for one in run.commits(member))
    print(
        json.dumps(
            {"what": kind, "hits": len(hits), "tries": tries, "round_median_s": took[len(took) // 2]}
            | figures
        )
    )
    assert figures["known_s"]["median"] < detect_s
    assert figures["added_s"]["median"] < added_s


@pytest.mark.slow
def test_five_hundred_rounds_of_eight_members_under_fire(oracle):
    """Takes some four minutes on two cores. SHOAL_ORACLE_ROUNDS and SHOAL_ORACLE_SEED make it another run."""
    rounds = int(os.environ.get("SHOAL_ORACLE_ROUNDS", "500"))
    run = oracle(8, rounds, deadline_s=10.0, seed=int(os.environ.get("SHOAL_ORACLE_SEED", "7")))
    run.run(fault_share=0.34, wait_s=3600)
    found = run.check()
    print(json.dumps(found))
    assert found["latest_end_s"] < LATE_S
    assert rounds < 100 or min(found["zombies"], found["coordinators_hit"], *found["faults"].values()) > 0
