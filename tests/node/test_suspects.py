"""Suspicion: requests avoid a lost peer at once, plans after a grace, and coming back clears both."""

from __future__ import annotations

from node.suspects import Suspects


def test_a_lost_peer_is_suspect_at_once_and_gone_after_the_grace():
    suspects = Suspects(grace_s=2.0)
    suspects.up("a")
    suspects.down("a", 10.0)
    assert suspects.suspects() == {"a"}
    assert suspects.gone(11.9) == frozenset()
    assert suspects.gone(12.0) == {"a"}


def test_coming_back_clears_suspicion():
    suspects = Suspects(grace_s=2.0)
    suspects.down("a", 10.0)
    suspects.up("a")
    assert suspects.suspects() == frozenset()
    assert suspects.gone(100.0) == frozenset()


def test_a_peer_that_others_still_hear_is_not_planned_away():
    suspects = Suspects(grace_s=2.0, heard_s=12.0)
    suspects.down("a", 10.0)
    suspects.heard("a", 13.0)
    assert suspects.gone(14.0) == frozenset()
    assert suspects.gone(25.0) == {"a"}


def test_a_peer_only_heard_of_counts_from_then():
    suspects = Suspects(grace_s=2.0, heard_s=12.0)
    suspects.heard("far", 5.0)
    assert suspects.suspects() == {"far"}
    assert suspects.gone(6.0) == frozenset()


def test_forgotten_peers_leave_no_trace():
    suspects = Suspects(grace_s=2.0)
    suspects.down("a", 1.0)
    suspects.heard("b", 1.0)
    suspects.forget({"b"})
    assert suspects.suspects() == {"b"}
