"""Runs among members of one process: joined, left by death, begun anew, exported; all who are in a round agree."""

import itertools
import json
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import trio

from collectives.checkpoint import CopyService, Pantry
from node.train import driver
from node.train import session as sessions
from node.train.pack import Pack, read_pack, write_pack
from node.train.recipe import read_recipe
from node.train.session import Ground, Memory, Session
from node.train.worker import Worker
from p2p import Links, Rpc
from p2p.testing import MemoryNetwork

RUN = "ab" * 32
VALUES = {
    "name": "tiny",
    "model": {"layers": 1, "hidden": 16, "heads": 2, "context": 32},
    "data": {"files": "text.txt", "sequence": 8},
    "train": {"steps": 2000, "batch": 2, "warmup": 2},
    "outer": {"inner_steps": 2},
    "checkpoints": {"every_rounds": 1},
    "evaluation": {"every_rounds": 5, "sequences": 4},
}


class Mates:
    """Members on one memory network, who tell of themselves on a common board."""

    def __init__(self, nursery, folder, values):
        self.nursery, self.folder = nursery, folder
        self.network = MemoryNetwork()
        self.board, self.scopes, self.changed = {}, {}, trio.Event()
        self.hosts = {}
        (folder / "text.txt").write_text("the quick brown fish swims over the lazy shoal. " * 60)
        self.recipe = read_recipe(values, folder)
        self.pack = write_pack(self.recipe, folder / "cache", folder / "pack")

    async def change(self):
        with trio.move_on_after(0.1):
            await self.changed.wait()

    def say(self, me, run, advert):
        if advert is None:
            self.board.pop(me, None)
        else:
            self.board[me] = advert
        self.changed.set()
        self.changed = trio.Event()

    def others(self, me, run):
        return {peer: advert for peer, advert in self.board.items() if peer != me}

    async def fetch(self, manifest_id):
        await trio.lowlevel.checkpoint()
        return self.pack

    async def start(self, name, made=None, memory=None):
        """A session of the member of that name; with `made` it begins the run."""
        host = self.hosts[name] = self.network.host(name)
        await self.network.connect_all()
        return await self.nursery.start(self._live, name, host, made, memory)

    async def found(self, name):
        packed = read_pack(self.pack)
        return await self.start(name, Pack(self.recipe, packed.values, packed.corpus))

    async def _live(self, name, host, made, memory, *, task_status):
        rpc = Rpc(host)
        links = Links(host, rpc, host.identity)
        me = str(host.peer_id)
        copies = CopyService(rpc, host.identity, Pantry(self.folder / name / "pieces"))
        ground = Ground(
            host, rpc, links, host.identity, copies, partial(self.others, me), partial(self.say, me), self.fetch,
            self.change,
        )  # fmt: skip
        session = Session(ground, self.folder / name, memory or Memory(RUN, "tiny"), made)
        with trio.CancelScope() as self.scopes[name]:
            async with trio.open_nursery() as nursery:
                await nursery.start(rpc.run)
                await nursery.start(links.run)
                session.remember()
                task_status.started(session)
                await session.run()
                nursery.cancel_scope.cancel()

    def kill(self, name):
        """As a killed process ends, but for what it still writes on its way out."""
        self.network.kill(self.hosts[name].peer_id)
        self.scopes[name].cancel()
        self.board.pop(str(self.hosts[name].peer_id), None)

    async def until(self, condition, within_s=30):
        with trio.fail_after(within_s):
            while not condition():
                await self.change()

    def rounds(self, name):
        path = self.folder / name / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {(e["generation"], e["tag"], e["epoch"]): e for e in map(json.loads, lines)}


@pytest.fixture
async def mates(nursery, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sessions, "SETTLE_S", 0.6)
    monkeypatch.setattr(sessions, "TELL_S", 0.1)
    monkeypatch.setattr(driver, "ORPHAN_S", 0.2)
    monkeypatch.setattr(sessions, "SETTINGS", replace(sessions.SETTINGS, no_quorum_s=0.5))
    return partial(Mates, nursery, tmp_path)


def agree(*logs):
    """In how many rounds several took part; the state after each is one."""
    shared = 0
    for key in set(itertools.chain(*logs)):
        states = {log[key]["state_sha256"] for log in logs if key in log}
        assert len(states) == 1, key
        shared += sum(key in log for log in logs) > 1
    return shared


async def test_a_newcomer_takes_part_and_all_have_the_same_state(mates):
    mates = mates(VALUES)
    first = await mates.found("a")
    await mates.until(lambda: first.progress.rounds >= 2)
    began = first.epoch
    second = await mates.start("b")
    await mates.until(lambda: second.progress.rounds >= 3 and len(first.progress.members) == 2)
    await mates.until(lambda: min(first.epoch, second.epoch) >= began + 6)
    assert agree(mates.rounds("a"), mates.rounds("b")) >= 3
    claims = {advert.claim for advert in mates.board.values()}
    assert len(claims) == 2
    first.stop()
    await first.finished.wait()
    epoch = second.epoch
    await mates.until(lambda: second.epoch > epoch + 2)
    assert second.life.number == 1  # who leaves resigns: nobody has to begin anew without it
    assert first.state == "resting"
    second.stop()
    await second.finished.wait()


async def test_a_run_that_is_done_has_one_model_everywhere(mates, tmp_path):
    mates = mates({**VALUES, "train": {"steps": 24, "batch": 2, "warmup": 2}, "members": {"minimum": 2}})
    first = await mates.found("a")
    second = await mates.start("b")
    await first.finished.wait()
    await second.finished.wait()
    assert (first.state, second.state) == ("done", "done"), (first.problem, second.problem)
    assert first.epoch == second.epoch == 12
    assert agree(mates.rounds("a"), mates.rounds("b")) >= 10
    one, two = (s.export(tmp_path / f"out-{k}") for k, s in enumerate((first, second)))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


async def test_all_die_and_those_who_come_back_go_on_from_their_disks(mates):
    mates = mates(VALUES)
    first = await mates.found("a")
    second = await mates.start("b")
    await mates.until(lambda: first.progress.rounds >= 3 and second.progress.rounds >= 3)
    mates.kill("a")
    mates.kill("b")
    await first.finished.wait()
    await second.finished.wait()
    last = max(epoch for name in "ab" for _, _, epoch in mates.rounds(name))
    back = await mates.start("b", memory=Memory(RUN, "tiny", generation=1))
    await mates.until(lambda: back.progress.rounds >= 2)
    assert back.life.number == 2
    assert back.epoch >= last
    back.stop()
    await back.finished.wait()


async def test_a_run_that_died_before_its_first_round_begins_again(mates, tmp_path):
    mates = mates({**VALUES, "members": {"minimum": 2}})
    first = await mates.found("a")
    await mates.until(lambda: any(path.suffix != ".new" for path in (tmp_path / "a" / "state").glob("0*")))
    mates.kill("a")
    await first.finished.wait()
    back = await mates.start("a", memory=Memory(RUN, "tiny", generation=1))
    await mates.until(lambda: back.state == "training")
    assert (back.life.number, back.epoch) == (2, 0)
    back.stop()
    await back.finished.wait()


async def test_a_disk_that_was_lost_is_made_up_for_by_peers_pieces(mates, tmp_path):
    mates = mates(VALUES)
    first = await mates.found("a")
    second = await mates.start("b")
    await mates.until(lambda: second.progress.rounds >= 3 and second.ground.copies.pantry.held(RUN))
    mates.kill("a")
    mates.kill("b")
    await first.finished.wait()
    await second.finished.wait()
    held = Pantry(tmp_path / "b" / "pieces").held(RUN)[0].description
    for path in (tmp_path / "b" / "state").iterdir():
        path.rename(tmp_path / path.name)
    back = await mates.start("b", memory=Memory(RUN, "tiny", generation=1))
    await mates.until(lambda: back.progress.rounds >= 1)
    assert held.k == 1
    assert back.epoch > held.epoch
    back.stop()
    await back.finished.wait()


class UnevenWorker(Worker):
    """The second one to come takes ten times as long for a step."""

    def step(self, clock):
        report = super().step(clock)
        wait_s = 0.002 if self.claim == 0 else 0.02
        threading.Event().wait(wait_s)
        return replace(report, took_s=report.took_s + wait_s)


async def test_a_slow_one_does_fewer_steps_and_holds_nobody_up(mates, monkeypatch):
    monkeypatch.setattr(sessions, "Worker", UnevenWorker)
    mates = mates({**VALUES, "outer": {"inner_steps": 2, "budget_s": 0.3}, "members": {"minimum": 2}})
    fast, slow = await mates.found("a"), await mates.start("b")

    def together_of(rounds):
        return [entry for _, entry in sorted(rounds.items()) if len(entry["members"]) == 2]

    await mates.until(lambda: len(together_of(mates.rounds("a"))) >= 7)
    together = together_of(mates.rounds("a"))
    fast.stop()
    slow.stop()
    await fast.finished.wait()
    await slow.finished.wait()
    assert fast.progress.tokens > 2 * slow.progress.tokens
    assert (
        together[-1]["computing"] > 0.5
    )  # with as many steps for both it would wait nine tenths of the time


async def test_what_is_always_too_late_for_its_round_is_part_of_a_later_one(mates, monkeypatch):
    monkeypatch.setattr(sessions, "Worker", UnevenWorker)
    mates = mates({**VALUES, "outer": {"inner_steps": 10}})
    fast, slow = await mates.found("a"), await mates.start("b")

    def both_took_part():
        return any(len(entry["members"]) == 2 for entry in mates.rounds("b").values())

    await mates.until(lambda: slow.progress.rounds >= 3 and both_took_part())
    fast.stop()
    slow.stop()
    await fast.finished.wait()
    await slow.finished.wait()
    assert agree(mates.rounds("a"), mates.rounds("b")) >= 2


async def test_fragments_travel_apart_and_are_alike_at_all_members(mates):
    outer = {"strategy": "streaming", "inner_steps": 4, "delay": 1, "fragments": 2, "budget_s": 0.4}
    model = {**VALUES["model"], "layers": 2}
    mates = mates({**VALUES, "model": model, "outer": outer, "members": {"minimum": 2}})
    both = [await mates.found("a"), await mates.start("b")]
    await mates.until(lambda: all(one.progress.rounds >= 8 for one in both))
    for one in both:
        one.stop()
        await one.finished.wait()
    logs = [mates.rounds(name) for name in "ab"]
    assert {tag for _, tag, _ in logs[0]} == {"fragment-0", "fragment-1"}
    assert agree(*logs) >= 6
    assert sum(len(entry["members"]) == 2 for entry in logs[0].values()) >= 6


@pytest.mark.parametrize(("dies", "stays"), ["ab", "ba"])
async def test_the_last_survivor_goes_on_whoever_of_the_two_it_is(mates, dies, stays):
    mates = mates(VALUES)
    both = {"a": await mates.found("a"), "b": await mates.start("b")}
    await mates.until(lambda: all(len(s.progress.members) == 2 for s in both.values()))
    mates.kill(dies)
    epoch = both[stays].epoch
    await mates.until(lambda: both[stays].epoch > epoch + 4)
    await both[dies].finished.wait()
    assert agree(mates.rounds("a"), mates.rounds("b")) >= 1
    both[stays].stop()
    await both[stays].finished.wait()


async def test_what_cannot_be_trained_fails_alone_and_says_why(mates, tmp_path):
    mates = mates(VALUES)
    (mates.pack / "run.json").write_text("{}")
    session = await mates.start("b")
    await session.finished.wait()
    assert session.state == "failed"
    assert "run.json" in session.problem
    assert not json.loads((tmp_path / "b" / "session.json").read_text())["active"]
