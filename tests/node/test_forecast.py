"""What this gateway reckons with: the pace of the mesh, its own sessions since the last adverts, times of chains."""

from __future__ import annotations

import pytest

from node.serve.forecast import ADVERT_AGE_S_MAX, Ledger, Pace, first_token_s, queue_s, room_tokens, seats
from node.serve.protocol import StageRef
from node.serve.timing import UNTOLD_MAX, Stopwatch
from scheduler import Hosted

STAGES = (StageRef("a", 0, 4), StageRef("b", 4, 8))


def hosted(node="a", start=0, end=4, free=1000, **more):
    return Hosted(node, start, end, 0.01, kv_tokens_free=free, prefill_s_per_token_per_layer=0.001, **more)


class TestPace:
    def test_what_is_done_while_nobody_waits_tells_nothing_of_what_can_be_done(self):
        pace = Pace()
        for k in range(20):
            pace.worked(10, k / 10)
        assert pace.tokens_per_s(77.0, 2.0) == 77.0

    def test_while_requests_wait_the_rate_is_measured(self):
        pace = Pace()
        pace.waits(True, 0.0)
        for k in range(1, 31):
            pace.worked(10, k / 10)
            pace.waits(True, k / 10)
        assert pace.tokens_per_s(77.0, 0.5) == 77.0, "too early to tell"
        assert pace.tokens_per_s(77.0, 3.0) == pytest.approx(100.0, rel=0.05)
        pace.waits(False, 3.0)
        assert pace.tokens_per_s(77.0, 3.1) == 77.0


class TestLedger:
    def opened(self, ledger, name="s", now_s=10.0, tokens=300, priority=1):
        ledger.opened(name, "m", STAGES, tokens=tokens, prompt_tokens=200, priority=priority, now_s=now_s)

    def test_a_session_counts_until_an_advert_knows_of_it(self):
        ledger = Ledger()
        (h,) = ledger.adjusted("m", [hosted()], ["first"], 9.0)
        assert h.kv_tokens_free == 1000
        self.opened(ledger)
        (h,) = ledger.adjusted("m", [hosted()], ["first"], 10.1)
        assert h.kv_tokens_free == 700
        assert h.queue_s == pytest.approx(200 * 4 * 0.001)
        (h,) = ledger.adjusted("m", [hosted(free=700)], ["second"], 11.0)
        assert (h.kv_tokens_free, h.queue_s) == (700, 0.0)

    def test_what_was_given_back_since_the_advert_is_free(self):
        ledger = Ledger()
        self.opened(ledger)
        ledger.adjusted("m", [hosted(free=700)], ["knows"], 11.0)
        ledger.closed("s", 11.2)
        (h,) = ledger.adjusted("m", [hosted(free=700)], ["knows"], 11.3)
        assert h.kv_tokens_free == 1000
        (h,) = ledger.adjusted("m", [hosted(free=1000)], ["knows too"], 12.0)
        assert h.kv_tokens_free == 1000

    def test_an_advert_that_stays_the_same_is_believed_in_the_end(self):
        ledger = Ledger()
        ledger.adjusted("m", [hosted()], ["same"], 9.0)
        self.opened(ledger)
        (h,) = ledger.adjusted("m", [hosted()], ["same"], 10.1 + ADVERT_AGE_S_MAX)
        assert h.kv_tokens_free == 1000

    def test_part_of_a_span_takes_part_of_its_room_and_other_models_none(self):
        ledger = Ledger()
        ledger.adjusted("m", [hosted(end=8)], ["x"], 9.0)
        self.opened(ledger)
        (h,) = ledger.adjusted("m", [hosted(end=8)], ["x"], 10.1)
        assert h.kv_tokens_free == 850
        (h,) = ledger.adjusted("other", [hosted()], ["x"], 10.1)
        assert h.kv_tokens_free == 1000

    def test_background_work_queues_in_its_own_class(self):
        ledger = Ledger()
        h0 = hosted(queue_by_class_s=(0.0, 0.1, 0.0))
        ledger.adjusted("m", [h0], ["x"], 9.0)
        self.opened(ledger, priority=2)
        (h,) = ledger.adjusted("m", [h0], ["x"], 10.1)
        assert (queue_s(h, 1), queue_s(h, 2)) == (pytest.approx(0.1), pytest.approx(0.9))


def test_room_is_that_of_the_scarcest_layer():
    spans = [hosted(), hosted("b", 4, 8, free=500), hosted("c", 2, 6, free=300)]
    assert room_tokens(spans, 8) == 500
    assert room_tokens(spans[:1], 8) == 0


@pytest.mark.parametrize(("copies", "concurrency", "expected"), [([1, 2], 4, 16), ([2, 2], 1, 8), ([], 1, 4)])
def test_seats_grow_with_whole_copies(copies, concurrency, expected):
    assert seats(copies, concurrency) == expected


def test_the_first_token_takes_queues_prompts_and_hops():
    spans = {
        STAGES[0]: hosted(queue_by_class_s=(0.5, 1.0, 9.0)),
        STAGES[1]: Hosted("b", 4, 8, 0.016, queue_s=2.0),
    }
    took_s = first_token_s(STAGES, spans, [0.1, 0.2, 0.3], prompt_tokens=100, priority=1)
    assert took_s == pytest.approx(0.6 + 1.5 + 2.0 + 100 * 4 * (0.001 + 0.001))


def test_pieces_handed_over_together_count_one_after_another():
    watch = Stopwatch()
    for position in (0, 128, 256):
        watch.sent(position, 10.0)
    assert [watch.told(p, at_s) for p, at_s in ((0, 12.0), (128, 13.0), (256, 17.0))] == [2.0, 1.0, 4.0]
    watch.sent(384, 20.0)
    assert watch.told(384, 20.5) == 0.5
    assert watch.told(384, 21.0) is None, "once"
    assert watch.told(7, 21.0) is None, "never sent"


def test_a_stage_that_tells_nothing_makes_nobody_remember_without_end():
    watch = Stopwatch()
    for position in range(10 * UNTOLD_MAX):
        watch.sent(position, 1.0)
    assert sum(watch.told(position, 2.0) is not None for position in range(10 * UNTOLD_MAX)) == UNTOLD_MAX
