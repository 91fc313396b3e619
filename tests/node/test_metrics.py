"""Counters, gauges and histograms in Prometheus' text."""

from __future__ import annotations

import pytest

from node.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def sample(metrics: Metrics, line: str) -> float | None:
    found = [row for row in metrics.text().decode().splitlines() if row.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else None


def test_a_generation_is_followed_from_waiting_to_its_end() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    label = '{model_name="m"}'
    with metrics.track("m", 7) as running:
        assert sample(metrics, f"shoal_num_requests_waiting{label}") == 1
        running.entered()
        assert sample(metrics, f"shoal_num_requests_waiting{label}") == 0
        assert sample(metrics, f"shoal_num_requests_running{label}") == 1
        clock.now_s += 0.3
        running.token()
        clock.now_s += 0.02
        running.token()
        running.finished("length")
    assert sample(metrics, f"shoal_num_requests_running{label}") == 0
    assert sample(metrics, f"shoal_prompt_tokens_total{label}") == 7
    assert sample(metrics, f"shoal_generation_tokens_total{label}") == 2
    assert sample(metrics, f"shoal_time_to_first_token_seconds_sum{label}") == pytest.approx(0.3)
    assert sample(metrics, f"shoal_inter_token_latency_seconds_sum{label}") == pytest.approx(0.02)
    assert sample(metrics, f"shoal_e2e_request_latency_seconds_sum{label}") == pytest.approx(0.32)
    ended = 'shoal_request_success_total{finished_reason="length",model_name="m"}'
    assert sample(metrics, ended) == 1


def fail_inside(metrics: Metrics, enter: bool) -> None:
    with metrics.track("m", 1) as running:
        if enter:
            running.entered()
        raise ValueError


@pytest.mark.parametrize("enter", [False, True])
def test_a_generation_that_fails_no_longer_counts_as_running(enter) -> None:
    metrics = Metrics()
    with pytest.raises(ValueError):
        fail_inside(metrics, enter)
    assert sample(metrics, 'shoal_num_requests_running{model_name="m"}') in (0, None)
    assert sample(metrics, 'shoal_num_requests_waiting{model_name="m"}') == 0


def test_two_nodes_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.count_failover("m", 0.2, 5)
    assert sample(first, 'shoal_replayed_tokens_total{model_name="m"}') == 5
    assert sample(second, 'shoal_failovers_total{model_name="m"}') is None


def test_mesh_gauges_come_from_the_mesh_document_and_forget_what_is_gone() -> None:
    metrics = Metrics()
    peers = [{"connected": True, "rtt_ms": rtt, "relayed": rtt > 50} for rtt in (1, 2, 3, 100)]
    nodes = [
        {"self": True, "connected": True, "rtt_ms": None},
        *peers,
        {"connected": False, "rtt_ms": None},
    ]
    metrics.observe_mesh({"nodes": nodes, "models": [{"name": "m", "copies_min": 2, "ready": True}]})
    assert sample(metrics, "shoal_mesh_nodes") == 6
    assert sample(metrics, "shoal_mesh_connected_peers") == 4
    assert sample(metrics, "shoal_mesh_relayed_share") == 0.25
    assert sample(metrics, 'shoal_mesh_ping_seconds{quantile="0.5"}') == pytest.approx(0.003)
    assert sample(metrics, 'shoal_mesh_ping_seconds{quantile="0.99"}') == pytest.approx(0.1)
    assert sample(metrics, 'shoal_mesh_rarest_layer_replicas{model_name="m"}') == 2
    assert sample(metrics, 'shoal_mesh_model_ready{model_name="m"}') == 1
    metrics.observe_mesh({"nodes": nodes[:1], "models": []})
    assert sample(metrics, 'shoal_mesh_model_ready{model_name="m"}') is None
    assert sample(metrics, 'shoal_mesh_rarest_layer_replicas{model_name="m"}') is None
    assert sample(metrics, 'shoal_mesh_ping_seconds{quantile="0.5"}') is None
    assert sample(metrics, "shoal_mesh_relayed_share") == 0


def test_what_the_gateway_thinks_of_nodes_is_shown_and_forgotten_with_them() -> None:
    metrics = Metrics()
    slow = {"peer": "p", "health": {"state": "slow", "slowdown": 2.5, "reliability": 0.9}}
    good = {"peer": "q", "health": {"state": "good", "slowdown": 1.0, "reliability": 1.0}}
    metrics.observe_mesh({"nodes": [slow, good, {"peer": "r", "health": None}], "models": []})
    assert sample(metrics, 'shoal_mesh_nodes_by_health{state="slow"}') == 1
    assert sample(metrics, 'shoal_node_slowdown{peer="p"}') == 2.5
    assert sample(metrics, 'shoal_node_reliability{peer="p"}') == 0.9
    assert sample(metrics, 'shoal_node_slowdown{peer="r"}') is None
    metrics.observe_mesh({"nodes": [good], "models": []})
    assert sample(metrics, 'shoal_mesh_nodes_by_health{state="slow"}') is None
    assert sample(metrics, 'shoal_node_slowdown{peer="p"}') is None


def test_what_the_serving_side_reports_is_shown() -> None:
    metrics = Metrics()
    metrics.set_kv_usage("m", 0.25)
    metrics.count_prefix("m", queries=10, hits=4)
    metrics.count_failure("m", "StageLost")
    metrics.count_preemption("m")
    assert sample(metrics, 'shoal_num_preemptions_total{model_name="m"}') == 1
    assert sample(metrics, 'shoal_kv_cache_usage_perc{model_name="m"}') == 0.25
    assert sample(metrics, 'shoal_prefix_cache_hits_total{model_name="m"}') == 4
    assert sample(metrics, 'shoal_prefix_cache_queries_total{model_name="m"}') == 10
    assert sample(metrics, 'shoal_request_failure_total{code="StageLost",model_name="m"}') == 1


def test_guilty_peers_of_runs_are_counted():
    metrics = Metrics()
    runs = {"r": {"epochs": {}, "audited_parts": 7, "guilty": {"a": "altered", "b": "equivocated"}}}
    metrics.observe_mesh({"runs": runs})
    assert sample(metrics, 'shoal_run_guilty_peers{run="r"}') == 2
    assert sample(metrics, 'shoal_run_audited_parts{run="r"}') == 7
    metrics.observe_mesh({"runs": {}})
    assert sample(metrics, 'shoal_run_guilty_peers{run="r"}') is None
