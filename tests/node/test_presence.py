"""How likely nodes are to stay, from when they were there."""

from __future__ import annotations

import pytest

from node.presence import FORGET_AFTER_S, PRIOR_SHARE, STEP_S_MAX, Presence


def watched(*phases, step_s=30.0):
    """Phases of (who is there, seconds)."""
    presence, now_s = Presence(), 0.0
    for live, seconds in phases:
        end_s = now_s + seconds
        while now_s < end_s:
            presence.note(live, now_s)
            now_s += step_s
    return presence


def test_a_stranger_is_nearly_trusted_and_who_stays_more_so():
    assert Presence().reliability("a") == PRIOR_SHARE
    assert watched(("a", 8 * 3600)).reliability("a") > PRIOR_SHARE


def test_who_is_away_half_of_the_time_is_worth_half_as_much():
    presence = watched(*[("ab", 600), ("a", 600)] * 18)
    assert presence.reliability("a") >= 0.99
    assert presence.reliability("b") == pytest.approx(0.55, abs=0.05)


def test_what_was_long_ago_counts_for_less():
    presence = watched(("ab", 600), ("a", 4 * 3600), ("ab", 24 * 3600))
    assert presence.reliability("b") > 0.95


def test_a_pause_of_this_computer_says_nothing_of_others():
    presence = Presence()
    presence.note("ab", 0.0)
    presence.note("a", 8 * 3600.0)
    assert presence.reliability("b") == PRIOR_SHARE
    presence.note("a", 8 * 3600.0 + STEP_S_MAX)
    assert presence.reliability("b") < PRIOR_SHARE


def test_who_is_away_for_a_day_is_forgotten():
    presence = watched(("ab", 600), ("a", FORGET_AFTER_S + 3600))
    assert presence.reliability("b") == PRIOR_SHARE
