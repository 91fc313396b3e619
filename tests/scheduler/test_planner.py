import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import Assignment, Plan, adopt, planner_rank

MEMBERS = ["a", "b", "c", "d"]


def plan(epoch, planner, span=(0, 4)):
    return Plan("m", epoch, planner, (Assignment("a", *span),))


def test_rank_ignores_the_order_of_members_and_repeats():
    assert planner_rank("m", MEMBERS) == planner_rank("m", [*reversed(MEMBERS), "a"])
    assert sorted(planner_rank("m", MEMBERS)) == MEMBERS


def test_succession_a_member_that_leaves_changes_nobody_elses_order():
    rank = planner_rank("m", MEMBERS)
    for gone in MEMBERS:
        assert planner_rank("m", [m for m in MEMBERS if m != gone]) == [m for m in rank if m != gone]


def test_different_subjects_have_different_orders():
    members = [f"n{k}" for k in range(8)]
    firsts = {planner_rank(f"model{k}", members)[0] for k in range(100)}
    assert len(firsts) == 8


@pytest.mark.parametrize(
    ("current", "offered", "taken"), [(None, 1, True), (1, 2, True), (2, 1, False), (2, 2, False)]
)
def test_epochs_only_rise(current, offered, taken):
    assert adopt(None if current is None else plan(current, "a"), plan(offered, "a"), MEMBERS) is taken


def test_a_plan_of_a_stranger_is_never_adopted():
    assert not adopt(None, plan(9, "x"), MEMBERS)


@settings(deadline=None)
@given(st.permutations([(e, p) for e in (1, 2, 3) for p in MEMBERS]))
def test_whatever_the_order_of_arrival_no_one_goes_back_or_takes_two_of_one_epoch(order):
    current, seen = None, []
    for epoch, planner in order:
        offered = plan(epoch, planner)
        if adopt(current, offered, MEMBERS):
            current = offered
            seen.append(epoch)
    assert current.epoch == 3
    assert seen == sorted(set(seen))
