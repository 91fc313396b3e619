"""The checks can fail: each rule of the protocol, broken on purpose, is found out by a history or by a scene."""

import importlib.util
from pathlib import Path

import pytest

# rule -> the seed of a history that finds it out, or one of those just after it does, and what is found
WINDOW = 40
HISTORIES = {
    "half_is_a_quorum": (6, "is decided twice"),
    "one_vote_decides": (9, "is decided twice"),
    "votes_for_bytes_not_held": (0, "votes for bytes it does not hold"),
    "nothing_is_saved": (0, "not on disk"),
    "promises_are_not_saved": (0, "not on disk"),
    "votes_found_are_ignored": (7, "is decided twice"),
    "votes_below_a_promise": (90, "not on disk"),
    "any_attempt_will_do": (26, "is not the mean over its members"),
    "rounds_do_not_expire": (0, "for ever"),
    "states_are_not_compared": (0, "on another state"),
    "nobody_takes_over": (0, "for ever"),
    "nothing_is_asked_again": (0, "no progress after healing"),
    "decisions_come_twice": (0, "again"),
    "what_was_missed_is_missed_for_ever": (52, "counts in it, and is told Behind"),
}
SCENES_IN = ("test_rules.py", "test_counted.py")
SCENES = {
    "the_lowest_vote_is_taken": "test_the_highest_vote_found_is_proposed",
    "lost_bytes_are_passed_over_too_soon": (
        "test_a_value_whose_bytes_nobody_has_stops_all_until_its_teller_answers"
    ),
    "only_the_last_teller_is_remembered": "test_a_value_that_somebody_lost_may_have_decided_stands",
    "what_leavers_voted_is_forgotten": "test_what_a_leaver_voted_for_is_found",
    "leavers_never_count": "test_a_leaver_that_promised_more_still_counts_against_lower_ballots",
    "restarts_begin_with_ballot_zero": "test_a_coordinator_that_restarts_does_not_use_ballot_zero_again",
    "old_ballots_are_still_counted": "test_votes_for_a_ballot_are_not_counted_after_a_higher_promise",
    "lost_journals_keep_their_seats": "test_whoever_lost_its_journal_has_no_seat",
    "only_the_last_decision_is_told": "test_whoever_hears_of_its_result_together_with_the_next_one_is_given_it",
    "voters_alone_are_asked_for_bytes": "test_all_members_are_asked_for_a_result_and_those_who_seem_dead_last",
    "the_dead_are_asked_first": "test_all_members_are_asked_for_a_result_and_those_who_seem_dead_last",
    "whoever_cannot_go_on_waits_for_its_deadline": (
        "test_a_quorum_that_cannot_tell_what_a_dead_one_decided_is_told_so"
    ),
}


@pytest.fixture
def broken(mutations, monkeypatch):
    def breaks(name):
        def patch(owner, attribute, new):
            if hasattr(owner, "__globals__"):
                monkeypatch.setitem(owner.__globals__, attribute, new)
            else:
                monkeypatch.setattr(owner, attribute, new)

        mutations[name](patch)

    return breaks


@pytest.mark.parametrize(("name", "seed", "found"), [(name, *one) for name, one in HISTORIES.items()])
def test_a_history_finds_a_broken_rule(world, broken, name, seed, found):
    broken(name)
    with pytest.raises((world.Violation, RuntimeError), match=found):
        histories(world, seed)


def histories(world, first):
    for seed in range(first, first + WINDOW):
        world.World(seed).run()


def load(file):
    spec = importlib.util.spec_from_file_location("scenes", Path(__file__).with_name(file))
    scenes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenes)
    return scenes


@pytest.mark.parametrize(("name", "scene"), SCENES.items())
def test_a_scene_finds_a_broken_rule(table, broken, name, scene):
    play = next(found for file in SCENES_IN if (found := getattr(load(file), scene, None)) is not None)
    given = (table,) if play.__code__.co_argcount else ()
    play(*given)
    broken(name)
    with pytest.raises((AssertionError, RuntimeError)):
        play(*given)


def test_every_rule_has_one_that_finds_it_out(mutations):
    assert set(mutations) == set(HISTORIES) | set(SCENES)
