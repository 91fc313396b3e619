"""What a node uploads: the owner's rate holds on average, and a new one at once."""

import pytest
import trio

from p2p.blobs.budget import BURST_S, Bucket, UploadBudget


def test_a_bucket_lets_the_rate_through_and_a_burst_after_a_pause():
    bucket = Bucket(1000.0)
    now = 100.0
    assert bucket.wait_s(now) == 0
    bucket.spend(1000, now)
    assert bucket.wait_s(now) == pytest.approx(1 - BURST_S)
    assert bucket.wait_s(now + 0.5) == pytest.approx(0.5 - BURST_S)
    assert bucket.wait_s(now + 1) == 0


def test_no_rate_is_no_limit_and_rate_nought_is_nothing():
    assert Bucket(None).wait_s(1.0) == 0
    assert Bucket(0).wait_s(1.0) == float("inf")


def test_a_new_rate_counts_for_what_is_owed_already():
    bucket = Bucket(1000.0)
    bucket.spend(10_000, 0.0)
    bucket.set_rate(100_000.0, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(0.1)
    bucket.set_rate(None, 0.0)
    assert bucket.wait_s(0.0) == 0


async def test_what_waits_goes_on_at_the_new_rate_and_in_order(autojump_clock):
    budget = UploadBudget(1000.0)
    done = []

    async def send(name, count):
        await budget.spend(count)
        done.append((name, trio.current_time()))

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        await budget.spend(10_000)
        for name in ("first", "second"):
            nursery.start_soon(send, name, 10)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        budget.set_rate(1_000_000.0)
    assert [name for name, _ in done] == ["first", "second"]
    assert done[-1][1] - begun < 1.1
    assert budget.sent_bytes == 10_020
