"""Which of very many hosts a gateway weighs: all layers covered, near ones first, all gateways together all alike."""

from collections import Counter

import pytest

from scheduler.routing import Hosted
from scheduler.vicinity import DEPTH_LEAST, Vicinity

LAYERS = 24


def mesh(size, length=6):
    """Hosts of all spans of that length in turn, cut at the model's ends."""
    found = {}
    for k in range(size):
        start = k * 5 % (LAYERS + length - 1) - length + 1
        span = max(0, start), min(LAYERS, start + length)
        found[f"n{k}"] = Hosted(f"n{k}", *span, s_per_layer=0.001)
    return found


def here(_node):
    return 0.0


def counts(hosts, names):
    return [sum(hosts[n].start <= layer < hosts[n].end for n in names) for layer in range(LAYERS)]


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_every_layer_has_as_many_hosts_as_are_asked_for_and_few_more_are_taken(depth):
    hosts = mesh(2000)
    names = Vicinity("g", here).pick(hosts, LAYERS, depth, 0)
    assert min(counts(hosts, names)) == depth
    assert len(names) < 3 * depth * LAYERS / 6 + 6


def test_a_rare_layer_is_covered_by_whoever_hosts_it():
    hosts = {name: h for name, h in mesh(3000).items() if not h.start <= 9 < h.end}
    hosts["only"] = Hosted("only", 8, 12, s_per_layer=0.001)
    for gateway in range(20):
        assert "only" in Vicinity(f"g{gateway}", here).pick(hosts, LAYERS, 4, 0)


def test_gateways_together_take_all_hosts_alike():
    hosts = mesh(300)
    taken = Counter(n for g in range(400) for n in Vicinity(f"g{g:03d}", here).pick(hosts, LAYERS, 4, 0))
    inner = [taken[name] for name, h in hosts.items() if h.end - h.start == 6]
    assert min(inner) > 0.4 * sum(inner) / len(inner)
    assert max(inner) < 2.0 * sum(inner) / len(inner)


def test_near_hosts_are_taken_before_far_ones():
    hosts = mesh(1000)
    near = {f"n{k}" for k in range(0, 1000, 4)}
    names = Vicinity("g", lambda node: 0.0 if node in near else 0.045).pick(hosts, LAYERS, 8, 0)
    assert len(near.intersection(names)) > 0.6 * len(names)
    assert near.issuperset(Vicinity("g", here).pick({n: hosts[n] for n in near}, LAYERS, 8, 0))


def test_who_leaves_changes_little_and_the_way_there_nothing():
    hosts = mesh(500)
    vicinity = Vicinity("g", here)
    before = vicinity.pick(hosts, LAYERS, 6, 0)
    rest = {name: h for name, h in hosts.items() if name != before[3]}
    after = vicinity.pick(rest, LAYERS, 6, 1)
    assert before[3] not in after
    assert len(set(before) ^ set(after)) < 8
    assert after == Vicinity("g", here).pick(rest, LAYERS, 6, 0)


def test_a_gateway_with_many_sessions_weighs_more_hosts_and_long_goes_on_with_them():
    vicinity = Vicinity("g", here)
    assert vicinity.depth(0) == DEPTH_LEAST
    wide = vicinity.depth(100)
    assert wide >= 100 + DEPTH_LEAST
    assert vicinity.depth(60) == wide
    assert vicinity.depth(10) < wide / 2
