"""Guessers, how much is guessed, and a small model that guesses for a large one."""

from __future__ import annotations

import random

import pytest

from model_shards import ConfigError, Draft, Pace, PromptLookup, Sampling, Speculation, Step, Window
from model_shards.speculate import grown

PROMPT = tuple((11 * at + 5) % 97 for at in range(21))


def line_of(window):
    assert window.straight
    return list(window.tokens)


def test_look_up_finds_what_followed_the_longest_latest_match():
    text = [1, 2, 3, 40, 9, 2, 3, 50, 9, 1, 2, 3]
    assert line_of(PromptLookup(text).guess(4)) == [3, 40, 9, 2]
    assert line_of(PromptLookup([*text[:-3], 7, 2, 3]).guess(3)) == [3, 50, 9]
    assert line_of(PromptLookup([5, 6, 7, 8]).guess(4)) == [8]
    assert line_of(PromptLookup([5]).guess(4)) == [5]
    assert line_of(PromptLookup(text).guess(1)) == [3]


def test_look_up_supposes_that_a_repetition_goes_on():
    assert line_of(PromptLookup([4, 1, 2, 3, 1, 2, 3]).guess(9)) == [3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert line_of(PromptLookup([7, 7, 7]).guess(5)) == [7] * 5


def test_look_up_follows_a_text_that_grows():
    guesser = PromptLookup([1, 2, 3, 4, 5])
    guesser.add([9, 1])
    guesser.add([2])
    assert line_of(guesser.guess(3)) == [2, 3, 4]


def test_look_up_is_not_misled_by_bytes_between_two_tokens():
    # The bytes of (256, 256) stand one byte off in (1 << 16, 1 << 16).
    text = [1 << 16, 1 << 16, 3, 256, 256]
    assert line_of(PromptLookup(text).guess(3)) == [256]
    assert line_of(PromptLookup([256, 256, 5, *text]).guess(3)) == [256, 5, 1 << 16]


@pytest.mark.parametrize("seed", range(20))
def test_look_up_equals_a_plain_search(seed):
    chance = random.Random(seed)
    text = [chance.randrange(4) for _ in range(chance.randrange(1, 60))]
    expected = None
    for size in range(min(5, len(text) - 1), 1, -1):
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if ends:
            whole = list(text)
            for at in range(6):
                whole.append(whole[ends[-1] + at])
            expected = whole[len(text) - 1 :]
            break
    assert line_of(PromptLookup(text).guess(7)) == (expected or text[-1:])


def test_several_matches_share_a_tree():
    text = [1, 2, 30, 31, 1, 2, 40, 41, 1, 2]
    window = PromptLookup(text, branches=3).guess(8)
    assert window.tokens[0] == 2
    assert window.path([40, 41, 1, 2]) == (1, 2, 3, 4)
    first = window.follow(30, 0)
    assert window.parents[first] == 0
    assert window.rows == 8


def test_lines_that_begin_alike_share_rows_and_each_gets_one():
    window = grown(9, [[1, 2, 3], [1, 2, 4], [5, 6]], 6)
    assert window == Window((-1, 0, 1, 2, 2, 0), (9, 1, 2, 3, 4, 5))
    assert grown(9, [[1, 2, 3, 4, 5], [6]], 4) == Window((-1, 0, 1, 0), (9, 1, 2, 6))
    assert window.problem() == ""


class Machine:
    """Passes take ``first_s`` and ``more_s`` for every further row, a little off by chance; a guess is right with the
    chance ``right``."""

    def __init__(self, first_s, more_s, right, seed=0, noise=0.05):
        self.first_s, self.more_s, self.right, self.noise = first_s, more_s, right, noise
        self.chance = random.Random(seed)
        self.pace = Pace()
        self.tokens, self.spent_s, self.rows = 0, 0.0, []

    def run(self, passes, limit=8):
        for _ in range(passes):
            rows = self.pace.rows(limit)
            took_s = self.first_s + self.more_s * (rows - 1)
            took_s *= 1 + self.noise * (2 * self.chance.random() - 1)
            right = 0
            while right < rows - 1 and self.chance.random() < self.right:
                right += 1
            self.pace.told(rows, right, right < rows - 1, took_s)
            self.tokens += 1 + right
            self.spent_s += took_s
            self.rows.append(rows)
        return self

    @property
    def gain(self):
        """Times as many tokens a second as without guesses."""
        return self.tokens * self.first_s / self.spent_s


@pytest.mark.parametrize("more_s", [0.0, 0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("right", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_guessing_is_never_slower_than_its_bound(more_s, right, seed):
    machine = Machine(1.0, more_s, right, seed).run(600)
    # Of 600 passes 2 % and once a few tokens' time; measuring is off by up to 5 %.
    assert machine.gain > 1 - 0.02 - 8 / 600 - 0.01


def test_guesses_that_cost_little_and_are_right_are_made_in_full():
    assert Machine(1.0, 0.05, 0.95).run(300).gain > 4
    assert Machine(1.0, 0.5, 0.9).run(300).gain > 1.3


def test_guessing_begins_again_when_guesses_get_better():
    machine = Machine(1.0, 0.1, 0.0).run(300)
    assert sum(rows > 1 for rows in machine.rows[100:]) < 60
    machine.right = 0.95
    machine.rows.clear()
    machine.run(150)
    assert sum(rows == 8 for rows in machine.rows[-50:]) > 40


def test_one_row_is_left_where_no_more_are_wanted():
    machine = Machine(1.0, 0.01, 1.0).run(50, limit=1)
    assert set(machine.rows) == {1}
    assert max(machine.run(50, limit=3).rows) == 3


def test_the_first_pass_guesses_nothing_for_there_is_nothing_to_compare_with():
    assert Pace().rows(8) == 1


class Steady:
    """A pace that wants whatever it may have."""

    def rows(self, limit):
        return limit

    def told(self, rows, right, wrong, seconds):
        self.last = (rows, right, wrong, seconds)


def test_a_speculation_tells_its_pace_and_its_guesser_what_came():
    pace = Steady()
    speculation = Speculation(PromptLookup([1, 2, 3, 4, 1, 2]), pace)
    assert line_of(speculation.next(4)) == [2, 3, 4, 1]
    assert speculation.came([3, 4, 9], 0.5) == (1, 2)
    assert pace.last == (4, 2, True, 0.5)
    assert (speculation.guessed, speculation.right) == (3, 2)
    assert line_of(speculation.next(4)) == [9]
    assert speculation.came([1], 0.25) == ()
    assert pace.last == (1, 0, False, 0.25)
    assert line_of(speculation.next(5)) == [1]
    assert speculation.came([2], 0.25) == ()
    assert line_of(speculation.next(5)) == [2, 3, 4, 9, 1]
    assert speculation.came([3, 4, 9, 1, 7], 0.1) == (1, 2, 3, 4)
    assert pace.last == (5, 4, False, 0.1)


def test_nothing_is_guessed_from_an_end_on():
    speculation = Speculation(PromptLookup([1, 2, 3, 0, 5, 1, 2]), Steady(), frozenset({0}))
    assert line_of(speculation.next(6)) == [2, 3]


def test_a_window_never_has_more_rows_than_may_be():
    assert Speculation(PromptLookup([7] * 9), Steady()).next(1000).rows == 32
    assert Speculation(PromptLookup([7] * 9), Steady()).next(0).rows == 1


def speculated(engine, draft, sampling, count):
    """``count`` tokens with the draft's guesses, and (guessed, right)."""
    engine.open("s", 0, 4, len(PROMPT) + count)
    made = [engine.run([Step("s", 0, tokens=PROMPT, sample=sampling)])[0].token]
    draft.add(made)
    speculation = Speculation(draft, Steady())
    while len(made) < count:
        window = speculation.next(min(5, count - len(made)))
        step = Step("s", len(PROMPT) + len(made) - 1, tokens=window.tokens, sample=sampling, window=window)
        tokens = [pick.token for pick in engine.run([step])[0].verdict.picks]
        speculation.came(tokens, 0.1)
        made += tokens
    engine.close("s")
    return made, (speculation.guessed, speculation.right)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, seed=8, top_p=0.95)])
def test_a_draft_changes_no_text_and_an_equal_one_is_always_right(make_reference, llama, tools, sampling):
    engine, same = (tools.engines_of(llama.directory, (0, 4))[0] for _ in range(2))
    other = make_reference("llama", seed=1, num_hidden_layers=2)
    small = tools.engines_of(other.directory, (0, 2))[0]
    engine.open("s", 0, 4, 60)
    token, expected = engine.run([Step("s", 0, tokens=PROMPT, sample=sampling)])[0].token, []
    while len(expected) < 31:
        expected.append(token)
        token = engine.run([Step("s", 20 + len(expected), tokens=(token,), sample=sampling)])[0].token
    engine.close("s")
    found = {}
    for name, drafting in (("same", same), ("small", small)):
        draft = Draft(drafting, "d", 60, sampling, 97, PROMPT)
        made, found[name] = speculated(engine, draft, sampling, 31)
        assert made[:31] == expected
        draft.close()
        assert drafting.kv_blocks_free == drafting.kv_blocks
    assert found["same"] == (24, 24)
    assert found["small"][1] < found["small"][0]


def test_a_draft_guesses_nothing_beyond_its_own_context(llama, tools):
    draft = Draft(tools.engines_of(llama.directory, (0, 4))[0], "d", 24, Sampling(temperature=0), 97, PROMPT)
    assert draft.guess(8).rows == 4
    draft.add([1, 2, 3])
    assert draft.guess(8).rows == 1
    draft.add([4] * 20)
    assert draft.guess(8).rows == 1


def test_a_draft_of_another_vocabulary_is_refused(llama, tools):
    with pytest.raises(ConfigError, match="97, expected that of the model it guesses for, 98"):
        Draft(tools.engines_of(llama.directory, (0, 4))[0], "d", 24, Sampling(), 98)
