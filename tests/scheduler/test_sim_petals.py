"""The Petals-like baseline: paths, old records, bans and tokens by way of the client, as its sources have them."""

from dataclasses import replace

import pytest

from scheduler.routing import Stage
from scheduler.sim import Load, SimConfig, default_model, simulate
from scheduler.sim.paths import Server, fastest_path
from scheduler.sim.petals import ANNOUNCE_S, EXPIRES_S, REFRESH_S
from scheduler.sim.request import Request
from scheduler.sim.trace import Ask

SMALL = SimConfig(
    policy="petals",
    nodes=14,
    hours=0.02,
    churn_per_hour=0.0,
    load=Load(requests_per_s=0.4),
    model=replace(default_model(24), concurrency=4),
    gateways=4,
)


def flat(_a, _b):
    return 0.01


def test_the_path_is_the_quickest_and_a_server_is_used_to_its_end():
    servers = [
        Server("a", 0, 6, 0.001, 0.0),
        Server("b", 3, 8, 0.0001, 0.0),
        Server("c", 6, 8, 0.002, 0.0),
        Server("slow", 0, 8, 0.01, 0.0),
    ]
    assert fastest_path(servers, (0, 8), "g", flat) == [Stage("a", 0, 6), Stage("b", 6, 8)]


def test_a_server_short_of_cache_is_the_last_choice_but_one():
    servers = [Server("full", 0, 8, 0.001, 10.0), Server("slow", 0, 8, 0.5, 0.0)]
    assert fastest_path(servers, (0, 8), "g", flat) == [Stage("slow", 0, 8)]
    assert fastest_path(servers[:1], (0, 8), "g", flat) == [Stage("full", 0, 8)]


def test_part_of_the_layers_can_be_asked_for_and_a_hole_is_no_path():
    servers = [Server("a", 0, 4, 0.001, 0.0), Server("b", 4, 8, 0.001, 0.0)]
    assert fastest_path(servers, (2, 6), "g", flat) == [Stage("a", 2, 4), Stage("b", 4, 6)]
    assert fastest_path(servers[:1], (2, 6), "g", flat) is None


def test_clients_know_a_dead_server_until_they_read_the_records_again_and_it_expires():
    service = simulate(SMALL)
    policy, fleet = service.policy, service.fleet
    gateway = service.world.gateways[0]
    known = policy._table(fleet, gateway).servers
    victim = next(iter(known))
    fleet.remove(victim, crash=True)
    assert victim in policy._table(fleet, gateway).servers
    fleet.clock.now_s += REFRESH_S + 1
    policy.tick(fleet)
    assert victim in policy._table(fleet, gateway).servers
    fleet.clock.now_s += EXPIRES_S + REFRESH_S
    policy.tick(fleet)
    assert victim not in policy._table(fleet, gateway).servers


def test_who_failed_is_banned_for_longer_each_time_and_forgiven_when_it_answers():
    service = simulate(SMALL)
    policy, fleet = service.policy, service.fleet
    gateway = service.world.gateways[0]
    request = Request(0, Ask(0.0, 100, 10), gateway)
    victim = policy.choose(fleet, request)[0].node
    request.excluded.add(victim)
    assert victim not in {stage.node for stage in policy.choose(fleet, request)}
    table = policy._table(fleet, gateway)
    until_s, times = table.bans[victim]
    assert (until_s - fleet.clock.now_s, times) == (pytest.approx(15.0), 1)
    request.stages = [Stage(victim, 0, 4)]
    policy.confirm(fleet, request, {})
    assert victim not in table.bans


def test_a_token_goes_by_way_of_the_client():
    far = replace(SMALL, region_latency_s=0.001, between_latency_s=0.1, nodes=20)
    by_client = simulate(far)
    straight = simulate(replace(far, policy="shoal"))

    def detour_s(service):
        done = [r for r in service.requests if r.state == "done" and r.ask.answer_tokens > 20]
        return sum((r.end_s - r.first_s) / (r.ask.answer_tokens - 1) for r in done) / len(done)

    assert detour_s(by_client) > detour_s(straight)


def test_announcements_are_every_two_minutes():
    service = simulate(replace(SMALL, hours=0.1))
    times = {record.said_s for record in service.policy._records.values()}
    assert max(times) - min(times) <= ANNOUNCE_S
    assert len(times) > 3
