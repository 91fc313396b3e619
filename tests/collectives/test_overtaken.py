"""Rounds that follow at once, and a member whose transfer of the state takes longer than one of them."""

import pytest
import torch
import trio

from collectives import RoundFailed, RunConfig, Settings
from collectives.state_rpc import StateServer

STATE = torch.zeros(1000)


@pytest.fixture
def slow_states(monkeypatch):
    """Chunks of states take `seconds[0]` to come."""
    seconds = [0.0]
    chunk = StateServer._chunk

    async def slow(self, call, ask):
        await trio.sleep(seconds[0])
        return await chunk(self, call, ask)

    monkeypatch.setattr(StateServer, "_chunk", slow)
    return seconds


class Trainer:
    """Round after round; whoever is behind fetches the state."""

    def __init__(self, run, reduce, think_s):
        self.run, self.reduce, self.think_s = run, reduce, think_s
        self.results = []
        self.fetched = 0
        self.arrived = trio.Event()

    async def train(self):
        while True:
            try:
                await trio.sleep(self.think_s)
                result = await self.reduce(self.run, [torch.ones(100)])
            except RoundFailed:
                await self.run.fetch_state(deadline_s=30.0)
                self.fetched += 1
            else:
                self.results.append(result)
                await self.run.publish({"w": STATE + result.epoch})
                if len(self.results) == 5:
                    self.arrived.set()


@pytest.mark.parametrize("transfer_s", [0.1, 0.35, 1.5])
async def test_whoever_is_overtaken_by_rounds_is_let_in(
    autojump_clock, members, nursery, reduce, slow_states, transfer_s
):
    settings = Settings(members_min=2)
    runs = await members.start("a", "b", "c", config=RunConfig(agreement=settings))
    trainers = [Trainer(run, reduce, 0.05) for run in runs]
    for one in trainers:
        nursery.start_soon(one.train)
    await trio.sleep(3.0)
    before = len(trainers[0].results)
    round_s = 3.0 / before
    assert round_s < 0.1, "the rounds are quicker than any of the transfers"
    slow_states[0] = transfer_s
    joiner = Trainer(await members.join("d", contacts=[runs[0].me]), reduce, 0.0)
    nursery.start_soon(joiner.train)
    with trio.fail_after(12 * transfer_s + 3.0):
        await joiner.arrived.wait()
    assert all(joiner.run.me in one.peers for one in joiner.results)
    assert joiner.fetched > 1, "it was overtaken"
    assert len({one.epoch for one in trainers[0].results}) == len(trainers[0].results)


async def test_whoever_never_arrives_delays_a_few_rounds_only(
    autojump_clock, members, nursery, reduce, slow_states
):
    runs = await members.start("a", "b", "c", config=RunConfig(agreement=Settings(members_min=2)))
    trainers = [Trainer(run, reduce, 0.2) for run in runs]
    for one in trainers:
        nursery.start_soon(one.train)
    await trio.sleep(1.0)
    slow_states[0] = 0.3
    idler = await members.join("d", contacts=[runs[0].me])

    async def fetch_for_ever():
        while True:
            await idler.fetch_state(deadline_s=30.0)

    nursery.start_soon(fetch_for_ever)
    await trio.sleep(20.0)
    before = len(trainers[0].results)
    await trio.sleep(3.0)
    assert len(trainers[0].results) - before > 10
