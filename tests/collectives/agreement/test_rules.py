"""Single rules of the protocol, each by a scene around a table."""

import itertools

import pytest

from collectives.agreement import events as ev
from collectives.agreement import messages as ms
from collectives.agreement.ledger import Ledger
from collectives.agreement.types import (
    NO_BALLOT,
    Ballot,
    Config,
    Decided,
    Resignation,
    Seat,
    Settings,
    Vote,
    config_of,
    founding,
)
from collectives.errors import Behind, Diverged, Excluded, NoQuorum, RoundExpired, Superseded


def subsets(names):
    return [set(one) for size in range(len(names) + 1) for one in itertools.combinations(names, size)]


@pytest.mark.parametrize("seats", range(1, 7))
def test_two_quorums_share_a_member(seats):
    names = "abcdef"[:seats]
    config = Config(0, tuple(Seat(name) for name in names))
    quorums = [one for one in subsets(names) if config.is_quorum(one)]
    assert quorums
    assert all(one & other for one in quorums for other in quorums)
    assert not config.is_quorum(set())


@pytest.mark.parametrize("seats", range(1, 5))
def test_resignations_leave_nothing_unseen(seats):
    """Whoever reads (promises P, resignations R) sees a voter of whatever was decided below (votes A, abstaining R'):
    an abstaining acceptor never promised the reader's ballot, and a resignation shows its vote."""
    names = "abcd"[:seats]
    config = Config(0, tuple(Seat(name) for name in names))
    everybody = subsets(names)
    for without, abstaining in itertools.product(everybody, everybody):
        reading = [
            one for one in everybody if not one & (without | abstaining) and config.is_quorum(one, without)
        ]
        voting = [one for one in everybody if not one & abstaining and config.is_quorum(one, abstaining)]
        assert all((promised | without) & voted for promised in reading for voted in voting)


def test_the_first_place_goes_around():
    names = [f"n{k}" for k in range(5)]
    seats = [Seat(name) for name in names]
    first = {config_of("run", "outer", epoch, seats).seats[0].peer for epoch in range(60)}
    assert first == set(names)


def test_a_leaver_that_promised_more_still_counts_against_lower_ballots():
    config = founding("run", "outer", "abcde")
    ledger = Ledger(config.peers[0], config, 0, None)
    leaver = config.seats[-1]
    ledger.note(Resignation(leaver, 1, Ballot(3, "x"), None))
    assert ledger.abstaining(Ballot(2, "x")) == ()
    assert ledger.abstaining(Ballot(3, "x")) == (leaver.peer,)


def test_a_round_gives_everybody_the_same_result_and_membership(table):
    one = table("abcd")
    one.enter()
    one.deliver()
    assert {len(one.said(name, ev.Reduce)) for name in one.ranked} == {1}
    one.reduced()
    one.deliver()
    assert {tuple(one.committed(name)) for name in one.ranked} == {((1, b"result", True),)}
    values = {repr(one.said(name, ev.Committed)[0].value) for name in one.ranked}
    assert len(values) == 1
    assert {chain.config for chain in one.chains.values()} == {one.chains["a"].config}


def test_nothing_is_sent_before_what_it_rests_on_is_saved(table):
    one = table("abc")
    one.enter()
    one.deliver()
    member = one.ranked[1]
    one.reduced(one.ranked[0], member)
    accept = next(m for s, r, m in one.post if r == member and isinstance(m, ms.Accept))
    out = one.tell(member, ev.Received(one.ranked[0], accept))
    kinds = [type(step.message) if isinstance(step, ev.Send) else type(step) for step in out]
    assert kinds.index(ev.Persist) < kinds.index(ms.Voted)


def test_the_death_of_the_coordinator_in_the_vote_loses_nothing(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter()
    one.deliver()
    one.reduced(first, second)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept) and r == second)
    one.post = []  # second voted, and nobody heard of it; third never finished
    for name in (second, third):
        one.tell(name, ev.Suspected(first))
    one.deliver(lambda s, r, m: first not in (s, r))
    fetch = one.said(third, ev.Fetch)[-1]
    assert fetch.value.digest == b"result"
    assert second in fetch.holders
    one.tell(third, ev.Held(1, b"result"))
    one.deliver(lambda s, r, m: first not in (s, r))
    assert one.committed(second) == one.committed(third) == [(1, b"result", True)]
    one.tell(first, ev.Suspected(second))  # a zombie, with its old ballot
    one.pass_time(2.0, first)
    one.deliver()
    assert one.committed(first) == [(1, b"result", True)]


def test_a_member_that_dies_in_the_reduction_is_left_out_and_told(table):
    one = table("abcd")
    dead = one.ranked[2]
    one.enter()
    one.deliver()
    one.tell(one.ranked[0], ev.Suspected(dead))
    one.deliver(lambda s, r, m: dead not in (s, r))
    alive = [name for name in one.ranked if name != dead]
    assert {one.chains[name].declaration.peers for name in alive} == {tuple(alive)}
    one.reduced(*alive)
    one.deliver()
    assert all(one.committed(name) == [(1, b"result", True)] for name in alive)
    error = one.said(dead, ev.Failed)[0].error
    assert isinstance(error, Excluded)
    assert error.why == "silent"


def test_bad_contributions_are_left_out_by_name(table):
    one = table("abcd")
    bad = one.ranked[1]
    one.enter()
    one.deliver()
    reporter = one.ranked[2]
    ballot = one.chains[reporter].declaration.ballot
    one.tell(reporter, ev.Stuck(ballot, frozenset([bad]), "nonfinite"))
    one.deliver()
    one.pass_time(0.2)
    one.deliver()
    error = one.said(bad, ev.Failed)[0].error
    assert isinstance(error, Excluded)
    assert error.why == "nonfinite"
    assert bad not in one.chains[reporter].declaration.peers


def test_a_coordinator_that_restarts_does_not_use_ballot_zero_again(table):
    one = table("abc")
    first = one.ranked[0]
    one.enter()
    one.deliver()
    one.restart(first)
    one.post = []
    one.enter(first)
    one.deliver()
    assert one.chains[first].lead is not None
    assert one.chains[first].lead.ballot.number > 0


def test_whoever_lost_its_journal_has_no_seat(table):
    one = table("abc")
    first, second, third = one.ranked
    one.tell(second, ev.Suspected(first))
    one.enter(second)
    lead = one.chains[second].lead
    one.tell(second, ev.Received(third, ms.Promise(1, lead.ballot, 77, None, (), None)))
    assert lead.prepared_at is None
    one.tell(second, ev.Received(third, ms.Promise(1, lead.ballot, 0, None, (), None)))
    assert lead.prepared_at is not None


def test_votes_for_a_ballot_are_not_counted_after_a_higher_promise(table):
    one = table("abc")
    first, _second, third = one.ranked
    one.enter()
    one.deliver()
    one.reduced()
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept))  # the votes are on their way
    votes = [step for step in one.post if isinstance(step[2], ms.Voted)]
    assert len(votes) == 2
    one.tell(first, ev.Received(third, ms.Prepare(1, Ballot(1, third))))
    for sender, _, vote in votes:
        one.tell(first, ev.Received(sender, vote))
    assert one.committed(first) == []


def test_the_highest_vote_found_is_proposed(table):
    one = table("abcde")
    a, b, c, d, e = one.ranked
    one.enter()
    one.deliver()
    declaration = one.chains[a].declaration
    lead_of = one.chains[b]
    one.tell(b, ev.Suspected(a))
    ballot = lead_of.lead.ballot
    values = [ms.Value(declaration, digest) for digest in (b"low", b"high")]
    for peer, number, value in ((c, 0, values[0]), (d, 1, values[1])):
        vote = Vote(Ballot(number, a if number == 0 else e), value, (a, e))
        promise = ms.Promise(1, ballot, 0, vote, (value.digest,), None)
        one.tell(b, ev.Received(peer, promise))
    assert lead_of.lead.value.digest == b"high"


def test_a_value_whose_bytes_nobody_has_stops_all_until_its_teller_answers(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter()
    one.deliver()
    one.reduced(first, third)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept) and r == third)
    one.post = []
    one.restart(third)  # its vote is in the journal, its bytes are gone
    one.tell(second, ev.Suspected(first))
    one.deliver(lambda s, r, m: first not in (s, r))
    assert one.chains[second].lead.declaration is None
    assert one.chains[second].unheld
    one.restart(first)
    one.tell(second, ev.Alive(first))
    one.enter(first, third)
    one.run(1.0)
    one.reduced(digest=b"anew")
    one.deliver()
    assert {one.committed(name)[0][:2] for name in one.ranked} == {(1, b"anew")}


def test_what_a_leaver_voted_for_is_found(table):
    one = table("abcd")
    first, second, third, fourth = one.ranked
    one.enter()
    one.deliver()
    one.reduced(first, second)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept) and r == second)
    one.post = []
    one.tell(second, ev.Leave())
    one.deliver(lambda s, r, m: s == second and r != first)
    one.tell(third, ev.Suspected(first))
    for _ in range(30):
        one.deliver(lambda s, r, m: {s, r} == {third, fourth})
        one.pass_time(0.1, third, fourth)
    lead = one.chains[third].lead
    assert set(lead.promises) == {third, fourth}
    assert lead.declaration is None
    assert one.chains[third].unheld


def test_a_leaver_that_counted_votes_says_that_it_decided_nothing(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter()
    one.deliver()
    one.reduced(first)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept) and r == third)
    one.post = []  # first voted; third may have, for all that second knows
    one.tell(first, ev.Leave())
    one.deliver(lambda s, r, m: r == second)
    one.tell(second, ev.Suspected(third))
    one.pass_time(3.0, second)
    assert one.chains[second].declaration.peers == (second,)


def in_the_vote(table, names):
    """The first two are the members; the second voted, and nobody heard of it."""
    one = table(names)
    first, second = one.ranked[:2]
    one.enter(first, second, limit_s=20.0)
    one.deliver()
    one.pass_time(1.0)
    one.deliver()
    one.reduced(first, second)
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept))
    assert one.saved[second].vote.value.digest == b"result"
    one.post = []
    return one


def test_a_value_is_passed_over_where_too_few_are_left_for_it_and_its_teller_says_so(table):
    one = in_the_vote(table, "ab")
    first, second = one.ranked
    one.tell(first, ev.Suspected(second))
    one.pass_time(1.0, first)
    assert one.chains[first].declaration.peers == (first,)
    one.reduced(first, digest=b"alone")
    assert one.committed(first) == [(1, b"alone", True)]
    one.post = []
    one.restart(second)  # it comes back, with its vote, and finds out
    one.enter(second)
    one.deliver()
    assert one.chains[second].epoch == 1
    assert one.said(second, ev.Fetch)[-1].value.digest == b"alone"


def test_a_value_that_somebody_lost_may_have_decided_stands(table):
    one = in_the_vote(table, "abc")
    first, second, third = one.ranked
    one.enter(third, limit_s=20.0)
    for name in (second, third):
        one.tell(name, ev.Suspected(first))
    for _ in range(30):
        one.deliver(lambda s, r, m: first not in (s, r))
        one.pass_time(0.1, second, third)
    assert one.chains[second].declaration.peers == (first, second)
    lead = one.chains[second].lead
    assert lead.value.digest == b"result"
    assert set(lead.tellers) == {first, second}
    one.tell(second, ev.Alive(first))
    one.run(2.0)
    assert {one.committed(name)[0][:2] for name in (first, second)} == {(1, b"result")}


def test_bytes_that_came_too_late_for_one_ballot_serve_another(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter()
    one.deliver()
    declaration = one.chains[third].declaration
    one.tell(third, ev.Withdraw())

    def accept(number, owner, digest):
        value = ms.Value(declaration, digest)
        message = ms.Accept(1, Ballot(number, owner), value, (owner,), (first, second))
        return one.tell(third, ev.Received(owner, message))

    accept(0, first, b"one")
    one.tell(third, ev.Received(second, ms.Prepare(1, Ballot(1, second))))
    one.tell(third, ev.Held(1, b"one"))
    accept(1, second, b"two")
    assert [fetch.value.digest for fetch in one.said(third, ev.Fetch)] == [b"one", b"two"]
    assert one.said(third, ev.Release) == []
    accept(2, first, b"one")
    assert one.saved[third].vote.value.digest == b"one"


def test_whoever_knows_only_leavers_is_told_what_it_missed(table):
    one = table("ab")
    first, second = one.ranked
    join(one, first)
    one.tell(first, ev.Suspected(second))
    one.enter("j")
    one.deliver(lambda s, r, m: second not in (s, r))
    one.enter(first)
    one.deliver(lambda s, r, m: second not in (s, r))
    one.reduced("j", first)
    one.deliver(lambda s, r, m: second not in (s, r))
    assert set(one.chains["j"].config.peers) == {"j", first}
    one.tell(first, ev.Leave())
    one.deliver(lambda s, r, m: r == "j")
    one.post = []
    one.enter("j")
    one.pass_time(1.0, "j")
    one.reduced("j", digest=b"alone")
    assert one.chains["j"].epoch == 2
    one.deliver(lambda s, r, m: s == "j")
    assert one.chains[second].epoch == 2


def test_whoever_asked_once_is_told_by_those_who_never_heard_it(table):
    one = table("ab")
    first, second = one.ranked
    join(one, first, "i")  # no member of anything yet
    one.tell(first, ev.Suspected(second))
    join(one, first)
    one.enter("j")
    one.deliver(lambda s, r, m: {s, r} == {first, "j"})
    one.enter(first)
    one.deliver(lambda s, r, m: {s, r} == {first, "j"})
    one.reduced("j", first)
    one.deliver(lambda s, r, m: {s, r} == {first, "j"})
    assert set(one.chains["j"].former) == {second, "i"}
    one.post = []
    one.tell("j", ev.Suspected("i"))
    one.tell("j", ev.Alive("i"))
    one.deliver()
    assert one.chains["i"].epoch == 1


def test_whoever_is_trusted_again_and_no_member_is_told_what_it_missed(table):
    one = table("ab")
    first, second = one.ranked
    one.tell(first, ev.Suspected(second))
    one.enter(first)
    one.pass_time(1.0, first)
    one.reduced(first)
    assert one.chains[first].epoch == 1
    one.post = []
    one.tell(first, ev.Alive(second))
    one.deliver()
    assert one.chains[second].epoch == 1


def join(one, contact, name="j"):
    joiner = type(one.chains[contact])(name, "run", "outer", None, one.settings, incarnation=7)
    one.chains[name] = joiner
    one.did[name] = []
    one.tell(name, ev.Met((contact,)))
    one.deliver(lambda s, r, m: {s, r} == {contact, name})
    return joiner


def test_leaving_needs_no_deadline(table):
    one = table("ab")
    first, second = one.ranked
    one.enter()
    one.deliver()
    one.reduced()
    one.deliver()
    leaver = one.chains[first].config.peers[0]
    stays = second if leaver == first else first
    out = one.tell(leaver, ev.Leave())
    assert isinstance(out[-1], ev.Left)
    one.deliver()
    one.enter(stays)
    one.pass_time(0.1)
    one.reduced(stays, digest=b"alone")
    assert one.committed(stays)[-1] == (2, b"alone", True)
    out = one.tell(leaver, ev.Enter((one.chains[stays].out and None) or _offer(leaver), 9.0))
    assert isinstance(out[0].error, Superseded)


def _offer(_name):
    return ev.Offer(1, 99, 1.0)


def test_whoever_is_late_is_told_so_and_catches_up(table):
    one = table("abc")
    late = one.ranked[2]
    one.enter(*one.ranked[:2])
    one.deliver()
    one.pass_time(0.6)
    one.deliver()
    one.enter(late)
    one.deliver()
    one.reduced(*one.ranked[:2])
    one.deliver()
    error = one.said(late, ev.Failed)[0].error
    assert isinstance(error, Excluded)
    assert error.why == "late"
    one.tell(late, ev.Held(1, b"result"))
    assert one.committed(late) == [(1, b"result", False)]


def test_whoever_was_late_is_waited_for_a_little_in_the_next_epoch(table):
    one = table("abc")
    late = one.ranked[2]
    one.enter(*one.ranked[:2])
    one.deliver()
    one.pass_time(0.6)
    one.enter(late)
    one.deliver()
    one.reduced(*one.ranked[:2])
    one.deliver()
    one.tell(late, ev.Held(1, b"result"))
    seated = one.chains[late].config.peers
    assert late not in seated
    one.enter(*seated)
    one.deliver()
    assert one.chains[seated[0]].declaration is None
    one.enter(late)
    one.deliver()
    assert set(one.chains[seated[0]].declaration.peers) == set("abc")


def test_whoever_does_not_come_again_is_waited_for_once(table):
    one = table("abc")
    one.enter(*one.ranked[:2])
    for epoch, wait_s in ((1, 1.0), (2, 1.0), (3, 0.0)):
        one.run(wait_s)
        members = one.chains["a"].config.peers if epoch > 1 else one.ranked[:2]
        one.reduced(*members, digest=bytes([epoch]))
        one.deliver()
        assert one.chains[members[0]].epoch == epoch
        one.enter(*members)


def test_whoever_was_overtaken_is_waited_for_in_this_epoch_and_the_next(table):
    one = table("abc")
    for name in "abc":
        one.tell(name, ev.Coming("z", 1.0))
    for epoch, waits in ((1, True), (2, True), (3, False)):
        one.enter()
        one.run(0.9)
        assert all(chain.declaration is None for chain in one.chains.values()) is waits
        one.run(5.0)
        one.reduced(digest=bytes([epoch]))
        one.deliver()


def test_a_caller_that_was_told_an_error_hears_of_a_later_decision(table):
    one = table("abc")
    _first, _second, _third = one.ranked
    one.enter(limit_s=1.0)
    one.deliver()
    one.reduced()
    one.deliver(lambda s, r, m: isinstance(m, ms.Accept))
    one.post = []  # every vote is lost
    one.pass_time(1.0)
    one.post = []
    assert all(isinstance(one.said(name, ev.Failed)[-1].error, RoundExpired) for name in one.ranked)
    one.enter()
    one.pass_time(0.5)
    one.deliver()
    for name in one.ranked:
        assert one.committed(name) == [(1, b"result", False)]
        assert isinstance(one.said(name, ev.Failed)[-1].error, Behind)


def test_a_minority_is_told_before_its_deadline(table):
    one = table("abcd")
    alone = one.ranked[3]
    one.enter(alone, limit_s=60.0)
    for name in one.ranked[:3]:
        one.tell(alone, ev.Suspected(name))
    one.pass_time(6.0, alone)
    assert isinstance(one.said(alone, ev.Failed)[0].error, NoQuorum)


def test_another_state_is_refused(table):
    one = table("abc")
    odd = one.ranked[1]
    one.enter(odd, state=b"else")
    one.enter(one.ranked[0], one.ranked[2])
    one.deliver()
    assert isinstance(one.said(odd, ev.Failed)[0].error, Diverged)
    assert odd not in one.chains[one.ranked[0]].declaration.peers


def test_a_coordinator_with_another_state_steps_back(table):
    one = table("abc")
    odd = one.ranked[0]
    one.enter(odd, state=b"else")
    one.enter(*one.ranked[1:])
    one.deliver()
    one.pass_time(1.0)
    one.deliver()
    assert isinstance(one.said(odd, ev.Failed)[0].error, Diverged)
    assert one.chains[one.ranked[1]].declaration.peers == one.ranked[1:]


def test_a_joiner_is_a_member_of_the_next_epoch_and_an_acceptor_of_the_one_after(table):
    one = table("ab")
    joiner = join(one, "a")
    assert joiner.epoch == 0
    one.enter("j")
    one.deliver()
    one.enter("a", "b")
    one.deliver()
    names = ("a", "b", "j")
    one.reduced(*names)
    one.deliver()
    assert one.committed("j") == [(1, b"result", True)]
    assert Seat("j", 7) in joiner.config.seats


def test_a_coordinator_whose_caller_is_late_hands_over(table):
    one = table("abc")
    one.enter(*one.ranked[1:])
    one.run(2.0)
    assert one.chains[one.ranked[1]].declaration.peers == one.ranked[1:]


def test_only_one_round_of_a_tag_is_open(table):
    one = table("ab")
    one.enter("a")
    one.enter("a")
    assert isinstance(one.said("a", ev.Failed)[0].error, Superseded)
    assert one.said("a", ev.Failed)[0].nonce == 2


def test_a_forged_decision_is_not_believed(table):
    one = table("abc")
    first, second, third = one.ranked
    one.enter()
    one.deliver()
    declaration = one.chains[third].declaration
    value = ms.Value(declaration, b"forged")
    certificate = ms.Certificate(Ballot(0, first), (third,))
    decided = Decided(declaration.config(), value, certificate)
    one.tell(second, ev.Received(third, ms.Commit(decided)))
    assert one.chains[second].epoch == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("members_min", 0), ("resend_s", 0.0), ("grace_first_s", 99.0), ("backoff_s", float("nan"))],
)
def test_settings_refuse_what_cannot_work(field, value):
    with pytest.raises(ValueError, match=field):
        Settings(**{field: value})


def test_nothing_is_known_before_anything_is_decided():
    ledger = Ledger("a", None, 3, None)
    assert ledger.epoch == -1
    assert ledger.promised == NO_BALLOT
    with pytest.raises(RuntimeError):
        _ = ledger.config
