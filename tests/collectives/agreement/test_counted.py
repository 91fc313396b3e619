"""Whoever was counted gets its result, and whoever can go on no more is told so, and what to do."""

import pytest

from collectives.agreement import events as ev
from collectives.agreement import messages as ms
from collectives.agreement.chain import Chain
from collectives.agreement.types import Offer
from collectives.errors import Behind, NoQuorum


def enter_on(one, name, epoch, limit_s=30.0):
    """On a state of `epoch` that `name` got elsewhere."""
    one.nonces += 1
    one.tell(name, ev.Enter(Offer(epoch, one.nonces, 1.0, state=b"s"), one.now + limit_s))


def go_without(one, away, digest, limit_s=30.0):
    """The others decide the next epoch, and nothing reaches `away`."""
    rest = [name for name in one.ranked if name != away]
    for name in rest:
        one.tell(name, ev.Suspected(away))
    one.enter(*rest, limit_s=limit_s)
    for _ in range(20):
        one.deliver(lambda s, r, m: away not in (s, r))
        one.pass_time(0.1, *rest)
    one.reduced(*rest, digest=digest)
    one.deliver(lambda s, r, m: away not in (s, r))
    one.post = [step for step in one.post if away not in step[:2]]
    return rest


def test_whoever_took_over_the_state_before_it_heard_of_the_decision_gets_the_next_result(table):
    one = table("abc")
    away = one.ranked[2]
    rest = go_without(one, away, b"one")
    enter_on(one, away, 1)
    for name in rest:
        one.tell(name, ev.Alive(away))
    one.enter(*rest, limit_s=30.0)
    one.run(2.0)
    assert set(one.chains[rest[0]].declaration.peers) == set("abc")
    assert one.said(away, ev.Fetch) == [], "the state that its caller has holds that result"
    one.reduced(digest=b"two")
    one.deliver()
    assert one.committed(away) == [(2, b"two", True)]
    assert one.said(away, ev.Failed) == []


def test_bytes_that_are_not_needed_any_more_do_not_stand_in_the_way_of_the_next_result(table):
    """Two decisions came in one message: the caller stands on the second."""
    one = table("abc")
    away = one.ranked[2]
    rest = go_without(one, away, b"one")
    one.enter(*rest, limit_s=30.0)
    one.run(1.0)
    one.reduced(*rest, digest=b"two")
    enter_on(one, away, 2)
    for name in rest:
        one.tell(name, ev.Alive(away))
    one.deliver()
    assert {chain.epoch for chain in one.chains.values()} == {2}
    one.enter(*rest, limit_s=30.0)
    one.run(2.0)
    one.reduced(digest=b"three")
    one.deliver()
    assert one.committed(away) == [(3, b"three", True)]


def test_a_proposal_goes_on_while_its_caller_waits_to_hear_of_the_decision(table):
    """The caller was told that its round expired, and took over the state that others made of the proposal."""
    one = table("abc")
    first = one.ranked[0]
    one.enter(limit_s=1.0)
    one.deliver()
    one.reduced()
    one.post = []
    one.pass_time(1.0, first)
    one.post = []
    enter_on(one, first, 1)
    one.now = one.chains[first].wake_s
    one.tell(first, ev.Tick())
    assert one.chains[first].wake_s > one.now
    one.run(2.0)
    assert one.committed(first) == [(1, b"result", False)]


def counted_and_cut_off(table):
    """All three are counted in epoch 1; the third holds the result and hears no more of it."""
    one = table("abc")
    first, second, third = one.ranked
    one.enter(limit_s=30.0)
    one.deliver()
    one.reduced()
    one.deliver(lambda s, r, m: third not in (s, r))
    one.post = []
    assert one.chains[first].epoch == one.chains[second].epoch == 1
    return one, third


def test_whoever_hears_of_its_result_together_with_the_next_one_is_given_it(table):
    hears_late(table, 1)


@pytest.mark.parametrize("later", [2, 3, 4])
def test_whoever_hears_of_its_result_together_with_later_ones_is_given_it(table, later):
    hears_late(table, later)


def hears_late(table, later):
    one, third = counted_and_cut_off(table)
    for epoch in range(2, 2 + later):
        rest = go_without(one, third, bytes([epoch]))
    one.tell(rest[0], ev.Alive(third))
    one.deliver(lambda s, r, m: (s, r) == (rest[0], third))
    assert one.committed(third) == [(1, b"result", True)]
    assert one.chains[third].epoch == 1 + later
    assert one.said(third, ev.Failed) == []


def test_whoever_missed_more_than_is_remembered_is_told_that_it_is_behind(table):
    one, third = counted_and_cut_off(table)
    for epoch in range(2, 7):
        rest = go_without(one, third, bytes([epoch]), limit_s=10.0)
    one.tell(rest[0], ev.Alive(third))
    one.deliver(lambda s, r, m: (s, r) == (rest[0], third))
    error = one.said(third, ev.Failed)[0].error
    assert isinstance(error, Behind)
    assert (error.epoch, error.committed, error.counted) == (1, 6, None)


def test_an_earlier_decision_without_a_quorum_is_not_believed(table):
    one, third = counted_and_cut_off(table)
    rest = go_without(one, third, b"two")
    one.tell(rest[0], ev.Alive(third))
    told = next(m for s, r, m in one.post if r == third and isinstance(m, ms.Commit))
    earlier = told.earlier[0]
    weak = ms.Certificate(earlier.certificate.ballot, (third,))
    forged = ms.Decided(earlier.config, earlier.value, weak)
    one.tell(third, ev.Received(rest[0], ms.Commit(told.decided, earlier=(forged,))))
    assert one.committed(third) == []


def counted_and_without_bytes(table):
    """All five are counted in epoch 1; the fourth hears of the decision before it has the result."""
    one = table("abcde")
    slow = one.ranked[3]
    one.enter(limit_s=5.0)
    one.deliver()
    one.reduced(*one.ranked[:3])
    one.deliver()
    assert one.chains[slow].epoch == 1
    return one, slow


def test_all_members_are_asked_for_a_result_and_those_who_seem_dead_last(table):
    one, slow = counted_and_without_bytes(table)
    fetch = one.said(slow, ev.Fetch)[-1]
    assert set(fetch.holders) == set("abcde") - {slow}, "who did not vote may have it too"
    dead = fetch.holders[0]
    one.tell(slow, ev.Suspected(dead))
    again = one.said(slow, ev.Fetch)[-1]
    assert again.holders == (*fetch.holders[1:], dead)
    assert one.said(slow, ev.Failed) == []
    one.tell(slow, ev.Held(1, b"result"))
    assert one.committed(slow) == [(1, b"result", True)]


def test_whoever_gets_no_bytes_by_its_deadline_is_told_that_it_counts_and_given_them_later(table):
    one, slow = counted_and_without_bytes(table)
    one.pass_time(6.0)
    error = one.said(slow, ev.Failed)[0].error
    assert isinstance(error, Behind)
    assert (error.epoch, error.counted) == (1, True)
    one.tell(slow, ev.Held(1, b"result"))
    assert one.committed(slow) == [(1, b"result", False)]


def test_whoever_enters_too_late_is_told_that_it_does_not_count(table):
    one = table("abc")
    late = one.ranked[2]
    rest = go_without(one, late, b"one")
    one.tell(rest[0], ev.Alive(late))
    one.deliver()
    enter_on(one, late, 0)
    error = one.said(late, ev.Failed)[0].error
    assert isinstance(error, Behind)
    assert error.counted is False


# Who is left alone.


def only_error(one, name):
    failed = one.said(name, ev.Failed)
    assert len(failed) == 1
    return failed[0].error


@pytest.mark.parametrize("voted", [False, True])
def test_of_two_the_second_in_rank_is_told_whom_it_misses_and_what_to_do(table, voted):
    """The first dies between its proposal and the commit: it may have decided, and nobody else can know."""
    one = table("ab")
    first, second = one.ranked
    one.enter(limit_s=60.0)
    one.deliver()
    one.reduced()
    if voted:
        one.deliver(lambda s, r, m: isinstance(m, ms.Accept))
        assert one.saved[second].vote is not None
    one.post = []
    one.tell(second, ev.Suspected(first))
    one.pass_time(one.settings.no_quorum_s + 1.0, second)
    error = only_error(one, second)
    assert isinstance(error, NoQuorum)
    assert error.missing == (first,)
    assert f"wait for {first}, or, where they are gone for good, open a new run" in str(error)
    assert one.now < 10.0, "long before the deadline"
    one.tell(second, ev.Alive(first))  # it was not gone: everything goes on where it stood
    enter_on(one, second, 0)
    one.run(3.0)
    one.reduced(digest=b"result")
    one.run(1.0)
    assert {one.chains[name].epoch for name in "ab"} == {1}


def test_of_two_the_first_in_rank_goes_on_alone(table):
    one = table("ab")
    first, second = one.ranked
    one.enter(limit_s=60.0)
    one.deliver()
    one.reduced()
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept))
    one.post = []  # the vote is lost, and so is the voter
    one.tell(first, ev.Suspected(second))
    one.pass_time(2.0, first)
    one.reduced(first, digest=b"alone")
    assert one.committed(first) == [(1, b"alone", True)]


def test_a_quorum_that_cannot_tell_what_a_dead_one_decided_is_told_so(table):
    """Both of its members voted, for all that the third knows, and the one who counted the votes is gone."""
    one = table("abc")
    first, second, third = one.ranked
    one.enter(first, second, limit_s=60.0)
    one.deliver()
    one.pass_time(1.0)
    one.deliver()
    one.reduced(first, second)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept))
    one.post = []
    one.enter(third, limit_s=60.0)
    for name in (second, third):
        one.tell(name, ev.Suspected(first))
    for _ in range(80):
        one.deliver(lambda s, r, m: first not in (s, r))
        one.pass_time(0.1, second, third)
    error = only_error(one, second)
    assert isinstance(error, NoQuorum)
    assert error.missing == (first,)
    assert "may be decided" in str(error)
    assert "open a new run" in str(error)


def test_nobody_here_holding_the_bytes_is_told_with_who_could_tell(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter(limit_s=60.0)
    one.deliver()
    one.reduced(first, third)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept) and r == third)
    one.post = []
    one.restart(third)
    one.tell(second, ev.Suspected(first))
    for _ in range(80):
        one.deliver(lambda s, r, m: first not in (s, r))
        one.pass_time(0.1, second)
    error = only_error(one, second)
    assert isinstance(error, NoQuorum)
    assert error.missing == (first,)
    assert "nobody here holds its bytes" in str(error)


def test_a_joiner_that_stands_alone_names_all_it_misses(table):
    one = table("abcde")
    joiner = Chain("j", "run", "outer", None, one.settings, incarnation=7)
    one.chains["j"], one.did["j"] = joiner, []
    one.tell("j", ev.Met(("a",)))
    one.deliver()
    for name in one.ranked:
        one.tell("j", ev.Suspected(name))
    one.enter("j", limit_s=60.0)
    one.pass_time(6.0, "j")
    error = one.said("j", ev.Failed)[0].error
    assert error.missing == one.ranked
    assert "and others" in str(error)


def test_the_same_bytes_twice_are_fetched_where_a_reduction_let_the_first_ones_go(table):
    one = table("abc")
    away = one.ranked[2]
    rest = one.ranked[:2]
    for epoch in (1, 2):
        one.enter(limit_s=30.0)
        one.run(1.0)
        one.reduced(*(one.ranked if epoch == 1 else rest), digest=b"same")
        one.deliver()
    assert one.committed(rest[0]) == [(1, b"same", True), (2, b"same", True)]
    assert one.committed(away) == [(1, b"same", True)], "it was reducing when it heard of the second one"
    assert [fetch.value.digest for fetch in one.said(away, ev.Fetch)] == [b"same"]
    one.tell(away, ev.Held(2, b"same"))
    assert one.committed(away) == [(1, b"same", True), (2, b"same", True)]
