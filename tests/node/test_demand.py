"""How much models are wanted, from how busy their hosts say they are."""

from __future__ import annotations

import pytest

from node.adverts import HostAdvert
from node.demand import DEMAND_LEAST, Demand


def host(start=0, end=8, busy=0.0, queue_s=0.0, state="ready", sessions=0):
    return HostAdvert(start, end, state, 1, busy=busy, queue_s=queue_s, sessions=sessions)


def seen(hosts, seconds=60, memory_s=10.0):
    demand = Demand(memory_s)
    for k in range(seconds + 1):
        demand.note("m", 8, 4, hosts, float(k))
    return demand


@pytest.mark.parametrize(
    ("hosts", "worth"),
    [
        ([host(busy=0.5)], 0.5),
        ([host(busy=0.5), host(busy=0.5)], 1.0),
        ([host(0, 4, 0.6), host(4, 8, 0.6)], 0.6),
        ([host(0, 4, 0.6), host(4, 8, 0.6, state="loading")], 0.3),
        ([host(busy=1.0, queue_s=1.0)], 1.5),
        ([host(busy=1.0, queue_s=99.0)], 2.0),
        ([host(0, 99, 0.5)], 0.5),
        ([host(busy=0.2, sessions=2)], 0.5),
        ([host(busy=0.8, sessions=2)], 0.8),
        ([host(sessions=99)], 1.0),
        ([], DEMAND_LEAST),
    ],
)
def test_demand_is_counted_in_copies_worth_of_work(hosts, worth):
    assert seen(hosts).of("m") == pytest.approx(worth, rel=0.01)


def test_a_burst_moves_little_and_what_lasts_moves_all():
    demand = seen([host()])
    demand.note("m", 8, 4, [host(busy=1.0)], 61.0)
    assert demand.of("m") < 0.15
    for k in range(60):
        demand.note("m", 8, 4, [host(busy=1.0)], 62.0 + k)
    assert demand.of("m") > 0.95


def test_copies_are_added_until_each_is_half_idle_and_kept_until_clearly_too_many():
    demand = seen([host(busy=0.9)])
    assert demand.copies_max("m", 1) == 2
    assert demand.copies_max("m", 3) == 3
    for start_s, busy, copies in ((100.0, 0.45, 2), (300.0, 0.3, 1)):
        for k in range(200):
            demand.note("m", 8, 4, [host(busy=busy)], start_s + k)
        assert demand.copies_max("m", 1) == copies


def test_models_that_are_gone_are_forgotten():
    demand = seen([host(busy=1.0)])
    demand.keep_only({"other"})
    assert demand.of("m") == DEMAND_LEAST
    assert demand.copies_max("m", 1) == 1
