"""A stopped peer is noticed, a slow one is told from it, a regular one is never suspected."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from collectives.agreement.detector import Detector, DetectorSettings, Health
from collectives.agreement.events import Alive, Suspected

LAN = DetectorSettings()


def beating(gaps, mark=None):
    """A detector that heard `a` with these gaps, and the time."""
    one = Detector()
    one.watch("a", 0.0)
    now = 0.0
    for number, gap in enumerate(gaps):
        now += gap
        one.heard("a", now, None if mark is None else mark(number))
        assert one.poll(now) == []
    return one, now


def first_change(one, now, within_s, step_s=0.05):
    start = now
    while now - start < within_s:
        now += step_s
        changes = one.poll(now)
        if changes:
            return changes, now - start
    return [], within_s


def test_a_stopped_peer_is_suspected_within_two_seconds():
    one, now = beating([0.2] * 50)
    changes, after_s = first_change(one, now, 5.0)
    assert changes == [Suspected("a")]
    assert LAN.silence_min_s <= after_s < 2.0


def test_a_jittery_peer_gets_more_time_but_not_without_end():
    regular, _ = beating([0.2] * 60)
    jittery, now = beating([0.1, 0.4] * 30)
    assert jittery.silence_max_s("a") > regular.silence_max_s("a")
    changes, after_s = first_change(jittery, now, 5.0)
    assert changes == [Suspected("a")]
    assert after_s < 2.0


def test_the_end_of_a_connection_counts_at_once():
    one, now = beating([0.2] * 10)
    one.closed("a")
    assert one.health("a", now) is Health.DEAD
    assert one.poll(now) == [Suspected("a")]
    one.heard("a", now + 0.1)
    assert one.poll(now + 0.1) == [Alive("a")]


def test_a_peer_that_is_heard_and_does_not_get_on_is_slow_and_trusted():
    one, now = beating([0.2] * 50, mark=lambda number: number)
    for _ in range(20):
        now += 0.2
        one.heard("a", now, 49)
        assert one.poll(now) == []
    assert one.health("a", now) is Health.SLOW
    one.heard("a", now + 0.2, 50)
    assert one.health("a", now + 0.2) is Health.ALIVE


def test_long_silence_is_death():
    one, now = beating([0.2] * 10)
    one.poll(now + 0.4)
    assert one.health("a", now + LAN.dead_after_s + 0.1) is Health.DEAD


def test_my_own_pause_is_nobodys_silence():
    one, now = beating([0.2] * 20)
    assert one.poll(now + 30.0) == []
    changes, _ = first_change(one, now + 30.0, 5.0)
    assert changes == [Suspected("a")]


def test_rest_between_rounds_is_no_silence():
    one, now = beating([0.2] * 20)
    one.rest(now + 100.0)
    assert one.poll(now + 100.1) == []


def test_no_more_than_the_bound_are_watched():
    one = Detector(DetectorSettings(peers_max=2))
    assert [one.watch(name, 0.0) for name in "aabc"] == [True, True, True, False]


@pytest.mark.parametrize(
    "wrong", [{"heartbeat_s": 0.0}, {"silence_min_s": 9.0}, {"stall_min_s": 0.0}, {"deviations": 0.0}]
)
def test_settings_refuse_what_cannot_work(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DetectorSettings(**wrong)


class Watching(RuleBasedStateMachine):
    """Against a plain model: when each peer was last heard, and whether its connection stands."""

    @initialize()
    def begin(self):
        self.now = 0.0
        self.one = Detector()
        self.last = {}
        self.shut = set()
        self.trusted = {}
        self.polled = None

    @rule(name=st.sampled_from("abc"))
    def watch(self, name):
        if self.one.watch(name, self.now) and name not in self.last:
            self.last[name] = self.now
            self.trusted[name] = True

    @precondition(lambda self: self.last)
    @rule(data=st.data(), mark=st.none() | st.integers(0, 5))
    def hear(self, data, mark):
        name = data.draw(st.sampled_from(sorted(self.last)))
        self.one.heard(name, self.now, mark)
        self.last[name] = self.now
        self.shut.discard(name)

    @precondition(lambda self: self.last)
    @rule(data=st.data())
    def close(self, data):
        name = data.draw(st.sampled_from(sorted(self.last)))
        self.one.closed(name)
        self.shut.add(name)

    @rule(seconds=st.floats(0.0, 0.45))
    def wait_and_poll(self, seconds):
        self.now += seconds
        for change in self.one.poll(self.now):
            name = change.peer
            assert self.trusted[name] is isinstance(change, Suspected)
            self.trusted[name] = not self.trusted[name]
        for name, last in self.last.items():
            silence_s = self.now - last
            if name in self.shut or silence_s > LAN.silence_max_s + 1e-9:
                assert not self.trusted[name]
            elif silence_s < LAN.silence_min_s:
                assert self.trusted[name]

    @rule(name=st.sampled_from("abc"))
    def forget(self, name):
        self.one.forget(name)
        self.last.pop(name, None)
        self.shut.discard(name)
        self.trusted.pop(name, None)

    @invariant()
    def is_valid(self):
        if hasattr(self, "one"):
            self.one.validate()
            assert (self.one.wake_s is None) == (not self.last)


TestWatching = Watching.TestCase
TestWatching.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
