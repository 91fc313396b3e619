import itertools
import random

import pytest

from scheduler import ChainRequest, Hosted, Link, NoChain, NoRoom, choose_chain


def host(node, start, end, s=0.001, queue=0.0, kv=10_000, **more):
    return Hosted(node, start, end, s_per_layer=s, queue_s=queue, kv_tokens_free=kv, **more)


def ask(layers=8, **more):
    return ChainRequest(
        **{"layers": layers, "tokens": 110, "prompt_tokens": 10, "hidden_bytes": 1024, "gateway": "g", **more}
    )


def flat(latency_s=0.001):
    return lambda _a, _b: Link(latency_s, 1e9)


def stages(chain):
    return [(s.node, s.start, s.end) for s in chain.stages]


def check(chain, hosted, layers):
    spans = {h.node: (h.start, h.end) for h in hosted}
    at = 0
    for s in chain.stages:
        assert s.start == at < s.end
        assert spans[s.node][0] <= s.start
        assert s.end <= spans[s.node][1]
        at = s.end
    assert at == layers
    assert len({s.node for s in chain.stages}) == len(chain.stages)


def test_a_single_host_is_a_chain():
    assert stages(choose_chain([host("a", 0, 8)], flat(), ask())) == [("a", 0, 8)]


def test_a_node_may_be_entered_and_left_at_any_layer():
    hosted = [host("a", 0, 6), host("b", 3, 8)]
    assert stages(choose_chain(hosted, flat(), ask())) in (
        [("a", 0, 6), ("b", 6, 8)],
        [("a", 0, 3), ("b", 3, 8)],
    )
    quick_b = [host("a", 0, 6), host("b", 3, 8, s=0.0001)]
    assert stages(choose_chain(quick_b, flat(), ask())) == [("a", 0, 3), ("b", 3, 8)]


def test_fewer_hops_win_over_slightly_faster_nodes():
    hosted = [host("a", 0, 8, s=0.0011), host("b", 0, 4, s=0.001), host("c", 4, 8, s=0.001)]
    assert stages(choose_chain(hosted, flat(0.05), ask())) == [("a", 0, 8)]


def test_a_long_queue_is_gone_around():
    hosted = [host("a", 0, 8, queue=10.0), host("b", 0, 8, s=0.002)]
    assert stages(choose_chain(hosted, flat(), ask())) == [("b", 0, 8)]


def test_cache_room_is_a_hard_bound():
    hosted = [host("a", 0, 8, kv=100), host("b", 0, 8, s=0.1, kv=110)]
    assert stages(choose_chain(hosted, flat(), ask())) == [("b", 0, 8)]
    with pytest.raises(NoRoom, match="no node has cache room for 111 tokens at layers 0-7"):
        choose_chain(hosted, flat(), ask(tokens=111))


def test_missing_layers_are_named():
    with pytest.raises(NoChain, match="no node serves layers 3-4, 7 now") as caught:
        choose_chain([host("a", 0, 3), host("b", 5, 7)], flat(), ask())
    assert caught.value.missing == (3, 4, 7)


def test_excluded_nodes_are_not_used():
    hosted = [host("a", 0, 8), host("b", 0, 8, s=0.01)]
    assert stages(choose_chain(hosted, flat(), ask(exclude=frozenset({"a"})))) == [("b", 0, 8)]


def test_a_node_with_the_prefix_is_preferred():
    hosted = [host("a", 0, 8, kv=2000), host("b", 0, 8, s=0.00101, kv=2000)]
    wish = {"prompt_tokens": 1000, "tokens": 1010}
    assert stages(choose_chain(hosted, flat(), ask(**wish))) == [("a", 0, 8)]
    chosen = choose_chain(hosted, flat(), ask(**wish, prefix_nodes=frozenset({"b"})))
    assert stages(chosen) == [("b", 0, 8)]


def test_an_unreliable_node_is_avoided():
    hosted = [host("a", 0, 8, reliability=0.5), host("b", 0, 8, s=0.0015)]
    assert stages(choose_chain(hosted, flat(), ask())) == [("b", 0, 8)]


def brute_force(hosted, links, request):
    """Every order of every set of nodes with every choice of hand-overs."""
    best = float("inf")
    for size in range(1, len(hosted) + 1):
        for order in itertools.permutations(hosted, size):
            for cut in itertools.combinations(range(1, request.layers), size - 1):
                edges = [0, *cut, request.layers]
                if all(h.start <= a and b <= h.end for h, a, b in zip(order, edges, edges[1:], strict=False)):
                    best = min(best, price(order, edges, links, request))
    return best


def price(order, edges, links, request):
    new = request.tokens - request.prompt_tokens

    def hop(a, b):
        link = links(a, b)
        return new * link.seconds(request.hidden_bytes) + link.seconds(
            request.hidden_bytes * request.prompt_tokens
        )

    total = links(request.gateway, order[0].node).latency_s
    for h, a, b in zip(order, edges, edges[1:], strict=False):
        total += h.queue_s + (b - a) * (new * h.s_per_layer + request.prompt_tokens * h.s_per_layer / 16)
    total += sum(hop(u.node, v.node) for u, v in itertools.pairwise(order))
    return total + (hop(order[-1].node, order[0].node) if len(order) > 1 else 0.0)


@pytest.mark.parametrize("seed", range(40))
def test_the_chain_is_within_the_way_back_of_the_best_by_brute_force(seed):
    rng = random.Random(seed)
    hosted = []
    for k in range(6):
        start = rng.randrange(0, 5)
        hosted.append(
            host(f"n{k}", start, rng.randrange(start + 1, 7), s=rng.uniform(0.001, 0.01), queue=rng.random())
        )
    table = {}

    def links(a, b):
        return table.setdefault((a, b), Link(0.002, 1e8))

    wish = ask(layers=6)
    best = brute_force(hosted, links, wish)
    try:
        chain = choose_chain(hosted, links, wish)
    except NoChain:
        assert best == float("inf")
        return
    check(chain, hosted, 6)
    assert chain.cost_s == pytest.approx(best)
