"""The core of a stream of calls: two ends over any transport timing agree, and no bytes break an end."""

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2p import LocalFault, PeerLost, ProtocolViolation, ResourceLimit
from p2p import frames as f
from p2p.rpc_core import Budget, CoreLimits, LaneCore
from p2p.rpc_state import REQUEST_WINDOW_BYTES, CallerLeft, MessageLimits

LIMITS = MessageLimits(1000, 1 << 20)
SMALL = CoreLimits(calls_max=4, piece_bytes_max=50, copy_bytes_max=100, control_frames_max=100)


def make(limits=SMALL, window=300, budget_bytes=1 << 30):
    methods = {"m": (LIMITS, window), "large": (LIMITS, 1 << 20)}
    budgets = Budget(budget_bytes), Budget(budget_bytes)
    caller = LaneCore(serves=False, limits=limits, budget=budgets[0], lookup=lambda name: None)
    callee = LaneCore(serves=True, limits=limits, budget=budgets[1], lookup=methods.get)
    return caller, callee, *budgets


def start(caller, request=b"q", window=300, method="m", deadline=10.0):
    call = caller.open(method, deadline, deadline, LIMITS, window)
    caller.send(call, request, [], 0)
    return call


def move(one, other, now=0.0):
    """Everything that `one` has to write reaches `other`."""
    fed = None
    while one.wants_write:
        fed = other.feed(b"".join(one.next_batch(1 << 16)), now)
    one.drained.clear()
    return fed


def settle(caller, callee, now=0.0):
    while caller.wants_write or callee.wants_write:
        move(caller, callee, now)
        move(callee, caller, now)


class TwoEnds(RuleBasedStateMachine):
    """Random work at both ends, bytes moved in random pieces; what arrives is what was sent, in order."""

    def __init__(self):
        super().__init__()
        self.caller, self.callee, *self.budgets = make()
        self.wires = {self.caller: bytearray(), self.callee: bytearray()}
        self.mine = []
        self.theirs = {}
        self.sent = {}
        self.got = {}
        self.random = random.Random(0)

    @rule()
    def open(self):
        call = self.caller.open("m", 1e9, 1e5, LIMITS, 300)
        self.mine.append(call)
        self.sent[call.id, "up"], self.got[call.id, "up"] = [], []
        self.sent[call.id, "down"], self.got[call.id, "down"] = [], []
        self._send(self.caller, call, "up", 10)

    def _send(self, core, call, way, size):
        if call.over or call.end_wanted:
            return
        message = (self.random.randbytes(size % 97), self.random.randbytes(size))
        core.send(call, message[0], [message[1]], size)
        self.sent[call.id, way].append(message)

    @precondition(lambda self: self.mine)
    @rule(pick=st.integers(0), size=st.integers(0, 1500))
    def send_up(self, pick, size):
        self._send(self.caller, self.mine[pick % len(self.mine)], "up", size)

    @precondition(lambda self: self.theirs)
    @rule(pick=st.integers(0), size=st.integers(0, 1500))
    def send_down(self, pick, size):
        call = list(self.theirs.values())[pick % len(self.theirs)]
        self._send(self.callee, call, "down", size)

    @precondition(lambda self: self.mine)
    @rule(pick=st.integers(0))
    def end_up(self, pick):
        self.caller.end(self.mine[pick % len(self.mine)])

    @precondition(lambda self: self.theirs)
    @rule(pick=st.integers(0), refuse=st.booleans())
    def end_down(self, pick, refuse):
        call = list(self.theirs.values())[pick % len(self.theirs)]
        if refuse:
            self.callee.refuse(call, f.Refusal("busy", "x"))
        else:
            self.callee.end(call)

    @precondition(lambda self: self.mine)
    @rule(pick=st.integers(0))
    def cancel(self, pick):
        call = self.mine[pick % len(self.mine)]
        self.caller.cancel(call)
        self.got.pop((call.id, "down"), None)
        self.mine.remove(call)

    @rule(up=st.booleans(), size=st.integers(1, 200))
    def write(self, up, size):
        core = self.caller if up else self.callee
        self.wires[core] += b"".join(core.next_batch(size))
        core.drained.clear()

    @rule(up=st.booleans(), size=st.integers(1, 500))
    def deliver(self, up, size):
        source, target = (self.caller, self.callee) if up else (self.callee, self.caller)
        wire = self.wires[source]
        fed = target.feed(bytes(wire[:size]), 0.0)
        del wire[:size]
        for call in fed.begun:
            self.theirs[call.id] = call

    @rule(up=st.booleans())
    def take(self, up):
        for call in list(self.theirs.values()) if up else self.mine:
            core, way = (self.callee, "up") if up else (self.caller, "down")
            while (received := core.take(call)) is not None:
                if (call.id, way) in self.got:
                    self.got[call.id, way].append((received.body, bytes(received.payload)))

    @invariant()
    def books_balance(self):
        self.caller.validate()
        self.callee.validate()
        for key, got in self.got.items():
            assert self.sent[key][: len(got)] == got

    def teardown(self):
        for _ in range(10_000):
            self.take(True)
            self.take(False)
            for call in self.theirs.values():
                self.callee.end(call)
            for up in (True, False):
                self.write(up, 10_000)
                self.deliver(up, 100_000)
            if not (self.caller.calls or self.callee.calls):
                break
        self.take(False)
        assert not self.caller.calls
        assert not self.callee.calls
        for call in self.mine:
            if call.refused is None and (call.id, "down") in self.got:
                assert self.got[call.id, "down"] == self.sent[call.id, "down"]
            self.caller.cancel(call)
        assert [budget.used_bytes for budget in self.budgets] == [0, 0]


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.booleans(), st.lists(st.binary(max_size=80), max_size=6))
def test_any_bytes_leave_an_end_whole_or_are_a_violation(serves, chunks):
    caller, callee, *_ = make()
    core = callee if serves else caller
    if not serves:
        start(caller)
    try:
        for chunk in chunks:
            core.feed(chunk, 0.0)
            core.validate()
    except ProtocolViolation:
        core.fail_all(ProtocolViolation("x"))
        core.validate()


valid_frames = st.one_of(
    st.builds(lambda c: f.pack_open(c, "m", 5.0, 300), st.integers(1, 4)),
    st.builds(
        lambda c, body, payload, cut, first, end: (
            f.pack_data_header(
                c, len((f.pack_prefix(body, payload) + bytes(200))[:cut]), first=first, end=end
            )
            + (f.pack_prefix(body, payload) + bytes(200))[:cut]
        ),
        st.integers(1, 4),
        st.integers(0, 90),
        st.integers(0, 90),
        st.integers(1, 200),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(f.pack_cancel, st.integers(1, 4)),
    st.builds(f.pack_credit, st.integers(1, 4), st.integers(0, 2**32 - 1)),
    st.builds(lambda c: f.pack_refuse(c, f.Refusal("c", "m")), st.integers(1, 4)),
    st.builds(f.pack_ping, st.integers(0, 9)),
    st.builds(f.pack_pong, st.integers(0, 9)),
)


@given(st.booleans(), st.lists(valid_frames, max_size=12))
@settings(max_examples=300)
def test_any_frames_leave_an_end_whole_or_are_a_violation(serves, sent):
    caller, callee, *_budgets = make()
    core = callee if serves else caller
    if not serves:
        for _ in range(2):
            start(caller)
    try:
        for frame in sent:
            for call in core.feed(frame, 0.0).begun:
                core.take(call)
            core.validate()
    except ProtocolViolation:
        pass
    for call in [*core.fail_all(PeerLost("p"))]:
        core.release(call)
    assert core.calls == {}


@pytest.mark.parametrize(
    "frame",
    [f.pack_open(1, "m", 1.0, 0) * 2, f.pack_cancel(9), f.pack_credit(9, 1), f.pack_pong(1),
     f.pack_refuse(1, f.Refusal("c", "m")),
     f.pack_open(1, "m", 1.0, 0) + f.pack_credit(1, 0),
     f.pack_open(1, "m", 1.0, 0) + f.pack_credit(1, 2**32 - 1) * 300,
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 0, first=False, end=True),
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 3, first=False, end=False) + b"abc",
     f.pack_open(1, "m", 1.0, 0) + (f.pack_data_header(1, 8, first=True, end=False) + f.pack_prefix(5, 0)) * 2,
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 8, first=True, end=False) + f.pack_prefix(1001, 0),
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 8, first=True, end=False) + f.pack_prefix(1, 2**32 - 1),
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 8, first=True, end=True) + f.pack_prefix(1, 1),
     f.pack_open(1, "m", 1.0, 0) + f.pack_data_header(1, 10, first=True, end=False) + f.pack_prefix(0, 1) + b"ab"],
)  # fmt: skip
def test_what_a_caller_may_not_send(frame):
    _, callee, *_ = make()
    with pytest.raises(ProtocolViolation):
        callee.feed(frame, 0.0)


def test_what_a_callee_may_not_send():
    for frame in (
        f.pack_open(1, "m", 1.0, 0),
        f.pack_cancel(1),
        f.pack_ping(1),
        f.pack_refuse(2, f.Refusal("c", "m")),
    ):
        caller, *_ = make()
        start(caller)
        with pytest.raises(ProtocolViolation):
            caller.feed(frame, 0.0)


def test_frames_for_a_call_that_is_over_are_ignored():
    caller, callee, *_ = make()
    call = start(caller)
    move(caller, callee)
    theirs = callee.calls[1]
    callee.send(theirs, b"answer", [], 0)
    late = b"".join(callee.next_batch(1000))
    caller.cancel(call)
    fed = caller.feed(late, 0.0)
    assert not fed.changed
    assert not call.inbox
    move(caller, callee)
    assert isinstance(theirs.failure, CallerLeft)
    assert callee.calls == {}
    callee.feed(f.pack_credit(1, 5) + f.pack_cancel(1), 0.0)


def test_a_request_and_its_answer_take_one_batch_each():
    caller, callee, *_ = make()
    call = start(caller)
    caller.end(call)
    batch = b"".join(caller.next_batch(1 << 16))
    assert not caller.wants_write
    (begun,) = callee.feed(batch, 0.0).begun
    assert begun.peer_ended
    callee.take(begun)
    callee.send(begun, b"answer", [], 0)
    callee.end(begun)
    answer = b"".join(callee.next_batch(1 << 16))
    assert len(answer) == f.HEADER_BYTES + f.PREFIX_BYTES + len(b"answer")
    assert callee.calls == {}
    caller.feed(answer, 0.0)
    assert call.over
    assert call.failure is call.refused is None
    assert caller.take(call).body == b"answer"


def test_a_reader_that_takes_nothing_stops_its_own_call_only():
    caller, callee, *_ = make()
    slow, quick = start(caller), start(caller)
    settle(caller, callee)
    for _ in range(10):
        for call in (1, 2):
            callee.send(callee.calls[call], b"", [bytes(92)], 92)
    for _ in range(20):
        settle(caller, callee)
        while caller.take(quick):
            pass
    assert slow.queued_bytes == 300
    assert callee.calls[1].outbox_bytes == 700
    assert callee.calls[2].outbox_bytes == 0
    while caller.take(slow):
        settle(caller, callee)
    assert callee.calls[1].outbox_bytes == 0


def test_a_message_larger_than_the_window_gets_through():
    caller, callee, *budgets = make()
    call = start(caller)
    settle(caller, callee)
    callee.send(callee.calls[1], b"b", [bytes(100_000)], 100_000)
    settle(caller, callee)
    received = caller.take(call)
    assert len(received.payload) == 100_000
    assert budgets[0].used_bytes == 0


def test_a_peer_that_overruns_its_credit_is_at_fault():
    caller, *_ = make()
    start(caller)
    with pytest.raises(ProtocolViolation, match="granted"):
        caller.feed(
            f.pack_data_header(1, 301, first=True, end=False) + f.pack_prefix(1000, 1000) + bytes(293), 0.0
        )


def test_small_messages_pass_between_the_pieces_of_a_large_one():
    caller, callee, *_ = make()
    start(caller, window=1 << 20)
    start(caller, window=1 << 20)
    settle(caller, callee)
    callee.send(callee.calls[1], b"", [bytes(5000)], 5000)
    callee.next_batch(100)
    callee.send(callee.calls[2], b"small", [], 0)
    assert b"small" in b"".join(callee.next_batch(100))
    assert callee.calls[1].outbox_bytes > 4000


def test_large_messages_take_turns():
    caller, callee, *_ = make()
    for _ in range(2):
        start(caller, window=1 << 20)
    settle(caller, callee)
    for number in (1, 2):
        callee.send(callee.calls[number], b"", [bytes(5000)], 5000)
    callee.next_batch(1000)
    assert abs(callee.calls[1].outbox_bytes - callee.calls[2].outbox_bytes) <= 50


def test_control_frames_overtake_data():
    caller, callee, *_ = make()
    start(caller, window=1 << 20)
    settle(caller, callee)
    callee.send(callee.calls[1], b"", [bytes(5000)], 5000)
    callee.feed(f.pack_ping(77), 0.0)
    assert b"".join(callee.next_batch(1)).startswith(f.pack_pong(77))


def test_more_calls_than_allowed_are_answered_busy():
    caller, callee, *_ = make()
    calls = [start(caller) for _ in range(6)]
    settle(caller, callee)
    assert [call.refused and call.refused.code for call in calls] == [None] * 4 + ["busy"] * 2
    assert calls[-1].refused.retry_after_s > 0
    assert len(callee.calls) == 4


def test_an_unknown_method_is_refused_and_its_data_ignored():
    caller, callee, *budgets = make()
    call = start(caller, method="none", request=bytes(900))
    settle(caller, callee)
    assert call.refused.code == "not_found"
    assert budgets[1].used_bytes == 0


def test_a_refusal_comes_after_what_was_sent_before_it_unless_it_is_urgent():
    for at_once in (False, True):
        caller, callee, *_ = make()
        call = start(caller)
        settle(caller, callee)
        callee.send(callee.calls[1], b"first", [], 0)
        callee.refuse(callee.calls[1], f.Refusal("internal", "x"), at_once=at_once)
        settle(caller, callee)
        assert call.refused.code == "internal"
        assert (caller.take(call) is None) == at_once


def test_one_peers_unread_bytes_are_bounded():
    caller, callee, *budgets = make(budget_bytes=2000)
    calls = [start(caller, request=bytes(990)) for _ in range(3)]
    settle(caller, callee)
    assert [call.refused.code for call in calls if call.refused] == ["busy"]
    assert budgets[1].used_bytes <= 2000


def test_a_caller_that_is_flooded_gives_the_call_up():
    caller, callee, *budgets = make(budget_bytes=2000)
    calls = [start(caller, window=1 << 20) for _ in range(3)]
    settle(caller, callee)
    for number in (1, 2, 3):
        callee.send(callee.calls[number], b"", [bytes(900)], 900)
    settle(caller, callee)
    failed = [call for call in calls if isinstance(call.failure, ResourceLimit)]
    assert len(failed) == 1
    assert len(callee.calls) == 2
    assert budgets[0].used_bytes <= 2000


def test_a_peer_that_asks_without_reading_is_at_fault():
    _, callee, *_ = make()
    with pytest.raises(ProtocolViolation, match="asks for more"):
        callee.feed(f.pack_ping(1) * 101, 0.0)


def test_requests_that_never_come_and_answers_that_are_never_taken_expire():
    caller, callee, *_ = make()
    half = caller.open("m", 5.0, 5.0, LIMITS, 300)
    untaken = start(caller, deadline=5.0, window=0)
    working = start(caller, deadline=5.0)
    settle(caller, callee)
    callee.send(callee.calls[2], b"answer", [], 0)
    callee.end(callee.calls[2])
    callee.expire(4.9)
    assert len(callee.calls) == 3
    callee.expire(5.0)
    assert set(callee.calls) == {working.id}
    settle(caller, callee)
    assert half.refused.code == untaken.refused.code == "deadline"


def test_claims_within_the_limits_cost_nothing_before_their_bytes_come():
    _, callee, *_ = make(CoreLimits())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(1, 501):
            claim = f.pack_data_header(number, 8, first=True, end=False) + f.pack_prefix(1000, 1 << 20)
            callee.feed(f.pack_open(number, "large", 5.0, 0) + claim, 0.0)
        assert len(callee.calls) == 500
        assert tracemalloc.get_traced_memory()[0] - before < 2 << 20
    finally:
        tracemalloc.stop()


def test_a_request_may_be_as_large_as_the_protocols_first_window_at_once():
    caller, callee, *_ = make(CoreLimits())
    call = caller.open("m", 9.0, 9.0, LIMITS, 300)
    size = REQUEST_WINDOW_BYTES - f.PREFIX_BYTES
    caller.send(call, b"", [bytes(size)], size)
    while caller.wants_write:
        fed = callee.feed(b"".join(caller.next_batch(1 << 20)), 0.0)
    assert len(fed.begun) == 1


def test_a_dead_end_opens_no_calls_and_tells_those_it_had():
    caller, *_ = make()
    call = start(caller)
    failure = PeerLost("p")
    assert caller.fail_all(failure) == [call]
    assert call.over
    assert call.failure is failure
    with pytest.raises(LocalFault):
        start(caller)
    assert caller.fail_all(PeerLost("q")) == []


def test_messages_that_were_only_referred_to_can_be_detached():
    caller, callee, *_ = make()
    call = start(caller)
    settle(caller, callee)
    payload = bytearray(b"x" * 500)
    assert caller.send(call, b"", [memoryview(payload)], 500) is False
    call.detach()
    payload[:] = b"y" * 500
    callee.take(callee.calls[1])
    settle(caller, callee)
    assert bytes(callee.take(callee.calls[1]).payload) == b"x" * 500
