from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler import InputError
from scheduler.admission import (
    Admission,
    AdmissionConfig,
    Capacity,
    Ended,
    Reject,
    Start,
    Submit,
    Ticket,
    Yield,
)


def opened(tokens=1000, rate=100.0, **config):
    admission = Admission(AdmissionConfig(**config))
    admission.handle(Capacity(tokens, rate), 0.0)
    return admission


def ticket(name, client="c", prompt=80, new=20, **more):
    return Ticket(name, client, prompt, new, **more)


def test_a_request_starts_at_once_where_there_is_room_and_waits_where_not():
    admission = opened(tokens=200)
    assert admission.handle(Submit(ticket("a")), 0.0) == [Start("a")]
    assert admission.handle(Submit(ticket("b")), 0.0) == [Start("b")]
    assert admission.handle(Submit(ticket("c")), 0.0) == []
    assert admission.handle(Ended("a"), 1.0) == [Start("c")]


def test_nothing_starts_before_there_is_any_capacity():
    admission = Admission()
    assert admission.handle(Submit(ticket("a")), 0.0) == []
    assert admission.handle(Capacity(50, 1.0), 1.0) == [Start("a")]


def test_a_request_that_cannot_meet_its_target_is_refused_at_once():
    admission = opened(tokens=100, rate=10.0)
    admission.handle(Submit(ticket("a")), 0.0)
    assert admission.handle(Submit(ticket("b", target_s=60.0)), 0.0) == []
    (refusal,) = admission.handle(Submit(ticket("c", target_s=5.0)), 0.0)
    assert isinstance(refusal, Reject)
    assert "20.0 s" in refusal.reason, "the running one and the waiting one must end before"
    assert refusal.retry_after_s == pytest.approx(15.0)


def test_what_is_free_now_counts_for_the_wait():
    admission = opened(tokens=250, rate=10.0)
    admission.handle(Submit(ticket("a")), 0.0)
    assert admission.expected_wait_s(tokens=100) == 0.0
    admission.handle(Submit(ticket("b")), 0.0)
    assert admission.expected_wait_s(tokens=50) == 0.0
    assert admission.expected_wait_s(tokens=100) == pytest.approx(5.0), "of one of the two half must end"
    assert Admission().expected_wait_s(tokens=1) == float("inf")


def test_a_client_does_not_expect_to_wait_for_the_whole_queue_of_another():
    admission = opened(tokens=100, rate=10.0, quantum_tokens=200.0)
    admission.handle(Submit(ticket("run", "flood")), 0.0)
    for k in range(50):
        admission.handle(Submit(ticket(f"flood/{k}", "flood")), 0.0)
    assert admission.expected_wait_s(tokens=100, client="flood") == pytest.approx(510.0)
    assert admission.expected_wait_s(tokens=100, client="calm") == pytest.approx(40.0)
    assert admission.handle(Submit(ticket("calm", "calm", target_s=45.0)), 0.0) == []
    admission.handle(Submit(ticket("calm/2", "calm")), 0.0)
    assert admission.expected_wait_s(tokens=100, client="calm") == pytest.approx(10 * (1 + 5 + 2))


def test_no_more_run_at_once_than_may_however_small_they_are():
    admission = Admission()
    admission.handle(Capacity(10_000, 100.0, requests=2), 0.0)
    assert admission.handle(Submit(ticket("a")), 0.0) == [Start("a")]
    assert admission.handle(Submit(ticket("b", kind="background")), 0.0) == [Start("b")]
    assert admission.handle(Submit(ticket("c", kind="background")), 0.0) == []
    assert admission.handle(Submit(ticket("d")), 0.0) == [Yield("b"), Start("d")]
    assert admission.expected_wait_s(tokens=100) == pytest.approx(1.0), "one of 100 tokens must end"
    assert admission.handle(Submit(ticket("e")), 0.0) == []
    assert admission.handle(Ended("a"), 1.0) == [Start("e")]


def test_an_urgent_request_goes_first_but_not_at_the_cost_of_another_clients_share():
    admission = opened(tokens=100, waiting_a_client_max=1000, quantum_tokens=200.0)
    admission.handle(Submit(ticket("run")), 0.0)
    admission.handle(Submit(ticket("calm/0", "calm", cached_tokens=70)), 0.0)
    for k in range(100):
        admission.handle(Submit(ticket(f"hasty/{k}", "hasty", urgent=True)), 0.0)
    assert admission.handle(Ended("run"), 1.0) == [Start("hasty/0")]
    assert served(admission, "hasty/0", 20)["calm"] == 1


def test_one_whose_target_passes_while_it_waits_is_told():
    admission = opened(tokens=100, rate=1000.0)
    admission.handle(Submit(ticket("a")), 0.0)
    admission.handle(Submit(ticket("b", target_s=3.0)), 0.0)
    (refusal,) = admission.handle(Submit(ticket("c")), 4.0)
    assert refusal == Reject("b", "its target passed while it waited", refusal.retry_after_s)


def test_queues_are_bounded():
    admission = opened(tokens=100, waiting_max=3, waiting_a_client_max=2)
    admission.handle(Submit(ticket("run")), 0.0)
    assert admission.handle(Submit(ticket("a", "x")), 0.0) == []
    assert admission.handle(Submit(ticket("b", "x")), 0.0) == []
    assert isinstance(admission.handle(Submit(ticket("c", "x")), 0.0)[0], Reject)
    assert admission.handle(Submit(ticket("d", "y")), 0.0) == []
    assert "full" in admission.handle(Submit(ticket("e", "z")), 0.0)[0].reason


def test_a_name_in_use_is_refused():
    admission = opened()
    admission.handle(Submit(ticket("a")), 0.0)
    with pytest.raises(InputError, match="request"):
        admission.handle(Submit(ticket("a")), 0.0)


def served(admission, names, rounds):
    """End the running request `rounds` times; how often each client was served."""
    counts = Counter()
    running = names
    for k in range(rounds):
        for instruction in admission.handle(Ended(running), float(k)):
            if isinstance(instruction, Start):
                running = instruction.request
                counts[running.split("/")[0]] += 1
    return counts


def test_a_client_that_floods_gets_no_more_than_its_share():
    admission = opened(tokens=100, waiting_a_client_max=1000)
    admission.handle(Submit(ticket("first")), 0.0)
    for k in range(200):
        admission.handle(Submit(ticket(f"flood/{k}", "flood")), 0.0)
    for k in range(30):
        admission.handle(Submit(ticket(f"calm/{k}", "calm")), 0.0)
    counts = served(admission, "first", 50)
    assert abs(counts["calm"] - counts["flood"]) <= 10


def test_shares_are_counted_in_tokens_not_in_requests():
    admission = opened(tokens=1000, waiting_a_client_max=1000)
    admission.handle(Submit(ticket("first", prompt=900, new=100)), 0.0)
    for k in range(100):
        admission.handle(Submit(ticket(f"long/{k}", "long", prompt=800, new=200)), 0.0)
        admission.handle(Submit(ticket(f"short/{k}", "short", prompt=400, new=100)), 0.0)
    running, tokens = ["first"], Counter()
    for k in range(60):
        out = admission.handle(Ended(running.pop(0)), float(k))
        for instruction in out:
            running.append(instruction.request)
            client = instruction.request.split("/")[0]
            tokens[client] += 1000 if client == "long" else 500
    assert tokens["long"] == pytest.approx(tokens["short"], rel=0.35)


def test_cached_prefixes_go_first_among_clients_in_credit():
    admission = opened(tokens=100)
    admission.handle(Submit(ticket("run")), 0.0)
    admission.handle(Submit(ticket("cold", "x")), 0.0)
    admission.handle(Submit(ticket("warm", "y", cached_tokens=70)), 0.0)
    assert admission.handle(Ended("run"), 1.0) == [Start("warm")]


def test_locality_does_not_starve_others():
    admission = opened(tokens=100, quantum_tokens=200.0, waiting_a_client_max=1000)
    admission.handle(Submit(ticket("first")), 0.0)
    for k in range(100):
        admission.handle(Submit(ticket(f"warm/{k}", "warm", cached_tokens=80)), 0.0)
    admission.handle(Submit(ticket("cold/0", "cold")), 0.0)
    assert served(admission, "first", 20)["cold"] == 1


def test_background_runs_when_idle_and_yields_at_once_and_comes_back_first():
    admission = opened(tokens=200)
    assert admission.handle(Submit(ticket("train", kind="background")), 0.0) == [Start("train")]
    assert admission.handle(Submit(ticket("batch", kind="background")), 0.0) == [Start("batch")]
    assert admission.handle(Submit(ticket("a")), 1.0) == [Yield("batch"), Start("a")]
    assert admission.handle(Submit(ticket("b")), 2.0) == [Yield("train"), Start("b")]
    assert admission.handle(Submit(ticket("more", kind="background")), 3.0) == []
    out = admission.handle(Ended("a"), 4.0)
    assert out in ([Start("batch")], [Start("train")])


def test_background_does_not_yield_where_that_would_not_help():
    admission = opened(tokens=200)
    admission.handle(Submit(ticket("a", prompt=100, new=0)), 0.0)
    admission.handle(Submit(ticket("train", kind="background")), 0.0)
    assert admission.handle(Submit(ticket("big", prompt=150, new=0)), 1.0) == []


class Queue(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.now, self.count = 0.0, 0
        self.admission = opened(tokens=500, waiting_max=20, waiting_a_client_max=8)
        self.open, self.started, self.kind, self.tokens = set(), set(), {}, 500

    def tell(self, event):
        self.now += 0.5
        for i in self.admission.handle(event, self.now):
            if isinstance(i, Start):
                assert i.request in self.open
                assert i.request not in self.started
                self.started.add(i.request)
            elif isinstance(i, Yield):
                assert self.kind[i.request] == "background"
                self.started.remove(i.request)
            else:
                assert i.request not in self.started
                self.open.discard(i.request)

    @rule(
        client=st.sampled_from("xyz"),
        prompt=st.integers(1, 300),
        cached=st.integers(0, 300),
        kind=st.sampled_from(["interactive", "interactive", "background"]),
        wait_s=st.sampled_from([None, 1.0, 20.0]),
    )
    def submit(self, client, prompt, cached, kind, wait_s):
        self.count += 1
        name = f"r{self.count}"
        self.open.add(name)
        self.kind[name] = kind
        self.tell(Submit(Ticket(name, client, prompt, 20, min(cached, prompt), kind, wait_s)))

    @rule(data=st.data())
    def end(self, data):
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            self.open.discard(name)
            self.started.discard(name)
            self.tell(Ended(name))

    @rule(tokens=st.sampled_from([0, 100, 500, 2000]))
    def change(self, tokens):
        self.tell(Capacity(tokens, 100.0))

    @invariant()
    def bounds_hold_and_nobody_is_lost(self):
        if hasattr(self, "admission"):
            self.admission.validate()
            assert self.admission.waiting() == len(self.open - self.started)


Queue.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestQueue = Queue.TestCase
