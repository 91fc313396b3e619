"""What a gateway knows beyond adverts: its own sessions since, and what stages said of their work."""

from __future__ import annotations

import pytest

from scheduler import Hosted, Stage
from scheduler.ledger import ADVERT_AGE_S_MAX, ADVERT_LAG_S, Ledger, drained
from scheduler.routing import queue_s

STAGES = (Stage("a", 0, 4), Stage("b", 4, 8))


def hosted(node="a", start=0, end=4, free=1000, **more):
    return Hosted(node, start, end, 0.01, kv_tokens_free=free, prefill_s_per_token_per_layer=0.001, **more)


def opened(ledger, name="s", now_s=10.0, tokens=300, priority=1):
    ledger.opened(name, "m", STAGES, tokens=tokens, prompt_tokens=200, priority=priority, now_s=now_s)


def test_a_session_counts_until_an_advert_knows_of_it():
    ledger = Ledger()
    (h,) = ledger.adjusted("m", [hosted()], ["first"], 9.0)
    assert h.kv_tokens_free == 1000
    opened(ledger)
    (h,) = ledger.adjusted("m", [hosted()], ["first"], 10.1)
    assert h.kv_tokens_free == 700
    assert h.queue_s == pytest.approx(200 * 4 * 0.001)
    (h,) = ledger.adjusted("m", [hosted(free=700)], ["second"], 11.0)
    assert (h.kv_tokens_free, h.queue_s) == (700, 0.0)


def test_what_was_given_back_since_the_advert_is_free():
    ledger = Ledger()
    opened(ledger)
    ledger.adjusted("m", [hosted(free=700)], ["knows"], 11.0)
    ledger.closed("s", 11.2)
    (h,) = ledger.adjusted("m", [hosted(free=700)], ["knows"], 11.3)
    assert h.kv_tokens_free == 1000
    (h,) = ledger.adjusted("m", [hosted(free=1000)], ["knows too"], 12.0)
    assert h.kv_tokens_free == 1000


def test_an_advert_that_stays_the_same_is_believed_in_the_end():
    ledger = Ledger()
    ledger.adjusted("m", [hosted()], ["same"], 9.0)
    opened(ledger)
    (h,) = ledger.adjusted("m", [hosted()], ["same"], 10.1 + ADVERT_AGE_S_MAX)
    assert h.kv_tokens_free == 1000


def test_part_of_a_span_takes_part_of_its_room_and_other_models_none():
    ledger = Ledger()
    ledger.adjusted("m", [hosted(end=8)], ["x"], 9.0)
    opened(ledger)
    (h,) = ledger.adjusted("m", [hosted(end=8)], ["x"], 10.1)
    assert h.kv_tokens_free == 850
    (h,) = ledger.adjusted("other", [hosted()], ["x"], 10.1)
    assert h.kv_tokens_free == 1000


def test_background_work_queues_in_its_own_class():
    ledger = Ledger()
    h0 = hosted(queue_by_class_s=(0.0, 0.1, 0.0))
    ledger.adjusted("m", [h0], ["x"], 9.0)
    opened(ledger, priority=2)
    (h,) = ledger.adjusted("m", [h0], ["x"], 10.1)
    assert (queue_s(h, 1), queue_s(h, 2)) == (pytest.approx(0.1), pytest.approx(0.9))


def heard_of(ledger, *queues_s, stage=0, now_s=10.0):
    opened(ledger, now_s=now_s)
    return ledger.heard("s", stage, queues_s)


def test_what_a_stage_said_counts_until_a_newer_advert():
    ledger = Ledger()
    before = hosted(queue_s=9.0, queue_by_class_s=(0.0, 9.0, 0.0))
    ledger.adjusted("m", [before], ["old"], 9.0)
    heard_of(ledger, 0.0, 3.0, 0.0)
    own_s = 200 * 4 * 0.001
    (h,) = ledger.adjusted("m", [before], ["old"], 11.0)
    assert (queue_s(h, 1), h.queue_s) == (pytest.approx(2.0 + own_s), pytest.approx(2.0 + own_s))
    (h,) = ledger.adjusted("m", [before], ["old"], 11.0, without="s")
    assert queue_s(h, 1) == pytest.approx(2.0)
    after = hosted(queue_s=0.5, queue_by_class_s=(0.0, 0.5, 0.0))
    (h,) = ledger.adjusted("m", [after], ["on its way already"], 11.1)
    assert queue_s(h, 1) == pytest.approx(1.9 + own_s)
    (h,) = ledger.adjusted("m", [after], ["new"], 10.1 + ADVERT_LAG_S)
    assert queue_s(h, 1) == pytest.approx(0.5)


def test_what_was_said_outlives_the_session_that_was_left_for_it():
    ledger = Ledger()
    ledger.adjusted("m", [hosted()], ["old"], 9.0)
    heard_of(ledger, 0.0, 3.0, 0.0)
    ledger.closed("s", 10.1)
    (h,) = ledger.adjusted("m", [hosted()], ["old"], 10.5)
    assert queue_s(h, 1) == pytest.approx(2.5)
    assert h.kv_tokens_free == 1000


def test_of_two_words_the_later_one_holds_and_one_says_when_all_have_spoken():
    ledger = Ledger()
    ledger.adjusted("m", [hosted()], ["old"], 9.0)
    assert not heard_of(ledger, 3.0)
    assert ledger.heard("s", 1, (0.0,))
    assert not ledger.heard("s", 1, (7.0,)), "once"
    assert not ledger.heard("s", 2, (7.0,)), "no such stage"
    assert not ledger.heard("unknown", 0, (7.0,))
    ledger.opened("t", "m", STAGES, tokens=1, prompt_tokens=0, priority=0, now_s=10.5)
    ledger.heard("t", 0, (1.0,))
    (h,) = ledger.adjusted("m", [hosted()], ["old"], 10.5)
    assert queue_s(h, 0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("queues", "passed_s", "left"),
    [
        ((2.0, 3.0), 1.0, [1.0, 3.0]),
        ((2.0, 3.0), 4.0, [0.0, 1.0]),
        ((2.0, 3.0), 9.0, [0.0, 0.0]),
        ((), 1.0, []),
    ],
)
def test_queues_empty_the_most_urgent_first(queues, passed_s, left):
    assert drained(queues, passed_s) == left
