"""The simulated mesh: the same figures from the same seed, requests that go on after a loss, and honest accounts."""

import json
from dataclasses import replace

import pytest

from scheduler import InputError, Shortage
from scheduler.outlook import Outlook
from scheduler.sim import POLICIES, Load, SimConfig, capacity, compare, default_model, run, simulate

SMALL = SimConfig(
    nodes=14,
    hours=0.03,
    drain_s=200.0,
    load=Load(requests_per_s=0.8),
    model=replace(default_model(24), concurrency=4),
    gateways=4,
)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_seed_gives_one_dict(policy):
    config = replace(SMALL, policy=policy, churn_per_hour=8.0)
    first, second = run(config), run(config)
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert run(replace(config, seed=2)) != first


@pytest.mark.parametrize("policy", POLICIES)
def test_a_calm_mesh_answers_everything(policy):
    found = run(replace(SMALL, policy=policy, churn_per_hour=0.0, load=Load(requests_per_s=0.2)))
    assert found["failed"] == found["lost"] == found["bytes_moved"] == 0
    assert found["done"] == found["requests"] > 10


def test_every_request_is_in_exactly_one_account():
    found = run(replace(SMALL, churn_per_hour=20.0, load=Load(requests_per_s=3.0)))
    parts = found["done"] + found["refused"] + found["lost"] + found["unfinished"]
    assert parts == found["requests"]
    assert found["failed"] == parts - found["done"]
    assert found["nodes_left"] > 3
    assert sum(found["series"]["asked_per_s"]) * 60 == pytest.approx(found["requests"], abs=1)


def test_room_and_rates_return_to_nothing_when_all_is_done():
    service = simulate(replace(SMALL, churn_per_hour=12.0))
    assert {r.state for r in service.requests} <= {"done", "refused", "lost"}
    for machine in service.fleet.up.values():
        assert not machine.sessions
        assert machine.streams == 0
        assert machine.rate == pytest.approx(0.0, abs=1e-6)
        if machine.span is not None:
            room = machine.shape.memory_bytes - machine.model.working_bytes
            room -= machine.model.weight_bytes(*machine.span) + machine.set_aside_bytes
            assert machine.kv_free_bytes == room


@pytest.mark.parametrize("policy", ["shoal", "petals", "random", "parallax-mending"])
def test_a_broken_request_goes_on_where_there_is_an_alternate(policy):
    config = replace(SMALL, policy=policy, churn_per_hour=12.0, load=Load(requests_per_s=1.5))
    found = run(config)
    assert found["broken"] > 3
    assert found["lost_with_alternate"] == 0


def test_a_scheduler_that_does_not_mend_is_charged_with_its_losses():
    found = run(replace(SMALL, policy="parallax", churn_per_hour=12.0, load=Load(requests_per_s=1.5)))
    assert found["lost"] > 0
    assert found["lost_with_alternate"] > 0


def test_a_request_is_lost_without_alternate_when_its_layers_have_no_host_left():
    service = simulate(replace(SMALL, churn_per_hour=400.0, return_share=0.0, diurnal=0.0, nodes=6))
    lost = [r for r in service.requests if r.state == "lost"]
    assert lost
    assert not all(r.had_alternate for r in lost)


def test_replacing_a_lost_stage_keeps_the_tokens_that_were_out():
    service = simulate(replace(SMALL, churn_per_hour=12.0, load=Load(requests_per_s=1.5)))
    mended = [r for r in service.requests if r.breaks and r.state == "done"]
    assert mended
    for request in mended:
        assert request.tokens_done == request.ask.answer_tokens
        assert request.end_s >= request.first_s


def test_crashes_cost_time_that_farewells_do_not():
    config = replace(SMALL, churn_per_hour=20.0, load=Load(requests_per_s=1.0), detect_s=20.0)
    crash, farewell = run(config), run(replace(config, crash_share=0.0))
    assert crash["nodes_left"] == farewell["nodes_left"]
    assert crash["tpot_s"]["p99"] > farewell["tpot_s"]["p99"]


def test_joiners_fetch_what_they_are_told_to_host():
    found = run(replace(SMALL, churn_per_hour=20.0, return_share=0.0))
    assert found["nodes_joined"] > 2
    assert found["replans"] > 1
    assert found["bytes_moved"] > SMALL.model.layer_bytes


def test_the_comparison_puts_every_policy_before_the_same_load_and_churn():
    found = compare(replace(SMALL, churn_per_hour=8.0))
    runs = found["runs"]
    assert list(runs) == list(POLICIES)
    for key in ("requests", "nodes_left", "nodes_joined"):
        assert len({figures[key] for figures in runs.values()}) == 1
    better = found["better_baseline"]
    assert better["policy"] in ("petals", "parallax")
    best = max(runs["petals"]["goodput_per_s"], runs["parallax"]["goodput_per_s"])
    assert better["goodput_ratio"] == pytest.approx(runs["shoal"]["goodput_per_s"] / best, abs=1e-3)


def test_gateways_with_one_old_view_do_not_all_pick_one_chain(monkeypatch):
    config = replace(
        SMALL, nodes=24, hours=0.01, gateways=32, churn_per_hour=0.0, load=Load(requests_per_s=8.0)
    )
    wary = run(config)
    monkeypatch.setattr(Outlook, "instead", lambda *_args, **_more: None)
    stubborn = run(config)
    assert wary["herding"]["most_picked_chain"] < 0.5
    assert wary["attainment"] > stubborn["attainment"]


def test_gateways_with_one_old_view_find_chains_that_bear_the_load():
    """Nodes say how much work they have when a session is opened, so an old view costs little."""
    config = replace(
        SMALL, nodes=24, hours=0.02, gateways=32, churn_per_hour=0.0, load=Load(requests_per_s=8.0)
    )
    old = run(config)
    assert old["retries"] > 0
    assert old["attainment"] > 0.98


def test_a_prompt_on_its_way_counts_as_work_and_is_counted_once():
    service = simulate(replace(SMALL, churn_per_hour=12.0, load=Load(requests_per_s=1.5)))
    assert all(m.promised_s == pytest.approx(0.0, abs=1e-6) for m in service.fleet.up.values())
    assert not any(request.promises for request in service.requests)


def test_capacity_is_the_load_at_which_nine_of_ten_keep_their_targets():
    config = replace(SMALL, hours=0.01, churn_per_hour=0.0)
    found = capacity(config, steps=2)
    assert found["requests_per_s"] > 0
    assert run(replace(config, load=replace(config.load, speed=found["speed"])))["attainment"] >= 0.9
    beyond = replace(config.load, speed=2.1 * found["speed"])
    assert run(replace(config, load=beyond))["attainment"] < 0.9


def test_regions_may_be_as_far_apart_as_a_matrix_says():
    rows = ((0.001, 0.2), (0.2, 0.001))
    far = simulate(replace(SMALL, regions=2, latency_s=rows)).world
    apart = {
        far.link(a, b).latency_s for a in far.gateways for b in far.gateways if far.region[a] != far.region[b]
    }
    assert min(apart) >= 0.15
    with pytest.raises(InputError, match="latency_s"):
        replace(SMALL, regions=3, latency_s=rows)


def test_early_refusal_keeps_the_others_within_target_when_too_much_is_asked():
    config = replace(SMALL, nodes=8, hours=0.015, churn_per_hour=0.0, load=Load(requests_per_s=5.0))
    early, late = run(config), run(replace(config, early_rejection=False))
    assert early["refused"] > 0
    assert early["goodput_per_s"] > late["goodput_per_s"]
    assert early["ttft_s"]["p99"] < late["ttft_s"]["p99"]


@pytest.mark.parametrize("copies", [20, None])
def test_a_large_mesh_is_seen_in_part_and_still_serves(copies):
    """With 20 copies a third of the nodes host nothing: what a gateway weighs are hosts, and every layer's."""
    config = replace(SMALL, nodes=100, view_nodes_max=24, hours=0.01, churn_per_hour=4.0, copies=copies)
    service = simulate(config)
    fleet = service.fleet
    weighed = service.policy.weighed(fleet, service.world.gateways[0])
    assert len(weighed) < len(fleet.view().hosts)
    for layer in range(fleet.model.layers):
        assert sum(h.start <= layer < h.end for h in weighed) >= min(8, fleet.hosts_of_layer[layer])
    found = run(config)
    assert found["done"] == found["requests"] > 10
    assert found["retries"] <= found["broken"]


def test_a_mesh_of_any_size_is_planned_whole():
    config = replace(SMALL, nodes=150, model=replace(default_model(8), concurrency=4), hours=0.001)
    fleet = simulate(replace(config, churn_per_hour=0.0)).fleet
    assert all(machine.span is not None for machine in fleet.up.values())
    assert min(fleet.hosts_of_layer) > 64


def test_what_a_gateway_does_not_weigh_takes_over_what_was_lost(monkeypatch):
    """None of the hosts that a gateway weighs has the lost layers any more: another one of the mesh has."""
    busy = replace(SMALL, nodes=60, view_nodes_max=12, hours=0.002, load=Load(requests_per_s=8.0))
    service = simulate(replace(busy, churn_per_hour=0.0, drain_s=0.0))
    fleet, policy = service.fleet, service.policy
    request = next(r for r in service.requests if r.state == "decode")
    lost = (request.stages[0].start, request.stages[0].end)
    blind = [h for h in policy.weighed(fleet, request.gateway) if h.end <= lost[0] or lost[1] <= h.start]
    monkeypatch.setattr(policy, "weighed", lambda *_: blind)
    found = policy.splice(fleet, request, lost, frozenset())
    assert (found[0].start, found[-1].end) == lost


def test_a_mesh_too_small_for_the_model_says_so():
    for policy in ("shoal", "petals", "parallax"):
        with pytest.raises(Shortage):
            run(replace(SMALL, policy=policy, nodes=1, model=default_model(400)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", "best"),
        ("nodes", 0),
        ("churn_per_hour", -0.1),
        ("hours", 0.0),
        ("crash_share", 1.5),
        ("seed_s", 1),
    ],
)
def test_bad_figures_are_refused_by_name(field, value):
    with pytest.raises((InputError, TypeError), match=field):
        SimConfig(**{field: value})
