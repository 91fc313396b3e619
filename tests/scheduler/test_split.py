"""Separate chains for prefill and decode: when they pay, what they cost, and what the cache's way adds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import ChainRequest, Hosted, Link, Router


def host(node, start, end, s, prefill_s):
    return Hosted(
        node, start, end, s_per_layer=s, kv_tokens_free=5000, prefill_s_per_token_per_layer=prefill_s
    )


def ask(**more):
    wish = {"prompt_tokens": 2000, "tokens": 2200, "kv_bytes_per_token_per_layer": 1024, **more}
    return ChainRequest(layers=8, hidden_bytes=1024, gateway="g", **wish)


def flat(latency_s=0.001, rate=1e9):
    return lambda _a, _b: Link(latency_s, rate)


def stages(chain):
    return [(s.node, s.start, s.end) for s in chain.stages]


CRUNCHER = host("cruncher", 0, 8, 0.01, 0.00001)
READER = host("reader", 0, 8, 0.001, 0.001)


def test_a_split_is_none_where_nobody_knows_what_a_token_of_cache_takes():
    router = Router([CRUNCHER, READER], flat())
    assert router.split(ask()) is not None
    assert router.split(ask(kv_bytes_per_token_per_layer=0)) is None


def test_a_split_must_gain_more_than_is_asked():
    router, wish = Router([CRUNCHER, READER], flat()), ask()
    together_s = router.choose(wish).cost_s
    gain = 1 - router.split(wish).cost_s / together_s
    assert 0.15 < gain < 1
    assert router.split(wish, gain_least=gain - 0.01) is not None
    assert router.split(wish, gain_least=gain + 0.01) is None
    assert router.split(wish, together_s=together_s * (1 - gain)) is None


def test_a_split_has_room_on_both_chains():
    for short in (CRUNCHER, READER):
        hosts = [replace(h, kv_tokens_free=100) if h is short else h for h in (CRUNCHER, READER)]
        assert Router(hosts, flat()).split(ask()) is None


def test_the_price_of_a_split_counts_the_busiest_ends_transfers():
    halves = [replace(CRUNCHER, node=f"c{start}", start=start, end=start + 4) for start in (0, 4)]
    wish = ask()
    bytes_moved = 2000 * 1024 * 8

    def at(rate):
        split = Router([*halves, READER], flat(rate=rate)).split(wish, together_s=1e9)
        return split.cost_s - split.prefill.cost_s - split.decode.cost_s

    assert at(1e7) - at(1e9) == pytest.approx(bytes_moved / 1e7 - bytes_moved / 1e9), "one taker, two givers"


def test_the_decode_chain_lies_near_to_the_cache():
    """Of two nodes that decode alike the one with the better link to the prompt's cache."""

    def links(a, b):
        return Link(0.001, 1e6 if "far" in (a, b) else 1e9)

    twins = [replace(READER, node=name) for name in ("far", "near")]
    split = Router([CRUNCHER, *twins], links).split(ask())
    assert stages(split.decode) == [("near", 0, 8)]


def test_layers_that_stay_on_their_node_do_not_travel():
    slow_link = flat(rate=1e7)
    lower = [replace(CRUNCHER, node="c", end=3), replace(READER, node="r", end=3)]
    both = host("both", 3, 8, 0.001, 0.00001)
    split = Router([*lower, both], slow_link).split(ask(), together_s=1e9)
    assert stages(split.prefill) == [("c", 0, 3), ("both", 3, 8)]
    assert stages(split.decode) == [("r", 0, 3), ("both", 3, 8)]
    moved_s = split.cost_s - split.prefill.cost_s - split.decode.cost_s
    assert moved_s == pytest.approx(slow_link("c", "r").seconds(2000 * 1024 * 3))
