"""Prompts that begin alike: what nodes keep, what is read again, and that gateways send to where it is kept."""

import json
from dataclasses import replace

import pytest

from scheduler import NodeShape
from scheduler.routing import Stage
from scheduler.sim import Load, SimConfig, default_model, run, simulate
from scheduler.sim.machine import Machine
from scheduler.sim.request import Request
from scheduler.sim.trace import BLOCK_TOKENS, Ask, asks

MODEL = default_model()
GIB = 1 << 30


def machine(memory=12 * GIB):
    made = Machine(NodeShape("n", memory, 40e12, 400e9), MODEL, 1e8, slice_s=0.04)
    made.settle((0, 16))
    return made


def conversation(tmp_path, alike, count=40, apart_ms=3000):
    rows = [
        {
            "timestamp": k * apart_ms,
            "input_length": 4 * BLOCK_TOKENS,
            "output_length": 10,
            "hash_ids": [0, 1, 2, 3] if alike else [4 * k + j for j in range(4)],
        }
        for k in range(count)
    ]
    path = tmp_path / f"{alike}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Load(trace=str(path))


def config(load):
    return SimConfig(
        nodes=14, hours=0.03, churn_per_hour=0.0, gateways=4, load=load,
        model=replace(default_model(24), concurrency=4),
    )  # fmt: skip


def test_whole_blocks_of_a_prompt_are_read_from_the_trace_and_cut_with_it(tmp_path):
    found = asks(conversation(tmp_path, True), replace(MODEL, context_tokens=3 * BLOCK_TOKENS), 10.0, 1)
    assert found[0].blocks == (0, 1)
    assert found[0].prompt_tokens == 3 * BLOCK_TOKENS - 10


def test_only_leading_blocks_that_are_kept_count():
    node = machine()
    node.remember((7, 8, 9))
    assert node.cached_tokens((7, 8, 5)) == 2 * BLOCK_TOKENS
    assert node.cached_tokens((8, 9)) == 2 * BLOCK_TOKENS
    assert node.cached_tokens((5, 8, 9)) == 0


def test_blocks_are_kept_in_free_room_only_and_the_first_of_a_prompt_the_longest():
    node = machine()
    node.kv_free_bytes = 2 * BLOCK_TOKENS * 16 * MODEL.kv_bytes_per_token_per_layer
    node.remember((1, 2, 3))
    assert node.cached_tokens((1, 2, 3)) == 2 * BLOCK_TOKENS
    node.settle((0, 8))
    assert node.cached_tokens((1, 2, 3)) == 0


def test_a_prompt_whose_beginning_is_kept_costs_less():
    request = Request(0, Ask(0.0, 2048, 10, (1, 2, 3, 4)), "g")
    node = machine()
    request.hold([Stage("n", 0, 16)], [node])
    request.promise(0, 1)
    whole_s = node.promised_s
    request.fulfil(0)
    request.cached_tokens = 1024
    request.promise(0, 1)
    assert node.promised_s == pytest.approx(whole_s / 2)


def test_prompts_alike_are_sent_to_where_they_are_kept(tmp_path):
    alike, unlike = run(config(conversation(tmp_path, True))), run(config(conversation(tmp_path, False)))
    assert unlike["prefix_reused"] == 0.0
    assert alike["prefix_reused"] > 0.7
    assert alike["ttft_s"]["p50"] < 0.6 * unlike["ttft_s"]["p50"]
    random = run(replace(config(conversation(tmp_path, True)), policy="random"))
    assert random["prefix_reused"] < alike["prefix_reused"]


def test_gateways_know_a_prefix_only_once_its_nodes_have_announced_it(tmp_path):
    service = simulate(config(conversation(tmp_path, True, count=1)))
    policy, fleet = service.policy, service.fleet
    request = Request(1, Ask(0.0, 2048, 10, (0, 1, 9)), service.world.gateways[0])
    served_s, nodes = policy._prefixes[1]
    for elapsed_s, known in ((0.5, frozenset()), (fleet.config.view_age_s, nodes)):
        fleet.clock.now_s = served_s + elapsed_s
        asked = policy._asked(fleet, request)
        assert asked.prefix_nodes == known
    assert asked.prefix_tokens == 2 * BLOCK_TOKENS
