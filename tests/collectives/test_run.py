"""Rounds as callers see them: whose mean it is, or why there is none."""

import numpy as np
import pytest
import torch
import trio

from collectives import (
    Behind,
    Feedback,
    LocalFault,
    NoQuorum,
    RoundFailed,
    RunConfig,
    Settings,
    Superseded,
)
from collectives.reduce import Layout

SHAPES = ((300, 40), (7,), (5001,))


def tensors_of(run, epoch=1):
    seed = sum(run.me.encode()) + 1000 * epoch
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-50, 50, shape, generator=g).float() for shape in SHAPES]


def mean_of(runs, weights, epoch=1):
    total = float(sum(weights))
    sums = [
        sum(w * t for w, t in zip(weights, ts, strict=True))
        for ts in zip(*(tensors_of(r, epoch) for r in runs), strict=True)
    ]
    return [one / total for one in sums]


def same(got, wanted):
    return all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
async def test_every_member_gets_the_same_exact_mean(autojump_clock, members, together, reduce, count):
    runs = await members.start(*"abcde"[:count])
    weights = {run.me: float(n + 1) for n, run in enumerate(runs)}
    for epoch in (1, 2, 3):
        found = await together(
            runs, lambda run, epoch=epoch: reduce(run, tensors_of(run, epoch), weights[run.me])
        )
        wanted = mean_of(runs, list(weights.values()), epoch)
        for one in found:
            assert one.epoch == epoch
            assert set(one.peers) == set(weights)
            assert one.weight == sum(weights.values())
            assert one.digest == found[0].digest
            assert same(one.tensors, wanted)
        assert all(run.epoch() == epoch for run in runs)


async def test_the_callers_tensors_stay_as_they_were_and_out_is_filled(autojump_clock, members, together):
    runs = await members.start("a", "b")
    given = {run.me: tensors_of(run) for run in runs}
    before = {peer: [t.clone() for t in ts] for peer, ts in given.items()}
    outs = {run.me: [torch.full(shape, 7.0) for shape in SHAPES] for run in runs}

    async def call(run):
        async with run.round() as r:
            return await r.reduce(given[run.me], out=outs[run.me])

    found = await together(runs, call)
    for run, one in zip(runs, found, strict=True):
        assert same(given[run.me], before[run.me])
        assert set(one.peers) == {run.me for run in runs}
        assert same(one.tensors, mean_of(runs, [1, 1]))
        assert same(outs[run.me], mean_of(runs, [1, 1]))
        assert [t.data_ptr() for t in one.tensors] == [t.data_ptr() for t in outs[run.me]]


async def test_rounds_of_different_tags_go_on_at_once(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", "c")

    async def call(run):
        found = {}

        async def one(tag, epoch):
            found[tag] = await reduce(run, tensors_of(run, epoch), tag=tag)

        async with trio.open_nursery() as nursery:
            for epoch, tag in enumerate(("outer", "fragment-1", "fragment-2"), 1):
                nursery.start_soon(one, tag, epoch)
        return found

    found = await together(runs, call)
    for epoch, tag in enumerate(("outer", "fragment-1", "fragment-2"), 1):
        assert all(one[tag].epoch == 1 for one in found)
        assert all(same(one[tag].tensors, mean_of(runs, [1, 1, 1], epoch)) for one in found)


async def test_a_second_round_of_a_tag_is_refused_while_one_is_open(autojump_clock, members):
    (run,) = await members.start("a")
    async with run.round():
        with pytest.raises(Superseded):
            async with run.round():
                pass
        async with run.round("other"):
            pass


async def test_the_death_of_any_member_leaves_a_round_of_the_others(
    autojump_clock, members, together, reduce
):
    runs = await members.start("a", "b", "c", "d", config=RunConfig(agreement=Settings(members_min=2)))
    await together(runs, lambda run: reduce(run, tensors_of(run)))
    alive = list(runs)
    for epoch in (2, 3):
        first = runs[0].members()[0] if epoch == 2 else alive[0].members()[-1]
        victim = next(run for run in alive if run.me == first)
        others = [run for run in alive if run is not victim]

        async def call(run, victim=victim, epoch=epoch):
            if run is victim:
                members.kill(run)
                return None
            return await reduce(run, tensors_of(run, epoch))

        before = trio.current_time()
        found = await together(alive, call)
        results = [one for run, one in zip(alive, found, strict=True) if run is not victim]
        assert trio.current_time() - before < 5
        assert all(set(one.peers) == {run.me for run in others} for one in results)
        assert all(same(one.tensors, mean_of(others, [1] * len(others), epoch)) for one in results)
        alive = others


async def test_too_few_members_get_no_quorum_and_their_tensors_back(
    autojump_clock, members, together, reduce
):
    runs = await members.start("a", "b", "c")
    await together(runs, lambda run: reduce(run, tensors_of(run)))
    members.kill(runs[0])
    members.kill(runs[1])
    given = tensors_of(runs[2], 2)
    before = trio.current_time()
    with pytest.raises(NoQuorum):
        await reduce(runs[2], given, deadline_s=15.0)
    assert trio.current_time() - before < 15.1
    assert same(given, tensors_of(runs[2], 2))


async def test_a_joiner_fetches_the_state_and_takes_part(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", "c")
    state = {"w": torch.arange(100_000.0), "step": torch.tensor(3)}

    async def call(run):
        await reduce(run, tensors_of(run))
        await run.publish(state)

    assert await together(runs, call) == [None] * 3
    joiner = await members.join("d", contacts=[runs[0].me])
    with pytest.raises(Behind):
        await reduce(joiner, tensors_of(joiner))
    snapshot = await joiner.fetch_state(deadline_s=30.0)
    assert snapshot.epoch == joiner.epoch() == 1
    assert torch.equal(snapshot.tensors["w"], state["w"])
    everybody = [*runs, joiner]
    found = await together(everybody, lambda run: reduce(run, tensors_of(run, 2)))
    results = [one for one in found if not isinstance(one, RoundFailed)]
    assert len(results) >= 3
    taking_part = [run for run in everybody if run.me in results[0].peers]
    assert all(same(one.tensors, mean_of(taking_part, [1] * len(taking_part), 2)) for one in results)


async def test_who_fetches_a_state_learns_with_it_that_its_epoch_is_decided(
    autojump_clock, members, together, reduce
):
    """Those who know may be gone afterwards."""
    runs = await members.start("a", "b", "c")
    joiner = await members.join("d", contacts=[runs[0].me])
    joiner._on_own_letter = lambda peer, letter: None
    await trio.sleep(1.0)

    async def call(run):
        await reduce(run, tensors_of(run))
        await run.publish({"w": torch.ones(10)})

    assert await together(runs, call) == [None] * 3
    await trio.sleep(1.0)
    assert joiner.committed() < 1
    await joiner.fetch_state(deadline_s=30.0)
    with trio.fail_after(1.0):
        while joiner.committed() < 1:
            await joiner._tags["outer"].changed.wait()
    assert set(joiner.members()) == {run.me for run in runs}


async def test_a_member_with_another_state_is_left_out(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", "c", config=RunConfig(agreement=Settings(members_min=2)))

    async def call(run):
        await run.publish({"w": torch.full((4,), 1.0 if run is not runs[1] else 2.0)}, 0)
        return await reduce(run, tensors_of(run), deadline_s=8.0)

    found = await together(runs, call)
    assert isinstance(found[1], RoundFailed)
    assert all(set(one.peers) == {runs[0].me, runs[2].me} for one in (found[0], found[2]))


@pytest.mark.parametrize(
    ("tensors", "weight"),
    [([torch.zeros(0)], 1.0), ([], 1.0), ([torch.zeros(3)], -1.0), ([torch.zeros(3)], float("nan"))],
)
async def test_what_cannot_be_averaged_is_refused_at_once(autojump_clock, members, reduce, tensors, weight):
    (run,) = await members.start("a")
    with pytest.raises(LocalFault):
        await reduce(run, tensors, weight)


async def test_a_cancelled_round_harms_nobody(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", "c", config=RunConfig(agreement=Settings(members_min=2)))

    async def call(run):
        if run is runs[0]:
            with trio.move_on_after(0.004):
                return await reduce(run, tensors_of(run))
            return None
        return await reduce(run, tensors_of(run), deadline_s=15.0)

    found = await together(runs, call)
    assert found[0] is None
    for one in found[1:]:
        assert one.digest == found[1].digest
    taking_part = [run for run in runs if run.me in found[1].peers]
    assert same(found[1].tensors, mean_of(taking_part, [1] * len(taking_part)))


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk"])
async def test_lossy_codecs_leave_all_members_with_the_same_bytes(autojump_clock, members, together, codec):
    runs = await members.start(
        "a", "b", "c", config=RunConfig(codec=codec, agreement=Settings(members_min=3))
    )
    feedbacks = {run.me: Feedback(Layout.of(tensors_of(run))) if codec == "topk" else None for run in runs}

    async def call(run):
        async with run.round() as r:
            return await r.reduce(tensors_of(run), feedback=feedbacks[run.me])

    found = await together(runs, call)
    assert all(one.digest == found[0].digest for one in found)
    assert all(same(one.tensors, found[0].tensors) for one in found)
    wanted = torch.cat([t.reshape(-1) for t in mean_of(runs, [1, 1, 1])])
    got = torch.cat([t.reshape(-1) for t in found[0].tensors])
    error = float((got - wanted).norm() / wanted.norm())
    assert error < {"bf16": 0.01, "int8": 0.02, "int4": 0.2, "topk": 1.1}[codec]
    if codec == "topk":
        assert all(np.abs(feedback.residual).sum() > 0 for feedback in feedbacks.values())


async def test_who_leaves_resigns_and_the_others_need_not_wait(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", "c")
    await together(runs, lambda run: reduce(run, tensors_of(run)))
    await runs[1].leave()
    rest = [runs[0], runs[2]]
    before = trio.current_time()
    found = await together(rest, lambda run: reduce(run, tensors_of(run, 2)))
    assert all(set(one.peers) == {run.me for run in rest} for one in found)
    assert trio.current_time() - before < 3


async def test_a_run_that_ends_ends_its_rounds(autojump_clock, members, together, reduce):
    runs = await members.start("a", "b", config=RunConfig(agreement=Settings(members_min=2)))

    async def call(run):
        if run is runs[1]:
            await trio.sleep(1.0)
            members.kill(runs[0])
            return None
        return await reduce(run, tensors_of(run), deadline_s=30.0)

    before = trio.current_time()
    found = await together(runs, call)
    assert isinstance(found[0], Superseded)
    assert trio.current_time() - before < 2
    with pytest.raises(LocalFault, match="not open"):
        await reduce(runs[0], tensors_of(runs[0]))
