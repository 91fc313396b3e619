"""Rounds over libp2p on loopback, encrypted, in real time: the same as in memory, with peers that nobody can dial."""

import pytest
import torch
import trio

from collectives import (
    DetectorSettings,
    ExchangeSettings,
    Fork,
    NoQuorum,
    RoundFailed,
    RunConfig,
    Settings,
    verify_proof,
)
from collectives.reduce.collect import Collector
from collectives.state import Snapshot

SIZE = 300_000


def given_of(runs):
    return {run.me: [torch.randint(-50, 50, (SIZE,)).float()] for run in runs}


def mean_of(runs, given):
    return torch.stack([given[run.me][0] for run in runs]).sum(0) / len(runs)


# A busy machine is no dead one; here only connections that end tell of anything.
PATIENT = DetectorSettings(silence_min_s=30.0, silence_max_s=60.0, dead_after_s=60.0)


def config_of(members_min, **more):
    agreement = Settings(members_min=members_min, grace_first_s=2.0, hurry_s=4.0, takeover_s=5.0)
    return RunConfig(agreement=agreement, detector=PATIENT, **more)


async def test_a_peer_behind_a_nat_is_a_client_of_the_others(real_members, together, reduce):
    runs = await real_members.start(*"abc", config=config_of(3), hidden="c")
    for _ in range(3):
        given = given_of(runs)
        found = await together(runs, lambda run, given=given: reduce(run, given[run.me]))
        assert all(torch.equal(one.tensors[0], mean_of(runs, given)) for one in found)
        assert [m.dialable for m in found[0].members if m.peer == runs[2].me] == [False]
        assert found[2].bytes_sent == 4 * SIZE


@pytest.mark.parametrize("audit", [False, True])
async def test_two_that_cannot_dial_one_another_are_members_of_every_round(
    real_members, together, reduce, audit
):
    """Whoever of them coordinates: others carry their letters."""
    config = config_of(4, reduce=ExchangeSettings(audit=audit), audit_parts=2.0)
    runs = await real_members.start(*"abcd", config=config, hidden="cd")
    assert not runs[2].reaches(runs[3].me)
    owner = None
    rounds = 0
    while owner not in (runs[2].me, runs[3].me) or rounds < 3:  # everybody's turn comes
        given = given_of(runs)
        found = await together(runs, lambda run, given=given: reduce(run, given[run.me]))
        assert all(len(one.peers) == 4 for one in found)
        assert all(torch.equal(one.tensors[0], mean_of(runs, given)) for one in found)
        owner = found[0].certificate.ballot.owner
        rounds += 1
        assert rounds < 60
    assert all(run.guilty == {} for run in runs)


async def test_lans_reduce_first_and_all_get_the_same_bytes(real_members, together, reduce):
    groups = {"a": "x", "b": "x", "c": "y", "d": "y"}
    each = {name: {"config": config_of(4, group=group)} for name, group in groups.items()}
    runs = await real_members.start(*groups, each=each)
    given = given_of(runs)
    found = await together(runs, lambda run: reduce(run, given[run.me]))
    assert len({one.digest for one in found}) == 1
    assert all(torch.equal(one.tensors[0], mean_of(runs, given)) for one in found)


async def test_a_liar_among_real_hosts_is_named(real_members, together, reduce, monkeypatch):
    config = config_of(2, reduce=ExchangeSettings(audit=True), audit_parts=1e6)
    runs = await real_members.start(*"abc", config=config)
    honest = Collector.mean

    def mean(self, chunk, out):
        good = honest(self, chunk, out)
        if self._plan.members[self._me].peer == runs[1].me:
            out[0] += 1
        return good

    monkeypatch.setattr(Collector, "mean", mean)
    given = given_of(runs)
    found = await together(runs, lambda run: reduce(run, given[run.me], deadline_s=20.0))
    rest = [runs[0], runs[2]]
    assert isinstance(found[1], RoundFailed)
    for run in rest:
        assert set(run.guilty) == {runs[1].me}
        assert verify_proof(run.court.proof(runs[1].me)).why == "altered"
    assert all(torch.equal(one.tensors[0], mean_of(rest, given)) for one in (found[0], found[2]))


async def test_a_joiner_takes_the_state_from_many_while_one_lies(real_members, together, reduce):
    """Rounds go on meanwhile; what the liar serves under the right name is found out chunk by chunk."""
    config = config_of(3)
    runs = await real_members.start(*"abcd", config=config)
    state = {f"layer.{n}": torch.randn(400_000) for n in range(8)}
    voters = runs[:3]

    async def call(run):
        given = [torch.ones(1000)]
        out = await reduce(run, given)
        await run.publish(state)
        return out

    assert all(one.epoch == 1 for one in await together(voters, call))
    lie = Snapshot.take({key: tensor + 1 for key, tensor in state.items()}, 1)
    honest = runs[0].shelf("outer").newest
    lie.digest, lie.manifest = honest.digest, honest.manifest
    runs[0]._shelves["outer"]._kept.clear()
    runs[0].shelf("outer").put(lie, trio.current_time())
    joined = []

    async def join():
        joined.append(await runs[3].fetch_state(deadline_s=30.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(join)
        found = await together(voters, lambda run: reduce(run, [torch.ones(1000)]))
    assert all(one.epoch == 2 for one in found), "nobody waited"
    assert all(torch.equal(joined[0].tensors[key], tensor) for key, tensor in state.items())


async def test_a_partition_goes_on_in_pairs_and_meets_again_by_the_rule(real_members, together, reduce):
    runs = await real_members.start(*"abcde", config=config_of(5, gossip=True))  # all five are waited for
    most, few = runs[:3], runs[3:]
    states, forks = {}, {}

    async def take(run, tensors, weight=1.0, deadline_s=20.0):
        out = await reduce(run, tensors, weight, deadline_s=deadline_s)
        base = states.get(run.me, {"w": torch.zeros(SIZE)})
        states[run.me] = {"w": base["w"] + out.tensors[0]}
        await run.publish(states[run.me])
        return out

    found = await together(runs, lambda run: take(run, [torch.ones(SIZE)]))
    assert all(len(one.peers) == 5 for one in found)
    await real_members.partition([run.me for run in most], [run.me for run in few])

    async def alone(run):
        forks[run.me] = Fork.at(states[run.me])
        with pytest.raises(NoQuorum):
            await reduce(run, [torch.ones(SIZE)], deadline_s=8.0)
        pair = await run.average([torch.full((SIZE,), 4.0 * (1 + few.index(run)))], 2.0)
        forks[run.me].add(2.0)
        states[run.me] = {"w": states[run.me]["w"] + pair.tensors[0]}

    async def side(run):
        if run in most:
            return await take(run, [torch.full((SIZE,), 10.0)], deadline_s=8.0)
        return await alone(run)

    found = await together(runs, side)
    assert all(set(one.peers) == {run.me for run in most} for one in found[:3])
    assert found[3:] == [None, None]
    assert torch.equal(states[few[0].me]["w"], states[few[1].me]["w"]), "a pair agrees"
    await real_members.heal()

    async def meet(run):
        if run in most:
            return await take(run, [torch.full((SIZE,), 1.0)], 2.0)
        delta = forks[run.me].delta(states[run.me])
        states[run.me] = dict((await run.fetch_state(epoch_min=2)).tensors)
        return await take(run, [delta["w"]], forks[run.me].weight)

    found = await together(runs, meet)
    assert all(set(one.peers) == {run.me for run in runs} for one in found), "all are in, the few too"
    wanted = torch.full((SIZE,), (3 * 2 * 1.0 + 2 * 2 * 6.0) / 10)
    assert all(torch.equal(one.tensors[0], wanted) for one in found)
    assert all(torch.equal(states[run.me]["w"], states[runs[0].me]["w"]) for run in runs)
