"""Whether a prompt is read on one chain and answered on another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import ChainRequest, Hosted, Link, Stage
from scheduler.outlook import Aims, Outlook
from scheduler.parting import Holder, part

CRUNCHER = Hosted("cruncher", 0, 8, 0.01, kv_tokens_free=9000, prefill_s_per_token_per_layer=0.00001)
READER = Hosted("reader", 0, 8, 0.001, kv_tokens_free=9000, prefill_s_per_token_per_layer=0.0005)
ASKED = ChainRequest(
    layers=8, tokens=2200, prompt_tokens=2000, hidden_bytes=1024, gateway="g", kv_bytes_per_token_per_layer=1024
)  # fmt: skip


def flat(latency_s=0.001, rate=1e9):
    return lambda _a, _b: Link(latency_s, rate)


def parted(hosts=(CRUNCHER, READER), request=ASKED, links=None, aims=None, likely=200, **more):
    outlook, aims = Outlook(list(hosts), links or flat(), chunk_tokens=128), aims or Aims()
    together = outlook.offer(request, aims)
    return together, part(outlook, request, aims, together, likely_tokens=likely, **more)


def names(offer):
    return [stage.node for stage in offer.stages]


def test_who_computes_fast_reads_and_who_reads_memory_fast_answers():
    together, found = parted()
    assert (names(found.reading), names(found.answering)) == (["cruncher"], ["reader"])
    assert found.moved_s == pytest.approx(0.001 + 2000 * 1024 * 8 / 1e9)
    assert found.whole_s < 0.85 * (together.first_s + 200 * together.token_s)
    assert found.first_s == found.reading.first_s + found.moved_s + found.answering.token_s


@pytest.mark.parametrize(
    "more",
    [
        {"hosts": (READER,)},
        {"hosts": (READER, replace(READER, node="twin"))},
        {"links": flat(rate=1e6)},
        {"request": replace(ASKED, kv_bytes_per_token_per_layer=0)},
        {"gain_least": 1.0},
        {"likely": 1},
        {"hosts": (replace(CRUNCHER, kv_tokens_free=2199), READER)},
        {"hosts": (CRUNCHER, replace(CRUNCHER, node="twin"))},
    ],
)
def test_one_chain_does_all_where_two_are_no_gain(more):
    assert parted(**more)[1] is None


def test_the_gain_asked_for_is_that_of_the_whole_likely_time():
    together, found = parted()
    gain = 1 - found.whole_s / (together.first_s + 200 * together.token_s)
    assert parted(gain_least=gain - 0.01)[1] is not None
    assert parted(gain_least=gain + 0.01)[1] is None


def test_a_gain_too_small_in_seconds_is_none():
    quick = [replace(h, s_per_layer=h.s_per_layer / 100) for h in (CRUNCHER, READER)]
    quick = [replace(h, prefill_s_per_token_per_layer=h.prefill_s_per_token_per_layer / 400) for h in quick]
    together, found = parted(hosts=quick, links=flat(1e-6, 1e12))
    assert together.first_s + 200 * together.token_s < 0.1
    assert found is None


def test_what_is_likely_made_counts_and_not_what_may_be():
    hosts = (replace(CRUNCHER, s_per_layer=0.0015), READER)
    assert parted(hosts=hosts, likely=200)[1] is not None
    assert parted(hosts=hosts, likely=10)[1] is None


def test_no_aim_is_missed_for_a_quicker_end():
    """Reading elsewhere delays the first token here: the answer would be done sooner, but begin too late."""
    half = replace(READER, node="half", prefill_s_per_token_per_layer=0.00002, s_per_layer=0.008)
    reader = replace(READER, prefill_s_per_token_per_layer=0.001, s_per_layer=0.0005)
    links = flat(rate=1e8)
    together, found = parted(hosts=(half, reader), links=links)
    assert found is not None
    assert together.first_s < found.first_s
    aims = Aims(first_s=(together.first_s + found.first_s) / 2 / 0.95)
    assert parted(hosts=(half, reader), links=links, aims=aims)[1] is None


def test_a_chain_that_holds_the_prompts_beginning_may_read_the_rest():
    slow = replace(CRUNCHER, node="slow", prefill_s_per_token_per_layer=0.0001)
    holder = Holder((Stage("slow", 0, 8),), 1920)
    assert names(parted(hosts=(CRUNCHER, slow, READER))[1].reading) == ["cruncher"]
    _, found = parted(hosts=(CRUNCHER, slow, READER), holders=[holder])
    assert (names(found.reading), found.reuse) == (["slow"], 1920)
    gone = Holder((Stage("left", 0, 8),), 1920)
    assert names(parted(hosts=(CRUNCHER, READER), holders=[gone])[1].reading) == ["cruncher"]


def test_a_node_of_both_chains_needs_room_twice():
    lower = [replace(CRUNCHER, end=4), replace(READER, end=4)]
    both = replace(READER, node="both", start=4, prefill_s_per_token_per_layer=0.00001)
    room = ASKED.tokens + ASKED.prompt_tokens
    for free, is_parted in ((room, True), (room - 1, False)):
        hosts = (*lower, replace(both, kv_tokens_free=free))
        _, found = parted(hosts=hosts)
        assert (found is not None) == is_parted
