"""One bad member among honest ones, in whole rounds: what each defence makes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trio

from collectives import ExchangeSettings, NonFinite, RoundFailed, RunConfig, Settings
from collectives import run as run_module
from p2p.testing import MemoryNetwork

SIZE = 20_000


def config_of(members_min=3, *, check_norms=False, **settings):
    return RunConfig(
        agreement=Settings(members_min=members_min),
        check_norms=check_norms,
        reduce=ExchangeSettings(**settings),
    )


def honest(runs):
    """About 1 everywhere, each a little otherwise."""
    generator = torch.Generator().manual_seed(1)
    return {run.me: [torch.randn(SIZE, generator=generator).mul(0.05).add(1)] for run in runs}


def distance(one, centre):
    return float((one.tensors[0] - centre).norm() / centre.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregator": "median"},
        {"aggregator": "trimmed", "trim": 0.25},
        {"aggregator": "clip"},
        {"aggregator": "clip", "audit": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
async def test_a_robust_aggregate_stays_with_the_honest(autojump_clock, members, together, reduce, settings):
    runs = await members.start(*"abcde", config=config_of(5, **settings))
    given = honest(runs)
    centre = torch.stack([given[run.me][0] for run in runs[:4]]).mean(0)
    given[runs[4].me] = [torch.full((SIZE,), -1000.0)]
    found = await together(runs, lambda run: reduce(run, given[run.me]))
    assert all(len(one.peers) == 5 and one.digest == found[0].digest for one in found)
    assert distance(found[0], centre) < 0.1
    mean = torch.stack([given[run.me][0] for run in runs]).mean(0)
    assert float((mean - centre).norm() / centre.norm()) > 100, "what the mean would have made of it"


async def test_the_median_of_rounds_is_numpys(autojump_clock, members, together, reduce):
    runs = await members.start(*"abcde", config=config_of(5, aggregator="median"))
    given = honest(runs)
    found = await together(runs, lambda run: reduce(run, given[run.me]))
    wanted = np.median([given[run.me][0].numpy() for run in runs], axis=0)
    assert np.array_equal(found[0].tensors[0].numpy(), wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("caps", "weighs"),
    [
        ({"weight_cap": 2.0}, 2.0),
        ({"weight_share_max": 0.5}, 3.0),
        ({"weight_caps": "the greedy"}, 0.5),
    ],
    ids=["cap", "share", "identity"],
)
async def test_nobody_weighs_more_than_is_allowed(autojump_clock, members, together, reduce, caps, weighs):
    names = "abcd"
    if "weight_caps" in caps:
        caps = {"weight_caps": ((MemoryNetwork().host("d").peer_id, weighs),)}
    runs = await members.start(*names, config=config_of(4, **caps))
    given = {run.me: [torch.full((SIZE,), float(number))] for number, run in enumerate(runs)}
    weights = dict.fromkeys(given, 1.0) | {runs[3].me: 1e6}
    found = await together(runs, lambda run: reduce(run, given[run.me], weights[run.me]))
    wanted = np.float32(0 + 1 + 2 + 3 * weighs) / np.float32(3 + weighs)
    for one in found:
        assert one.weight == 3 + weighs
        assert {member.peer: member.weight for member in one.members}[runs[3].me] == weighs
        assert torch.equal(one.tensors[0], torch.full((SIZE,), float(wanted)))


async def test_a_norm_out_of_all_proportion_is_refused(autojump_clock, members, together, reduce):
    runs = await members.start(*"abcd", config=config_of(3, check_norms=True, norm_factor=5.0))
    given = honest(runs)
    given[runs[2].me] = [torch.full((SIZE,), 100.0)]
    found = await together(runs, lambda run: reduce(run, given[run.me], deadline_s=10.0))
    assert isinstance(found[2], RoundFailed)
    for one in (found[0], found[1], found[3]):
        assert set(one.peers) == {runs[0].me, runs[1].me, runs[3].me}
        assert [left.why for left in one.left_out] == ["norm"]


@pytest.mark.parametrize("bad", ["longer than it says", "nan", "infinity"])
async def test_who_sends_other_than_it_claims_is_left_out(
    autojump_clock, members, together, reduce, monkeypatch, bad
):
    """A member whose own checks are turned off."""
    runs = await members.start(*"abcd", config=config_of(3, check_norms=True))
    given = honest(runs)
    if bad == "longer than it says":
        given[runs[1].me] = [torch.full((SIZE,), 100.0)]
    else:
        given[runs[1].me][0][SIZE // 2 :] = float("nan" if bad == "nan" else "inf")
    real = run_module.norm_of
    monkeypatch.setattr(
        run_module,
        "norm_of",
        lambda tensors, *more: 140.0 if tensors is given[runs[1].me] else real(tensors, *more),
    )
    found = await together(runs, lambda run: reduce(run, given[run.me], deadline_s=10.0))
    rest = [runs[0], runs[2], runs[3]]
    assert isinstance(found[1], RoundFailed | NonFinite)
    for one in (found[0], found[2], found[3]):
        assert set(one.peers) == {run.me for run in rest}
        assert {left.why for left in one.left_out} <= {"norm", "nonfinite", "silent"}
        wanted = torch.stack([given[run.me][0] for run in rest]).mean(0)
        assert torch.allclose(one.tensors[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("check_norms", [False, True])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
async def test_own_values_that_are_no_numbers_are_their_callers_error_at_once(
    autojump_clock, members, together, reduce, check_norms, codec, value
):
    config = replace(config_of(2, check_norms=check_norms), codec=codec)
    runs = await members.start(*"abc", config=config)
    given = honest(runs)
    given[runs[1].me][0][SIZE - 1] = value

    ended_s = {}

    async def call(run):
        try:
            return await reduce(run, given[run.me], deadline_s=10.0)
        finally:
            ended_s[run.me] = trio.current_time()

    began_s = trio.current_time()
    found = await together(runs, call)
    assert isinstance(found[1], NonFinite)
    assert "tensor 0 of 1" in str(found[1])
    assert ended_s[runs[1].me] == began_s, "at once, and nobody else has heard of it"
    assert all(set(one.peers) == {runs[0].me, runs[2].me} for one in (found[0], found[2]))
