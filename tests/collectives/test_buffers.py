"""The caller's tensors: of any kind, read where they lie, and as they were until a result is there."""

import random

import pytest
import torch
import trio

from collectives import Reduced, RoundFailed, RunConfig, Settings

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.complex64,
    torch.bool,
)


def tensors_of(number):
    """One of every dtype; whole numbers below 32, so that means of four are exact in all of them but the integers."""
    generator = torch.Generator().manual_seed(number)
    made = [torch.randint(0, 8, (40, 30), generator=generator).mul(4).to(dtype) for dtype in DTYPES]
    made[0] = made[0].t()  # strided
    made[3] = made[3].expand(5, 40, 30)[:, ::2]  # with holes, and over itself
    made.append(torch.randint(0, 8, (70_000,), generator=generator).float())
    return made


def mean_of(columns):
    wide = [
        torch.stack([t.to(torch.complex128 if t.is_complex() else torch.float64) for t in c]) for c in columns
    ]
    means = [column.mean(0) for column in wide]
    return [
        (mean >= 0.5)
        if like[0].dtype == torch.bool
        else mean.round().to(like[0].dtype)
        if like[0].dtype == torch.int32
        else mean.to(like[0].dtype)
        for mean, like in zip(means, columns, strict=True)
    ]


def same(got, wanted):
    return all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(got, wanted, strict=True)
    )


async def test_any_dtype_any_stride_many_tags_at_once(autojump_clock, members, together, reduce):
    runs = await members.start(*"abcd", config=RunConfig(agreement=Settings(members_min=4)))
    given = {
        (run.me, tag): tensors_of(10 * number + tag) for number, run in enumerate(runs) for tag in range(3)
    }
    kept = {key: [tensor.clone() for tensor in tensors] for key, tensors in given.items()}

    async def call(run):
        found = {}

        async def one(tag):
            found[tag] = await reduce(run, given[run.me, tag], tag=f"tag-{tag}")

        async with trio.open_nursery() as nursery:
            for tag in range(3):
                nursery.start_soon(one, tag)
        return found

    found = await together(runs, call)
    for tag in range(3):
        columns = list(zip(*(kept[run.me, tag] for run in runs), strict=True))
        for run, results in zip(runs, found, strict=True):
            assert len(results[tag].peers) == 4
            assert same(results[tag].tensors, mean_of(columns))
            assert same(given[run.me, tag], kept[run.me, tag])


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_ends_a_round_the_tensors_are_as_they_were(
    autojump_clock, members, together, reduce, seed
):
    """One caller gives up, one member dies, at any instant; what comes of it elsewhere is an exact mean."""
    chance = random.Random(seed)
    runs = await members.start(*"abcd", config=RunConfig(agreement=Settings(members_min=2)))
    given = {run.me: tensors_of(number) for number, run in enumerate(runs)}
    kept = {peer: [tensor.clone() for tensor in tensors] for peer, tensors in given.items()}
    leaver, victim = chance.sample(runs, 2)

    async def call(run):
        with trio.move_on_after(chance.uniform(0.0, 0.12) if run is leaver else 1e9):
            return await reduce(run, given[run.me], deadline_s=10.0)

    async def kill():
        await trio.sleep(chance.uniform(0.0, 0.12))
        members.kill(victim)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        found = await together(runs, call)
    assert all(same(given[peer], kept[peer]) for peer in given)
    rest = [one for run, one in zip(runs, found, strict=True) if run not in (leaver, victim)]
    results = [one for one in found if isinstance(one, Reduced)]
    assert all(isinstance(one, Reduced | RoundFailed) for one in rest)
    for one in results:
        columns = list(zip(*(kept[run.me] for run in runs if run.me in one.peers), strict=True))
        if len(one.peers) != 3:  # thirds are rounded, and by dtype
            assert same(one.tensors, mean_of(columns))
        assert one.digest == results[0].digest
    assert same(given[leaver.me], kept[leaver.me])
