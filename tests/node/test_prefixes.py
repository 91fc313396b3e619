"""Marks of prompts, what nodes tell of their caches, and which chains hold a prompt's beginning."""

from __future__ import annotations

import pytest

from node.serve.prefixes import (
    MARKS_TOLD_MAX,
    Finder,
    Held,
    Teller,
    marks_of,
    next_mark,
    read_summary,
    scope_of,
    stand_ins,
    told_mark,
)
from node.serve.protocol import MARK_BYTES, PIECE_TOKENS, StageRef

P = PIECE_TOKENS
PROMPT = tuple(range(3 * P + 1))
WHOLE = (StageRef("a", 0, 4), StageRef("b", 4, 8))


@pytest.mark.parametrize(("tokens", "pieces"), [(1, 0), (P, 0), (P + 1, 1), (2 * P, 1), (2 * P + 1, 2)])
def test_a_piece_is_marked_when_it_is_whole_and_does_not_hold_the_last_token(tokens, pieces):
    assert len(marks_of(PROMPT[:tokens])) == pieces


def test_marks_depend_on_everything_before_them():
    marks = marks_of(PROMPT)
    other = marks_of((999, *PROMPT[1:]))
    assert not set(marks) & set(other)
    assert marks_of((*PROMPT[: 2 * P], *PROMPT[:P], 5))[:2] == marks[:2]
    assert next_mark(marks[0], PROMPT[P : 2 * P]) == marks[1]
    assert {len(mark) for mark in marks} == {MARK_BYTES}


def test_a_later_stage_tells_a_mark_apart_by_the_machines_before_it():
    other = (StageRef("z", 0, 4), WHOLE[1])
    assert scope_of(WHOLE, 0) == scope_of(other, 0)
    assert scope_of(WHOLE, 1) != scope_of(other, 1)
    assert told_mark("", 0, 4, b"m") != told_mark("", 0, 5, b"m")


def test_stand_ins_are_ids_of_the_vocabulary_and_differ_between_pieces():
    marks = marks_of(PROMPT)
    ids = stand_ins(marks, 300)
    assert len(ids) == 3 * P + 1
    assert max(ids) < 300
    assert ids[:P] != ids[P : 2 * P]
    assert stand_ins(marks[:2], 300)[: 2 * P] == ids[: 2 * P]
    assert stand_ins((), 300) == ()


def test_the_ends_of_chains_are_forgotten_before_their_beginnings():
    held = Held(4)
    held.use([b"a1", b"a2", b"a3"])
    held.use([b"b1", b"b2"])
    assert [mark in held for mark in (b"a1", b"a2", b"a3", b"b1", b"b2")] == [True, True, False, True, True]
    held.drop([b"b2"])
    assert b"b2" not in held


def test_a_summary_is_bounded_and_holds_the_latest():
    held = Held(10_000)
    marks = [number.to_bytes(MARK_BYTES, "big") for number in range(500)]
    for mark in marks:
        held.use([mark])
    assert read_summary(held.summary()) == frozenset(marks[-MARKS_TOLD_MAX:])


def tellers(counts, chain=WHOLE, marks=None):
    """What each stage of a chain tells when it holds the first so many pieces."""
    marks = marks_of(PROMPT) if marks is None else marks
    found = []
    for index, (stage, count) in enumerate(zip(chain, counts, strict=True)):
        scope = scope_of(chain, index)
        told = frozenset(told_mark(scope, stage.start, stage.end, mark) for mark in marks[:count])
        found.append((stage.peer, Teller(stage.start, stage.end, told)))
    return found


def test_a_chain_holds_as_much_as_the_stage_that_holds_least():
    (found,) = Finder().holdings(tellers([3, 2]), 8, marks_of(PROMPT))
    assert (found.stages, found.tokens) == (WHOLE, 2 * P)
    assert Finder().holdings(tellers([3, 0]), 8, marks_of(PROMPT)) == []
    assert Finder().holdings(tellers([3, 3]), 8, marks_of((7, *PROMPT))) == []


def test_the_chain_that_holds_most_comes_first():
    other = (StageRef("c", 0, 4), StageRef("d", 4, 8))
    found = Finder().holdings([*tellers([1, 1]), *tellers([3, 3], other)], 8, marks_of(PROMPT))
    assert [(h.stages, h.tokens) for h in found] == [(other, 3 * P), (WHOLE, P)]


def test_what_was_computed_behind_another_machine_is_not_held_for_this_one():
    other = (StageRef("c", 0, 4), WHOLE[1])
    mixed = [tellers([3, 3])[1], *tellers([3, 0], other)[:1]]
    assert Finder().holdings(mixed, 8, marks_of(PROMPT)) == []


def test_what_was_sent_just_now_is_known_before_anybody_tells_it():
    finder, marks = Finder(), marks_of(PROMPT)
    quiet = [("a", Teller(0, 4, frozenset())), ("b", Teller(4, 8, frozenset()))]
    finder.sent(WHOLE, marks[:2])
    (found,) = finder.holdings(quiet, 8, marks)
    assert (found.stages, found.tokens) == (WHOLE, 2 * P)
    assert finder.holdings(quiet[:1], 8, marks) == [], "b is gone"
    finder.gone(WHOLE)
    assert finder.holdings(quiet, 8, marks) == []


def test_the_search_ends_however_much_is_told():
    marks = marks_of(tuple(range(9 * P)))
    crowd = []
    for number in range(40):
        chain = tuple(StageRef(f"n{number}-{k}", k, k + 1) for k in range(8))
        crowd += tellers([len(marks)] * 8, chain, marks)
    assert len(Finder().holdings(crowd, 8, marks)) <= 40
