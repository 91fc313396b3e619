"""The limit on what a node sends is exact over time, whatever the sizes of messages; what it claims is steady."""

import random

import pytest
import trio

from collectives.data_links import BURST_S, CLAIM_BPS_MAX, CLAIMS_SEEN, Claim, Uplink, window_for


@pytest.mark.parametrize("size", [1000, 64 << 10, 1 << 20])
async def test_the_average_is_the_rate(autojump_clock, size):
    uplink = Uplink(100e6)
    count = (25 << 20) // size
    began_s = trio.current_time()
    for _ in range(count):
        await uplink.take(size)
    took_s = trio.current_time() - began_s
    wanted_s = count * size * 8 / 100e6
    assert wanted_s - BURST_S - 1e-6 <= took_s <= wanted_s + 1e-6


async def test_who_wakes_up_late_loses_nothing_of_the_rate(autojump_clock):
    uplink = Uplink(100e6)
    await uplink.take(1 << 20)
    began_s = trio.current_time()
    for _ in range(200):
        await uplink.take(64 << 10)
        await trio.sleep(0.9 * BURST_S)  # which is longer than these bytes take
        for _ in range(3):
            await uplink.take(64 << 10)
    wanted_s = 200 * 4 * (64 << 10) * 8 / 100e6
    assert trio.current_time() - began_s == pytest.approx(wanted_s, rel=0.02)


async def test_many_senders_share_one_limit(autojump_clock):
    uplink = Uplink(8e6, burst_bytes=1000)
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(uplink.take, 100_000)
    assert trio.current_time() - began_s == pytest.approx(1.0, abs=0.01)


async def test_an_idle_time_is_not_saved_up(autojump_clock):
    uplink = Uplink(8e6, burst_bytes=1000)
    await uplink.take(1000)
    await trio.sleep(100)
    began_s = trio.current_time()
    for _ in range(11):
        await uplink.take(1000)
    assert trio.current_time() - began_s == pytest.approx(0.010, abs=0.001)


async def test_no_limit_never_waits(autojump_clock):
    began_s = trio.current_time()
    for _ in range(100):
        await Uplink(0.0).take(1 << 30)
    assert trio.current_time() == began_s


@pytest.mark.parametrize(
    ("mib", "links", "window_mib"),
    [(64, 1, 4), (64, 3, 2), (1, 1, 2), (1024, 1, 8), (1024, 15, 4.27), (0, 0, 2)],
)
def test_all_links_together_hold_little_beside_the_tensors(mib, links, window_mib):
    assert window_for(mib << 20, links) == pytest.approx(window_mib * (1 << 20), rel=0.01)


def test_what_a_node_claims_stands_still_where_what_is_seen_does_not():
    noise = random.Random(3)
    for line_bps in (100e6, 1e9, 40e9):
        claim, seen = Claim(), [line_bps * noise.uniform(0.2, 1.0) for _ in range(100)]
        claimed = [claim.of(bps) for bps in seen][CLAIMS_SEEN:]
        wanted_bps = min(line_bps, CLAIM_BPS_MAX)
        assert all(0.6 * wanted_bps <= bps <= wanted_bps for bps in claimed)
        assert len(set(claimed)) <= 10


def test_a_line_that_became_another_one_is_claimed_as_it_is():
    claim = Claim()
    assert claim.of(0.0) == 0.0
    assert claim.of(1e9) == 1e9
    assert claim.of(0.0) == 1e9
    for _ in range(CLAIMS_SEEN):
        last = claim.of(100e6)
    assert last == 100e6
    assert claim.of(1e9) == 1e9
