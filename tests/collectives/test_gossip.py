"""Without a quorum members may average in pairs; when they meet again, the committed state wins and nothing is lost."""

import pytest
import torch
import trio

from collectives import Fork, LocalFault, NoQuorum, RunConfig, Settings

ALLOWED = RunConfig(gossip=True, agreement=Settings(members_min=2))


async def test_two_that_seek_one_another_get_the_same_weighted_mean(autojump_clock, members, together):
    runs = await members.start("a", "b", config=ALLOWED)
    values = {runs[0].me: (torch.full((9000,), 2.0), 1.0), runs[1].me: (torch.full((9000,), 6.0), 3.0)}
    found = await together(runs, lambda run: run.average([values[run.me][0]], values[run.me][1]))
    assert [one.peer for one in found] == [runs[1].me, runs[0].me]
    for one in found:
        assert one.weight == 4.0
        assert torch.equal(one.tensors[0], torch.full((9000,), 5.0))
    assert runs[0].committed() == 0, "no epoch moves"


async def test_pairs_form_among_many_and_everybody_is_in_one(autojump_clock, members, together):
    runs = await members.start(*"abcd", config=ALLOWED)
    found = await together(runs, lambda run: run.average([torch.full((5000,), float(runs.index(run)))]))
    for run, one in zip(runs, found, strict=True):
        partner = next(other for other in runs if other.me == one.peer)
        assert float(one.tensors[0][0]) == (runs.index(run) + runs.index(partner)) / 2


async def test_alone_there_is_nobody_to_average_with(autojump_clock, members):
    runs = await members.start("a", "b", config=ALLOWED)
    before = trio.current_time()
    with pytest.raises(NoQuorum):
        await runs[0].average([torch.ones(4)], deadline_s=2.0)
    assert trio.current_time() - before < 6


async def test_a_run_that_does_not_allow_it_refuses(autojump_clock, members):
    (run,) = await members.start("a")
    with pytest.raises(LocalFault, match="does not allow"):
        await run.average([torch.ones(4)])


async def test_what_a_minority_learnt_enters_its_next_round(autojump_clock, members, together, reduce):
    # Patient enough that all five are in the first round; three are enough for the second one.
    patient = Settings(members_min=3, grace_min_s=0.3, grace_first_s=1.0)
    runs = await members.start(*"abcde", config=RunConfig(gossip=True, agreement=patient))
    peers = [run.me for run in runs]
    base = {"w": torch.zeros(5000)}

    async def start(run):
        out = await reduce(run, [torch.ones(5000)])
        state = {"w": base["w"] + out.tensors[0]}
        await run.publish(state)
        return state

    states = dict(zip(peers, await together(runs, start), strict=True))
    members.network.partition(peers[:3], peers[3:])
    minority = runs[3:]
    forks = {run.me: Fork.at(states[run.me]) for run in minority}

    async def alone(run):
        with pytest.raises(NoQuorum):
            await reduce(run, [torch.ones(5000)], deadline_s=6.0)
        found = await run.average([torch.full((5000,), 4.0)], 2.0)
        forks[run.me].add(2.0)
        return {"w": states[run.me]["w"] + found.tensors[0]}

    for run, state in zip(minority, await together(minority, alone), strict=True):
        states[run.me] = state

    async def go_on(run):
        out = await reduce(run, [torch.full((5000,), 10.0)])
        states[run.me] = {"w": states[run.me]["w"] + out.tensors[0]}
        await run.publish(states[run.me])

    assert await together(runs[:3], go_on) == [None] * 3
    members.network.heal()
    await members.network.connect_all()

    async def meet(run):
        delta = forks[run.me].delta(states[run.me])
        states[run.me] = dict((await run.fetch_state(epoch_min=2)).tensors)
        return delta["w"]

    deltas = await together(minority, meet)
    assert all(torch.equal(delta, torch.full((5000,), 4.0)) for delta in deltas)
    assert all(torch.equal(states[peer]["w"], states[peers[0]]["w"]) for peer in peers)
