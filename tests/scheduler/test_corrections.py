import pytest

from scheduler import InputError
from scheduler.corrections import Corrections, Observation, calibrated, expected_s
from scheduler.cost import decode_s_per_layer
from scheduler.seating import seat_of


@pytest.fixture
def model(build):
    return build.model()


@pytest.fixture
def node(build):
    return build.node("a", 8)


def decode(seconds, layers=4, tokens=1, **more):
    return Observation("a", "m", "decode", layers, tokens, seconds, **more)


def test_an_unseen_node_keeps_its_roofline(model, node):
    assert Corrections().corrected(node, "m", model) == node


def test_estimates_reach_what_is_observed_and_plans_follow(model, node):
    corrections = Corrections()
    slow_s = 3 * expected_s(decode(1.0), model, node)
    for k in range(60):
        corrections.observe(decode(slow_s), model, node, now_s=float(k))
    seen = corrections.corrected(node, "m", model)
    assert corrections.slowdown("a", "m", "decode") == pytest.approx(3.0, rel=0.1)
    assert seat_of(model, seen).layer_s == pytest.approx(3 * seat_of(model, node).layer_s, rel=0.1)
    assert seen.prefill_s_per_token_per_layer is None


def test_prefill_and_decode_models_and_nodes_are_apart(model, node):
    corrections = Corrections()
    slow_s = 4 * expected_s(decode(1.0), model, node)
    corrections.observe(decode(slow_s), model, node, 0.0)
    assert corrections.slowdown("a", "m", "decode") > 1.1
    assert corrections.slowdown("a", "m", "prefill") == 1.0
    assert corrections.slowdown("a", "other", "decode") == 1.0
    assert corrections.slowdown("b", "m", "decode") == 1.0
    corrections.forget("a")
    assert corrections.slowdown("a", "m", "decode") == 1.0


def test_one_outlier_moves_little_and_lasting_drift_moves_all(model, node):
    corrections = Corrections()
    usual_s = expected_s(decode(1.0), model, node)
    for k in range(20):
        corrections.observe(decode(usual_s), model, node, float(k))
    corrections.observe(decode(1000 * usual_s), model, node, 20.0)
    assert corrections.slowdown("a", "m", "decode") < 1.1
    for k in range(60):
        corrections.observe(decode(8 * usual_s), model, node, 21.0 + 30 * k)
    assert corrections.slowdown("a", "m", "decode") == pytest.approx(8.0, rel=0.3)


def test_what_is_seen_at_one_batch_speaks_for_another(model, node):
    corrections = Corrections()
    for k in range(40):
        seen = decode(1.0, tokens=64)
        corrections.observe(decode(2 * expected_s(seen, model, node), tokens=64), model, node, float(k))
    one = corrections.corrected(node, "m", model, batch=1)
    assert one.decode_s_per_layer == pytest.approx(2 * seat_of(model, node).layer_s, rel=0.1)


def test_a_measured_node_is_compared_with_its_roofline_not_with_its_measure(model, node):
    corrections = Corrections()
    for k in range(40):
        current = corrections.corrected(node, "m", model)
        corrections.observe(decode(2 * expected_s(decode(1.0), model, node)), model, current, float(k))
    assert corrections.slowdown("a", "m", "decode") == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(model, node, seconds):
    with pytest.raises(InputError, match="seconds"):
        Corrections().observe(decode(seconds), model, node, 0.0)


def test_rooflines_flatter_so_the_unmeasured_are_reckoned_as_slow_as_the_measured_usually_are(model, build):
    nodes = [build.node(name, 8) for name in "abcde"]
    plain_s = decode_s_per_layer(model, nodes[0])
    measured = {"a": 2 * plain_s, "b": 4 * plain_s, "c": 9 * plain_s}
    found = {n.id: n for n in calibrated(nodes, model, measured, {"a": 1e-3})}
    assert [found[n].decode_s_per_layer for n in "abc"] == list(measured.values())
    assert found["d"].decode_s_per_layer == pytest.approx(4 * plain_s)
    assert found["e"].prefill_s_per_token_per_layer == pytest.approx(1e-3)
    assert calibrated(nodes, model, {}, {}) == nodes
