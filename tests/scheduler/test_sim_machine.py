"""One simulated node: cache room, prompts in line, and decode times against a token-by-token reference."""

import heapq
import random

import pytest

from scheduler import NodeShape
from scheduler.routing import Stage
from scheduler.sim.config import default_model
from scheduler.sim.machine import Machine
from scheduler.sim.request import Request
from scheduler.sim.trace import Ask

MODEL = default_model()
GIB = 1 << 30


def machine(span=(0, 16), read=400e9, flops=40e12, memory=16 * GIB):
    made = Machine(NodeShape("n", memory, flops, read), MODEL, 1e8, slice_s=0.04)
    made.settle(span)
    return made


def token_by_token(node, layers, streams, away_s, tokens):
    """Mean time in the node of a token, when each stream is away for a while between two visits.

    The node takes all that wait as one step, as a batching engine does; a step takes max(read + k * cache, k * flops).
    """
    rng = random.Random(3)
    arrivals = [(rng.random() * away_s, k) for k in range(streams)]
    heapq.heapify(arrivals)
    now_s, spent_s, seen = 0.0, 0.0, 0
    while seen < tokens:
        now_s = max(now_s, arrivals[0][0])
        batch = []
        while arrivals and arrivals[0][0] <= now_s:
            batch.append(heapq.heappop(arrivals))
        k = len(batch)
        now_s += layers * max(node.read_s + k * node.cache_s, k * node.flops_s)
        for at_s, stream in batch:
            spent_s += now_s - at_s
            seen += 1
            heapq.heappush(arrivals, (now_s + away_s * rng.uniform(0.7, 1.3), stream))
    return spent_s / seen


@pytest.mark.parametrize("streams", [1, 3, 10, 40])
@pytest.mark.parametrize("away_s", [0.05, 0.2])
@pytest.mark.parametrize("read", [200e9, 1000e9])
def test_a_visit_takes_about_what_single_tokens_would(streams, away_s, read):
    node = machine(read=read)
    node.streams = streams
    expected_s = token_by_token(node, 16, streams, away_s, 4000)
    visit_s = expected_s
    for _ in range(60):  # the rate follows from the visit, as it does from round to round
        node.rate = streams / (away_s + visit_s)
        visit_s = 0.5 * (visit_s + node.visit_s(16, False, 0.0))
    assert visit_s == pytest.approx(expected_s, rel=0.3)


def test_prompts_are_served_in_turn_and_slow_the_decode_beside_them():
    node = machine()
    calm_s = node.visit_s(16, False, 0.0)
    first = node.take_prompt(1000, 16, 0.0)
    second = node.take_prompt(1000, 16, 0.1)
    assert first == (0.0, pytest.approx(1000 * 16 * node.prompt_s))
    assert second[0] == pytest.approx(first[1])
    assert node.backlog_s(0.1) == pytest.approx(2 * first[1] - 0.1)
    assert node.visit_s(16, False, 0.1) > calm_s


def test_decode_beside_it_slows_a_prompt_but_never_stops_it():
    node = machine()
    alone_s = node.take_prompt(1000, 16, 0.0)[1]
    node.streams, node.rate = 50, 500.0
    beside_s = machine_with(node).take_prompt(1000, 16, 0.0)[1]
    assert alone_s < beside_s < 20 * alone_s


def machine_with(node):
    fresh = machine()
    fresh.streams, fresh.rate = node.streams, node.rate
    return fresh


def test_the_last_stage_reads_the_head_too():
    node = machine((48, 64))
    assert node.visit_s(16, True, 0.0) == pytest.approx(node.visit_s(16, False, 0.0) + node.head_s)


def test_sessions_take_room_by_their_own_layers_and_give_all_of_it_back():
    node = machine((0, 16))
    free = node.kv_free_bytes
    request = Request(1, Ask(0.0, 900, 100), "g")
    request.hold([Stage("n", 4, 10)], [node])
    assert free - node.kv_free_bytes == 1000 * 6 * MODEL.kv_bytes_per_token_per_layer
    request.hold([Stage("n", 4, 16)], [node])
    assert free - node.kv_free_bytes == 1000 * 12 * MODEL.kv_bytes_per_token_per_layer
    request.hold([], [])
    assert node.kv_free_bytes == free
    assert not node.sessions


def test_weights_and_cache_never_exceed_the_memory():
    node = machine((0, 16))
    whole = node.kv_free_bytes + MODEL.weight_bytes(0, 16) + MODEL.working_bytes
    assert whole == node.shape.memory_bytes
    assert node.kv_tokens_free() == node.kv_free_bytes // (16 * MODEL.kv_bytes_per_token_per_layer)


def test_a_round_cut_short_counts_the_tokens_that_were_out():
    request = Request(1, Ask(0.0, 900, 100), "g", state="decode", began_s=10.0, step_s=0.5)
    request.tokens_done = 5
    request.credit(12.3)
    assert request.tokens_done == 9
    request.credit(1000.0)
    assert request.tokens_done == 99
