"""Plans: everything is owned once, shares follow bandwidth, survivors keep what they have."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.agreement import Member
from collectives.reduce import PlanError, plan_reduce
from collectives.reduce.plan import shares

CHUNK = 4096


def members(count, **changes):
    made = []
    for n in range(count):
        fields = {name: value[n] if isinstance(value, list) else value for name, value in changes.items()}
        made.append(replace(Member(f"peer-{n}", 0, n, 1.0), **fields))
    return made


def plan_for(tools, some, chunks=64):
    return plan_reduce(tools.declare(some), chunks * CHUNK, CHUNK)


def owned(plan):
    return [plan.counts_of(n) for n in range(len(plan.members))]


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "x", "y"]), st.booleans(), st.floats(0, 1e9)), min_size=1, max_size=12
    ),
    st.integers(0, 200),
)
@settings(max_examples=200, deadline=None)
def test_every_chunk_has_a_way_from_every_member_to_a_root_and_back(tools, some, chunks):
    made = [Member(f"p{n}", 0, n, 1.0, bps, group, dialable) for n, (group, dialable, bps) in enumerate(some)]
    plan = plan_for(tools, made, chunks)
    assert plan.chunks == chunks
    assert sorted(n for unit in plan.units for n in unit) == list(range(len(made)))
    assert sum(owned(plan)) == chunks
    anybody = any(member.dialable for member in made)
    for chunk in range(chunks):
        root = plan.root(chunk)
        assert made[root].dialable or not anybody
        assert plan.leaf_to(root, chunk) == root
        for number in range(len(made)):
            to = plan.leaf_to(number, chunk)
            assert to == root or plan.unit_of[to] == plan.unit_of[number]
            assert to == number or made[to].dialable or not anybody
            if to != root:
                assert plan.leaf_to(to, chunk) == to
                assert plan.head(plan.unit_of[to], chunk) == to


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 64])
def test_equal_members_take_equal_shares(tools, count):
    counts = owned(plan_for(tools, members(count)))
    assert max(counts) - min(counts) <= 1


def test_the_same_declaration_gives_the_same_plan_and_another_seed_does_not_matter(tools):
    some = members(5, bandwidth_bps=[1e6, 2e6, 3e6, 4e6, 5e6])
    one, two = plan_for(tools, some), plan_reduce(tools.declare(some, number=3), 64 * CHUNK, CHUNK)
    assert (one.roots == two.roots).all()


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=20))
@settings(max_examples=200)
def test_shares_make_all_owners_finish_together(speeds):
    chunks = 10**6
    got = shares(speeds, chunks, len(speeds))
    assert sum(got) == chunks
    times = [
        (1 + share / chunks * (len(speeds) - 2)) / speed for share, speed in zip(got, speeds, strict=True)
    ]
    busy = [time for time, share in zip(times, got, strict=True) if share > 1]
    assert max(busy) - min(busy) < 1e-4 * max(busy) + 1e-4 * len(speeds)
    for time, share in zip(times, got, strict=True):
        if share == 0:  # it is done later than the others though it owns nothing
            assert time >= max(busy) - 1e-3


def test_faster_members_own_more_and_unknown_ones_count_as_average(tools):
    counts = owned(plan_for(tools, members(4, bandwidth_bps=[1e6, 2e6, 4e6, 0.0]), 640))
    assert counts[0] < counts[1] < counts[2]
    assert counts[3] == pytest.approx(counts[1], abs=2)
    wild = owned(plan_for(tools, members(4, bandwidth_bps=[math.nan, -5.0, math.inf, 1e300])))
    assert sum(wild) == 64


def test_members_that_cannot_be_dialled_own_nothing_unless_nobody_can(tools):
    counts = owned(plan_for(tools, members(4, dialable=[True, False, True, False])))
    assert counts[1] == counts[3] == 0
    assert sum(counts) == 64
    assert all(owned(plan_for(tools, members(4, dialable=False))))


@pytest.mark.parametrize("count", [3, 4, 8])
def test_survivors_keep_nearly_all_their_chunks_whatever_they_have_missed(tools, count):
    moved = kept = 0
    some = members(count)
    before = plan_for(tools, some)
    for gone in range(count):
        after = plan_for(tools, some[:gone] + some[gone + 1 :])
        for chunk in range(64):
            owner = before.members[before.root(chunk)].peer
            if owner != some[gone].peer:
                same = after.members[after.root(chunk)].peer == owner
                kept += same
                moved += not same
    assert moved / (moved + kept) < 0.12


def test_groups_send_one_copy_between_lans(tools):
    some = members(6, group=["home", "home", "home", "work", "work", ""])
    plan = plan_for(tools, some)
    assert plan.units == ((0, 1, 2), (3, 4), (5,))
    for chunk in range(plan.chunks):
        across = {plan.head(unit, chunk) for unit in range(3) if plan.unit_of[plan.root(chunk)] != unit}
        assert len(across) == 2
    heads = [plan.heads[0].tolist().count(n) for n in range(3)]
    assert max(heads) - min(heads) <= 1
    assert plan_for(tools, members(3, group="home")).flat
    assert plan_for(tools, members(3, group=["home", "", ""])).flat
    assert plan_for(tools, members(3, group=["home", "home", ""], dialable=[False, False, True])).flat
    assert plan_reduce(tools.declare(some), 64 * CHUNK, CHUNK, flat=True).flat


def test_what_cannot_be_planned_is_told(tools):
    with pytest.raises(PlanError, match="twice"):
        plan_for(tools, [Member("a", 0, 1, 1.0), Member("a", 0, 2, 1.0)])
    for weight in (math.nan, math.inf, -1.0, 1e31, 1e-31):
        with pytest.raises(PlanError, match="weight"):
            plan_for(tools, [Member("a", 0, 1, weight)])
    with pytest.raises(PlanError, match="without members"):
        plan_reduce(replace(tools.declare(["a"]), members=()), 10, 1024)
