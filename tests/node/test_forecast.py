"""What this gateway reckons with: the pace of the mesh, room and seats."""

from __future__ import annotations

import pytest

from node.serve.forecast import Pace, room_tokens, seats
from node.serve.timing import UNTOLD_MAX, Stopwatch
from scheduler import Hosted


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


def test_room_is_that_of_the_scarcest_layer():
    spans = [hosted(), hosted("b", 4, 8, free=500), hosted("c", 2, 6, free=300)]
    assert room_tokens(spans, 8) == 500
    assert room_tokens(spans[:1], 8) == 0


@pytest.mark.parametrize(("copies", "concurrency", "expected"), [([1, 2], 4, 16), ([2, 2], 1, 8), ([], 1, 4)])
def test_seats_grow_with_whole_copies(copies, concurrency, expected):
    assert seats(copies, concurrency) == expected


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
