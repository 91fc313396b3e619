import pytest

from scheduler import Hosted
from scheduler.health import Health, HealthConfig

NODES = [f"n{k}" for k in range(6)]


def run(health, node, ratio=1.0, times=10, at_s=0.0):
    for k in range(times):
        health.succeeded(node, ratio * 0.01, 0.01, at_s + k)


def test_unknown_nodes_are_good():
    standing = Health().standing("x", 0.0)
    assert (standing.state, standing.reliability, standing.slowdown) == ("good", 1.0, 1.0)


def test_a_straggler_stands_out_among_its_peers_and_is_forgiven_when_it_recovers():
    health = Health()
    for node in NODES:
        run(health, node, 3.0 if node == "n0" else 1.0)
    assert health.standing("n0", 20.0).state == "slow"
    assert health.standing("n0", 20.0).slowdown == pytest.approx(3.0, rel=0.1)
    assert {health.standing(n, 20.0).state for n in NODES[1:]} == {"good"}
    run(health, "n0", 1.5, times=30)
    assert health.standing("n0", 60.0).state == "slow"
    run(health, "n0", 1.1, times=30)
    assert health.standing("n0", 90.0).state == "good"


def test_a_straggler_that_nobody_uses_gets_another_try_and_a_longer_pause_when_it_is_slow_again():
    config = HealthConfig(slow_s=60.0)
    health = Health(config)
    for node in NODES:
        run(health, node, 3.0 if node == "n0" else 1.0)
    assert health.standing("n0", 50.0).state == "slow"
    assert health.standing("n0", 70.0).state == "probation"
    assert health.standing("n0", 70.0).reliability <= config.probation_reliability
    run(health, "n0", 3.0, times=config.slow_after, at_s=70.0)
    assert health.standing("n0", 74.0 + 2 * config.slow_s - 1).state == "slow"
    back_s = 74.0 + 2 * config.slow_s
    assert health.standing("n0", back_s).state == "probation"
    run(health, "n0", 1.0, times=config.probation_successes, at_s=back_s)
    standing = health.standing("n0", back_s + 10)
    assert (standing.state, standing.slowdown) == ("good", 1.0)


def test_when_all_are_slower_than_expected_nobody_is_a_straggler():
    health = Health()
    for _ in range(2):
        for node in NODES:
            run(health, node, 5.0)
    assert {health.standing(n, 20.0).state for n in NODES} == {"good"}
    assert all(health.standing(n, 20.0).slowdown == pytest.approx(1.0) for n in NODES)


@pytest.mark.parametrize(("others", "state"), [(0, "good"), (1, "slow"), (2, "slow")])
def test_who_stands_out_among_few(others, state):
    health = Health()
    for node in NODES[1 : 1 + others]:
        run(health, node, 5.0)
    run(health, "n0", 15.0)
    assert health.standing("n0", 20.0).state == state
    assert {health.standing(node, 20.0).state for node in NODES[1:]} == {"good"}


def test_a_straggler_is_seen_slower_in_all_that_it_does():
    health = Health()
    for node in NODES:
        run(health, node, 3.0 if node == "n0" else 1.0)
    hosted = [Hosted("n0", 0, 4, 0.01, prefill_s_per_token_per_layer=0.001), Hosted("n1", 0, 4, 0.01)]
    seen = {h.node: h for h in health.hosted(hosted, 20.0)}
    assert seen["n0"].prefill_s_per_token_per_layer == pytest.approx(0.003, rel=0.1)
    assert set(health.standings(20.0)) == set(NODES)


def test_a_failure_takes_a_node_out_then_on_probation_then_back():
    config = HealthConfig()
    health = Health(config)
    run(health, "a")
    health.failed("a", 100.0)
    assert health.standing("a", 100.0 + config.out_s - 0.1).state == "out"
    back_s = 100.0 + config.out_s
    assert health.standing("a", back_s).state == "probation"
    assert health.standing("a", back_s).reliability <= config.probation_reliability
    run(health, "a", times=config.probation_successes - 1, at_s=back_s)
    assert health.standing("a", back_s + 10).state == "probation"
    run(health, "a", times=1, at_s=back_s + 10)
    assert health.standing("a", back_s + 11).state == "good"


def test_relapses_double_the_time_out_and_are_forgotten_in_time():
    config = HealthConfig()
    health = Health(config)
    now_s, outs = 0.0, []
    for _ in range(12):
        health.failed("a", now_s)
        start_s = now_s
        while health.standing("a", now_s).state == "out":
            now_s += 1.0
        outs.append(now_s - start_s)
        now_s += 60.0
    assert outs[:4] == [10.0, 20.0, 40.0, 80.0]
    assert max(outs) == config.out_s_max
    now_s += config.relapse_memory_s + config.out_s_max
    health.failed("a", now_s)
    assert health.standing("a", now_s + config.out_s).state == "probation"


def test_many_requests_that_die_with_one_node_are_one_relapse():
    health = Health()
    for k in range(50):
        health.failed("a", 100.0 + k / 100)
    assert health.standing("a", 100.5 + 2 * HealthConfig().out_s).state == "probation"


def test_reliability_falls_with_failures_and_rises_with_successes():
    health = Health()
    run(health, "a", times=20)
    before = health.standing("a", 50.0).reliability
    health.failed("a", 50.0)
    after = health.standing("a", 500.0).reliability
    run(health, "a", times=200, at_s=500.0)
    assert after < before
    assert after < health.standing("a", 800.0).reliability <= 1.0


def test_routing_sees_spans_without_those_out_unless_nobody_else_serves_their_layers():
    health = Health()
    for node in NODES:
        run(health, node, 4.0 if node == "n3" else 1.0)
    health.failed("n0", 20.0)
    health.failed("n2", 20.0)
    hosted = [
        Hosted("n0", 0, 4, 0.01),
        Hosted("n1", 0, 4, 0.01),
        Hosted("n2", 4, 8, 0.01),
        Hosted("n3", 2, 6, 0.01),
    ]
    seen = {h.node: h for h in health.hosted(hosted, 21.0)}
    assert set(seen) == {"n1", "n2", "n3"}
    assert seen["n1"].s_per_layer == 0.01
    assert seen["n3"].s_per_layer == pytest.approx(0.04, rel=0.1)
    assert seen["n2"].reliability < 0.1
    health.forget("n0")
    assert health.standing("n0", 21.0).state == "good"
