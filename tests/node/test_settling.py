"""When a node may plan: after its start, and after a pause in which all that it knew ran out."""

from __future__ import annotations

from node.settling import ALONE_S, PAUSE_S_MAX, SETTLE_S, Settling

NIGHT_S = 8 * 3600.0


def awake(until_s=100.0):
    """A node that has looked each second until then."""
    settling = Settling()
    settling.begin(0.0, others=True)
    for second in range(int(until_s) + 1):
        settling.look(second, second)
        settling.looked(second)
    assert settling.look(until_s, until_s)
    return settling


def slept(pause_s=NIGHT_S, *, counted=False):
    """A node just woken, and its monotonic time, which may or may not have counted the pause."""
    now_s = 100.0 + (pause_s if counted else 0.0)
    settling = awake()
    assert not settling.look(now_s, 100.0 + pause_s)
    return settling, now_s, 100.0 + pause_s - now_s


def test_who_founds_a_mesh_plans_at_once_and_who_knows_others_hears_them_first():
    settling = Settling()
    assert not settling.look(0.0, 0.0)
    settling.begin(0.0, others=False)
    assert settling.look(0.0, 0.0)
    settling.begin(0.0, others=True)
    assert not settling.look(SETTLE_S - 0.01, 0.0)
    assert settling.look(SETTLE_S, 0.0)
    settling.joined(5.0)
    assert not settling.look(5.0 + SETTLE_S - 0.01, 0.0)
    assert settling.look(5.0 + SETTLE_S, 0.0)


def test_who_slept_plans_only_when_it_has_met_somebody_again():
    for counted in (False, True):
        settling, now_s, ahead_s = slept(counted=counted)
        for later_s in (1.0, 2.0, 3.0):
            assert not settling.look(now_s + later_s, now_s + later_s + ahead_s)
        settling.met(now_s + 3.0)
        assert not settling.look(now_s + 3.0 + SETTLE_S - 0.01, now_s + 4.0 + ahead_s)
        assert settling.look(now_s + 3.0 + SETTLE_S, now_s + 5.0 + ahead_s)


def test_who_meets_nobody_after_a_pause_is_alone_in_the_end():
    settling, now_s, ahead_s = slept()
    allowed = [settling.look(now_s + tick, now_s + tick + ahead_s) for tick in range(int(ALONE_S) + 2)]
    assert allowed == [False] * int(ALONE_S) + [True] * 2


def test_words_that_lay_in_a_dead_connection_are_no_meeting():
    settling, now_s, ahead_s = slept(25.0)
    settling.met(now_s + 0.01)
    settling.lost(now_s + 0.02)
    assert not settling.look(now_s + SETTLE_S + 1.0, now_s + SETTLE_S + 1.0 + ahead_s)
    settling.met(now_s + 3.0)
    assert settling.look(now_s + 3.0 + SETTLE_S, now_s + 5.0 + ahead_s)


def test_a_member_that_comes_and_goes_does_not_keep_a_node_from_planning():
    settling, now_s, ahead_s = slept()
    for tick in range(int(ALONE_S)):
        settling.met(now_s + tick)
        settling.lost(now_s + tick + 0.5)
        assert not settling.look(now_s + tick + 0.5, now_s + tick + 0.5 + ahead_s)
    assert settling.look(now_s + ALONE_S, now_s + ALONE_S + ahead_s)
    settling.lost(now_s + ALONE_S)
    assert settling.look(now_s + ALONE_S, now_s + ALONE_S + ahead_s)


def test_a_long_plan_or_a_late_look_is_no_pause():
    settling = awake()
    assert settling.look(100.0 + PAUSE_S_MAX, 100.0 + PAUSE_S_MAX)
    settling.looked(160.0)  # a minute of planning
    assert settling.look(161.0, 161.0)
    assert settling.look(161.0, 100.0)  # the clock was set back
