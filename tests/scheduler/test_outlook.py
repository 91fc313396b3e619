"""Which chain a gateway takes by what it knows, and whether it goes on with it once the stages have spoken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import ChainRequest, Hosted, Link, NoRoom, Rejected, Stage
from scheduler.outlook import MARGIN, TRIES_MAX, Aims, Outlook

LINK_S = 0.01
ASKED = ChainRequest(layers=8, tokens=1100, prompt_tokens=1000, hidden_bytes=1000, gateway="g")
FIRST = (Stage("a", 0, 4), Stage("b", 4, 8))


def link(a, b):
    return Link(LINK_S, 1e9)


def host(node, start, end, queue_s=0.0, **more):
    times = {"s_per_layer": 0.002, "prefill_s_per_token_per_layer": 0.0001, "kv_tokens_free": 5000} | more
    return Hosted(node, start, end, queue_s=queue_s, **times)


def outlook(*hosts, chunk=100):
    return Outlook(hosts, link, chunk_tokens=chunk)


def four(**queues):
    spans = {"a": (0, 4), "b": (4, 8), "c": (0, 4), "d": (4, 8)}
    return outlook(*(host(name, *span, queue_s=queues.get(name, 0.0)) for name, span in spans.items()))


def names(offer):
    return "".join(stage.node for stage in offer.stages)


def test_the_first_token_takes_the_slowest_stage_once_and_a_chunk_of_the_others():
    offer = four().weigh(FIRST, ASKED, Aims())
    stage_s = 1000 * 4 * 0.0001
    assert offer.first_s == pytest.approx(stage_s + stage_s / 10 + 3 * LINK_S, rel=0.01)
    assert offer.token_s == pytest.approx(8 * 0.002 + 2 * LINK_S, rel=0.01)


def test_a_quick_stage_waits_for_the_last_chunk_of_a_slow_one():
    slow, quick = host("a", 0, 4, prefill_s_per_token_per_layer=0.001), host("b", 4, 8)
    offer = outlook(slow, quick).weigh(FIRST, ASKED, Aims())
    assert offer.first_s == pytest.approx(1000 * 4 * 0.001 + 100 * 4 * 0.0001 + 3 * LINK_S, rel=0.01)


def test_a_queue_empties_while_the_stages_before_it_work():
    calm = four().weigh(FIRST, ASKED, Aims()).first_s
    behind_b = four(b=0.05).weigh(FIRST, ASKED, Aims()).first_s
    assert behind_b == pytest.approx(calm, abs=1e-3)
    assert four(a=0.05).weigh(FIRST, ASKED, Aims()).first_s == pytest.approx(calm + 0.04, abs=1e-3)


def test_only_a_prompt_that_every_stage_holds_is_read_in_part():
    held = replace(ASKED, prefix_nodes=frozenset("ab"), prefix_tokens=900)
    assert four().weigh(FIRST, held, Aims()).first_s < four().weigh(FIRST, ASKED, Aims()).first_s / 3
    half = replace(held, prefix_nodes=frozenset("a"))
    assert four().weigh(FIRST, half, Aims()).first_s == four().weigh(FIRST, ASKED, Aims()).first_s


def test_a_chain_that_keeps_the_aims_is_offered_before_a_cheaper_one_that_does_not():
    quick = host("q", 0, 8, s_per_layer=0.02, prefill_s_per_token_per_layer=0.00005)
    cheap = host("c", 0, 8, s_per_layer=0.0001, prefill_s_per_token_per_layer=0.0005)
    both, asked = outlook(quick, cheap), replace(ASKED, tokens=2000)
    assert names(both.offer(asked, Aims())) == "c"
    found = both.offer(asked, Aims(first_s=1.0, token_s=1.0))
    assert names(found) == "q"
    assert found.missed == 0
    assert [names(other) for other in found.alternates] == ["c"]


def test_where_none_keeps_the_aims_the_one_that_misses_least_is_offered_or_the_request_refused():
    found = four(a=9.0, c=5.0, b=1.0).offer(ASKED, Aims(first_s=1.0))
    assert names(found) in ("cd", "cb")
    assert found.missed > 3
    with pytest.raises(Rejected) as late:
        four(a=9.0, c=5.0).offer(ASKED, Aims(first_s=1.0, strict=True))
    assert late.value.retry_after_s == pytest.approx(found.first_s - 1.0, abs=0.1)
    with pytest.raises(Rejected):
        four().offer(ASKED, Aims(token_s=0.001, strict=True))
    with pytest.raises(NoRoom):
        four().offer(replace(ASKED, tokens=9000), Aims())


def test_one_goes_on_with_a_chain_that_will_be_in_time():
    view = four(a=2.0)
    mine = view.weigh(FIRST, ASKED, Aims())
    assert view.instead(FIRST, ASKED, Aims(first_s=mine.first_s / MARGIN + 0.01), tries=0) is None
    better = view.instead(FIRST, ASKED, Aims(first_s=mine.first_s / MARGIN - 0.01), tries=0)
    assert names(better)[0] == "c"


def test_one_goes_on_where_nothing_else_is_clearly_sooner_or_too_much_was_tried():
    aims = Aims(first_s=0.3)
    assert four(a=2.0, c=2.0).instead(FIRST, ASKED, aims, tries=0) is None
    assert four(a=2.0, c=1.99).instead(FIRST, ASKED, aims, tries=0) is None
    assert four(a=2.0, c=0.5).instead(FIRST, ASKED, aims, tries=TRIES_MAX - 1) is not None
    assert four(a=2.0, c=0.5).instead(FIRST, ASKED, aims, tries=TRIES_MAX) is None
    assert outlook(host("a", 0, 4, 9.0), host("b", 4, 8)).instead(FIRST, ASKED, aims, tries=0) is None


def test_a_strict_request_that_no_chain_serves_in_time_is_refused():
    strict = Aims(first_s=1.0, strict=True)
    with pytest.raises(Rejected):
        four(a=2.0, c=2.0).instead(FIRST, ASKED, strict, tries=0)
    with pytest.raises(Rejected):
        four(a=2.0).instead(FIRST, ASKED, strict, tries=TRIES_MAX)
    assert names(four(a=2.0).instead(FIRST, ASKED, strict, tries=0))[0] == "c"


def test_a_chain_whose_host_is_gone_from_the_view_is_gone_on_with():
    assert outlook(host("c", 0, 8)).instead(FIRST, ASKED, Aims(first_s=0.01), tries=0) is None
    assert not outlook(host("a", 0, 4)).has_room(FIRST, ASKED)
    assert four().has_room(FIRST, ASKED)
    assert not four().has_room(FIRST, replace(ASKED, tokens=5001))


def test_doubtful_nodes_are_dearer_and_promise_no_less():
    sure, doubtful = (outlook(host("a", 0, 4, reliability=r), host("b", 4, 8)) for r in (1.0, 0.5))
    mine, theirs = (view.weigh(FIRST, ASKED, Aims()) for view in (sure, doubtful))
    assert theirs.cost_s > 1.3 * mine.cost_s
    assert (theirs.first_s, theirs.token_s) == (mine.first_s, mine.token_s)
