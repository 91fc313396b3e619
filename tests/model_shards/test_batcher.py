"""The batcher's promises under any order of events, and its choices one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model_shards import Batcher, BatchLimits, LocalFault, Resume, Run

BLOCKS = 40
LIMITS = BatchLimits(rows_max=3, chunk_tokens_max=16, yields_from=2)


class Machine(RuleBasedStateMachine):
    """Plays engine and sessions: blocks are counted here apart from the batcher's own books."""

    def __init__(self):
        super().__init__()
        self.core = Batcher(BLOCKS, LIMITS)
        self.now = 0.0
        self.held: dict[str, int] = {}
        self.out: dict[str, int] = {}
        self.waiting: dict[int, tuple[str, int]] = {}
        self.counts: dict[int, int] = {}
        self.passed: dict[int, int] = {}
        self.priority: dict[str, int] = {}
        self.running: Run | None = None
        self.named = 0

    @property
    def free(self):
        return BLOCKS - sum(self.held.values())

    def urgent(self, name):
        return self.priority[name] < LIMITS.yields_from

    @precondition(lambda self: self.running is None)
    @rule(priority=st.sampled_from((0, 1, 2, 2)), blocks=st.integers(1, 30))
    def open(self, priority, blocks):
        room = self.core.room(priority, blocks, self.free, self.now)
        for guest in room.parked:
            assert self.priority[guest] >= LIMITS.yields_from > priority
            self.out[guest] = self.held.pop(guest)
            self.core.parked(guest, self.out[guest])
        if room.refused_s is not None:
            assert 0 < room.refused_s <= 60
            assert not room.parked
            return
        assert blocks <= self.free
        name = f"s{self.named}"
        self.named += 1
        self.held[name], self.priority[name] = blocks, priority
        self.core.opened(name, priority, blocks, blocks, 2 * blocks, self.now)

    @precondition(lambda self: self.priority)
    @rule(data=st.data(), count=st.sampled_from((1, 1, 5, 16)))
    def submit(self, data, count):
        name = data.draw(st.sampled_from(sorted(self.priority)))
        busy = {session for session, _ in self.waiting.values()}
        if name in busy or (self.running and name in self.running.sessions):
            return
        number = self.core.submitted(name, count, self.now)
        self.waiting[number] = (name, count)
        self.counts[number] = count
        self.passed[number] = 0

    @precondition(lambda self: self.priority)
    @rule(data=st.data())
    def close(self, data):
        name = data.draw(st.sampled_from(sorted(self.priority)))
        gone = self.core.closed(name)
        assert set(gone) == {n for n, (session, _) in self.waiting.items() if session == name}
        for number in gone:
            del self.waiting[number]
        del self.priority[name]
        if self.running and not any(session in self.priority for session in self.running.sessions):
            assert self.core.stop == "abandoned"
        if not (self.running and name in self.running.sessions):
            self.held.pop(name, None)
        self.out.pop(name, None)

    @precondition(lambda self: self.running is None)
    @rule()
    def begin(self):
        chosen = self.core.next(self.free, self.now)
        able = {n: w for n, w in self.waiting.items() if w[0] in self.held}
        if chosen is None:
            assert not able
            assert all(self.out[session] > self.free for session, _ in self.waiting.values())
        elif isinstance(chosen, Resume):
            assert self.out[chosen.session] <= self.free
            self.held[chosen.session] = self.out.pop(chosen.session)
            self.core.resumed(chosen.session, self.now)
        else:
            self.check_run(chosen, able)

    def check_run(self, chosen, able):
        names = [able[number][0] for number in chosen.work]
        assert tuple(names) == chosen.sessions
        assert len(set(names)) == len(names) <= LIMITS.rows_max
        counts = [able[number][1] for number in chosen.work]
        assert len(counts) == 1 or set(counts) == {1}
        if any(self.urgent(session) for session, _ in able.values()):
            assert all(self.urgent(name) for name in names)
        if counts[0] > 1:
            for number, (session, count) in able.items():
                if count == 1 and self.urgent(session) and self.urgent(names[0]):
                    self.passed[number] += 1
                    assert self.passed[number] <= 1
        self.running = chosen
        for number in chosen.work:
            del self.waiting[number]

    @precondition(lambda self: self.running is not None)
    @rule(took_s=st.floats(0.001, 2))
    def end(self, took_s):
        self.now += took_s
        again = self.core.stop == "preempted"
        assert not (again and not self.running.yields)
        self.core.finished(self.now, again=again)
        for number, name in zip(self.running.work, self.running.sessions, strict=True):
            if name not in self.priority:
                self.held.pop(name, None)
            elif again:
                self.waiting[number] = (name, self.counts[number])
        self.running = None

    @invariant()
    def promises_hold(self):
        self.core.validate()
        assert self.free >= 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def opened(core, **priorities):
    for at, (name, priority) in enumerate(priorities.items()):
        core.opened(name, priority, 4, 64, 128, float(at))


def test_a_waiting_decode_lets_one_piece_pass_at_most():
    core = Batcher(BLOCKS, LIMITS)
    opened(core, long=1, other=1, talk=1)
    order = []
    for now in range(8):
        for name, count in (("long", 16), ("other", 16), ("talk", 1)):
            if not core._seats[name].work:
                core.submitted(name, count, float(now))
        run = core.next(BLOCKS, float(now))
        order.append(run.sessions[0] == "talk")
        core.finished(now + 0.5)
    assert order == [False, True] * 4


def test_decodes_run_together_and_beyond_the_limit_in_turns():
    core = Batcher(BLOCKS, LIMITS)
    opened(core, a=1, b=1, c=0, d=1)
    for at, name in enumerate("abcd"):
        core.submitted(name, 1, float(at))
    assert core.next(BLOCKS, 9.0).sessions == ("c", "a", "b")
    core.finished(9.1)
    assert core.next(BLOCKS, 9.2).sessions == ("d",)


def test_short_prompts_pass_long_ones_until_these_waited_long():
    core = Batcher(100, LIMITS)
    core.opened("long", 1, 4, 1600, 1700, 0.0)
    core.opened("short", 1, 4, 16, 32, 1.0)
    core.submitted("long", 16, 0.0)
    core.submitted("short", 16, 1.0)
    assert core.next(100, 1.5).sessions == ("short",)
    core.finished(1.6)
    core.opened("later", 1, 4, 16, 32, 200.0)
    core.submitted("later", 16, 200.0)
    assert core.next(100, 200.1).sessions == ("long",)


def test_who_yields_is_parked_for_others_latest_first_and_comes_back_before_newcomers():
    core = Batcher(10, LIMITS)
    core.opened("old", 2, 4, 8, 8, 0.0)
    core.opened("new", 2, 6, 8, 8, 1.0)
    core.submitted("new", 1, 1.0)
    assert core.room(2, 4, 0, 1.0).refused_s is not None
    assert core.room(1, 5, 0, 1.0).parked == ("new",)
    core.parked("new", 6)
    core.opened("guest", 1, 5, 8, 8, 1.0)
    assert core.next(1, 1.0) is None
    core.closed("guest")
    assert core.room(2, 1, 6, 2.0).refused_s is not None
    assert core.next(6, 2.0) == Resume("new")
    core.resumed("new", 2.0)
    assert core.next(0, 2.0).sessions == ("new",)


def test_a_refusal_says_when_the_first_sessions_that_matter_will_be_over():
    core = Batcher(20, LIMITS)
    core.opened("soon", 1, 5, 16, 26, 0.0)
    core.opened("late", 1, 15, 16, 216, 0.0)
    now = 0.0
    for count in (16, 1, 1):
        for name in ("soon", "late"):
            core.submitted(name, count, now)
            core.next(0, now)
            now += 1.0
            core.finished(now)
    soon = core.room(1, 5, 0, now).refused_s
    assert 8 <= soon <= 17  # eight positions to go at one in two seconds
    assert core.room(1, 6, 0, now).refused_s == 60.0
    assert core.room(1, 6, 1, now).refused_s == soon


def test_background_work_stops_for_others_and_runs_again():
    core = Batcher(BLOCKS, LIMITS)
    opened(core, late=2, usual=1)
    number = core.submitted("late", 16, 0.0)
    assert core.next(BLOCKS, 0.0).yields
    assert core.stop == ""
    core.submitted("usual", 1, 0.1)
    assert core.stop == "preempted"
    core.finished(0.2, again=True)
    assert core.next(BLOCKS, 0.2).sessions == ("usual",)
    core.finished(0.3)
    assert core.next(BLOCKS, 0.3).work == (number,)


def test_a_batch_stops_once_nobody_waits_for_any_of_it():
    core = Batcher(BLOCKS, LIMITS)
    opened(core, a=1, b=1)
    core.submitted("a", 1, 0.0)
    core.submitted("b", 1, 0.0)
    core.next(BLOCKS, 0.0)
    core.closed("a")
    assert core.stop == ""
    core.dropped("b")
    assert core.stop == "abandoned"
    core.finished(0.1)
    assert not core.waiting()


@pytest.mark.parametrize("count", [0, 17])
def test_work_is_at_most_a_chunk(count):
    core = Batcher(BLOCKS, LIMITS)
    opened(core, a=1)
    with pytest.raises(LocalFault, match="expected 1 to 16"):
        core.submitted("a", count, 0.0)


def test_windows_share_a_batch_by_their_rows_and_count_as_one_position():
    core = Batcher(100, BatchLimits(rows_max=10))
    for name in "abcd":
        core.opened(name, 1, 1, 0, 50, 0.0)
    assert core.decoding() == 0
    rows = {"a": 4, "b": 6, "c": 1, "d": 5}
    numbers = [core.submitted(name, 1, float(at), rows=rows[name]) for at, name in enumerate(rows)]
    first = core.next(0, 5.0)
    assert first == Run(tuple(numbers[:2]), ("a", "b"), False)
    core.finished(6.0)
    assert core.next(0, 6.0) == Run(tuple(numbers[2:]), ("c", "d"), False)
    core.finished(7.0)
    core.validate()
    assert core.decoding() == 4
    assert core._seats["a"].tokens_left == 49


@pytest.mark.parametrize(("count", "rows"), [(1, 0), (1, 11), (2, 3)])
def test_a_window_that_no_batch_holds_is_the_callers_mistake(count, rows):
    core = Batcher(100, BatchLimits(rows_max=10))
    core.opened("a", 1, 1, 0, 50, 0.0)
    with pytest.raises(LocalFault, match="window"):
        core.submitted("a", count, 0.0, rows=rows)


def test_of_the_parked_whoever_has_room_comes_back():
    """The larger one waits for room that nobody leaves: an idle device serves the smaller one meanwhile."""
    core = Batcher(BLOCKS, LIMITS)
    for name, blocks in (("large", 30), ("small", 1)):
        core.opened(name, 2, blocks, 16, 32, 0.0)
        core.submitted(name, 1, 0.0)
        core.parked(name, blocks)
    assert core.next(30, 1.0) == Resume("large")
    assert core.next(29, 1.0) == Resume("small")
    assert core.next(0, 1.0) is None
    assert core.room(2, 5, 34, 1.0).refused_s is not None, "a newcomer waits for both"
