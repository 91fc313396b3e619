"""Batches, priorities and measured times of one engine's worker."""

from __future__ import annotations

import threading

import pytest
import torch
import trio
import trio.testing

from model_shards import CheckpointIndex, Engine, ModelConfig, NoRoom, Step, load_span
from node import embedded
from node.serve import compute as module
from node.serve.compute import Compute, Stale
from node.serve.protocol import BACKGROUND, HIGH, NORMAL, PIECE_TOKENS

PROMPT = tuple(range(5, 5 + 2 * PIECE_TOKENS + 1))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine():
    directory = embedded.path()
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    return Engine(load_span(directory, index, config, 0, 2), kv_bytes_max=1 << 20)


class Gate:
    """Stands before an engine's runs: `entered` is set in the first one, which waits at each layer for `go`."""

    def __init__(self, engine, monkeypatch):
        self.batches = []
        self.entered, self.go = threading.Event(), threading.Event()
        run = engine.run

        def gated(steps, check_cancelled=lambda: None):
            self.batches.append([step.session for step in steps])

            def check():
                self.entered.set()
                self.go.wait(10)
                check_cancelled()

            return run(steps, check_cancelled=check)

        monkeypatch.setattr(engine, "run", gated)

    async def running(self):
        await trio.to_thread.run_sync(self.entered.wait, 10)


async def opened(compute, name, priority=NORMAL, tokens=64):
    await compute.open(name, 0, 2, tokens, priority=priority, prompt_tokens=tokens - 8)


@pytest.fixture
async def running(engine, nursery):
    compute = Compute(engine, trio.CapacityLimiter(1), s_per_layer=0.001)
    nursery.start_soon(compute.run)
    return compute


async def test_urgent_steps_go_first_and_background_ones_only_when_nothing_else_waits(
    running, engine, monkeypatch, nursery
):
    names = {"first": NORMAL, "late": BACKGROUND, "usual": NORMAL, "urgent": HIGH}
    for name, priority in names.items():
        await opened(running, name, priority)
    gate = Gate(engine, monkeypatch)
    nursery.start_soon(running.step, Step("first", 0, (1,)), NORMAL)
    await gate.running()
    async with trio.open_nursery() as others:
        for name, priority in list(names.items())[1:]:
            others.start_soon(running.step, Step(name, 0, (1,)), priority)
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["first"], ["urgent", "usual"], ["late"]]


async def test_a_background_batch_stops_between_layers_for_other_work_and_runs_again(
    running, engine, monkeypatch
):
    await opened(running, "late", BACKGROUND)
    await opened(running, "usual")
    gate, done = Gate(engine, monkeypatch), []

    async def step(name, priority):
        result = await running.step(Step(name, 0, (1, 2, 3)), priority)
        done.append((name, result.hidden.shape[0]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, "late", BACKGROUND)
        await gate.running()
        nursery.start_soon(step, "usual", NORMAL)
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["late"], ["usual"], ["late"]]
    assert done == [("usual", 3), ("late", 3)]
    assert engine.position("late") == 3


async def test_work_that_is_no_background_work_is_never_stopped(running, engine, monkeypatch):
    await opened(running, "usual")
    await opened(running, "urgent", HIGH)
    gate = Gate(engine, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.step, Step("usual", 0, (1,)), NORMAL)
        await gate.running()
        nursery.start_soon(running.step, Step("urgent", 0, (1,)), HIGH)
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["usual"], ["urgent"]]


async def test_queues_tell_what_prompts_have_still_to_come_by_class(running):
    running.prefill_s_per_layer = 0.01
    await opened(running, "usual", NORMAL, tokens=40)
    await opened(running, "late", BACKGROUND, tokens=24)
    assert running.queue_by_class_s() == pytest.approx((0.0, 32 * 0.02, 16 * 0.02))
    assert running.tokens_yielding() == 24
    await running.step(Step("usual", 0, tuple(range(30))))
    token_s = running.prefill_s_per_layer * 2
    assert running.queue_by_class_s() == pytest.approx((0.0, 2 * token_s, 16 * token_s))
    await running.close("late")
    assert (running.queue_by_class_s()[BACKGROUND], running.tokens_yielding()) == (0.0, 0)


async def test_decode_and_prompt_are_timed_apart(running):
    await opened(running, "a")
    await running.step(Step("a", 0, tuple(range(16))))
    assert (running.s_per_layer, running.prefill_s_per_layer > 0) == (0.001, True)
    before = running.prefill_s_per_layer
    await running.step(Step("a", 16, (1,)))
    assert running.s_per_layer != 0.001
    assert running.prefill_s_per_layer == before


async def test_a_node_that_got_slow_finds_out_by_itself_when_it_is_quick_again(running, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    await opened(running, "a")
    await running.step(Step("a", 0, (1,)))
    running.s_per_layer, running.prefill_s_per_layer = 5.0, 0.5
    await running.step(Step("a", 1, (1,)))
    with trio.fail_after(5):
        while running.s_per_layer > 0.5:
            await trio.lowlevel.checkpoint()
    assert running.prefill_s_per_layer < 0.1


async def test_what_a_session_computed_is_taken_over_in_whole_pieces_and_only_if_it_is_there(running, engine):
    await running.open("a", 0, 2, 300)
    await running.step(Step("a", 0, PROMPT[:PIECE_TOKENS]))
    await running.step(Step("a", PIECE_TOKENS, PROMPT[PIECE_TOKENS:]))
    await running.step(Step("a", len(PROMPT), (9,)))
    await running.close("a", keep=2 * PIECE_TOKENS)
    assert engine.cached(0, 2, (*PROMPT, 9, 9)) == 2 * PIECE_TOKENS
    with pytest.raises(Stale) as stale:
        await running.open("b", 0, 2, 600, prompt=(*PROMPT, *PROMPT), reuse=3 * PIECE_TOKENS)
    assert stale.value.tokens == 2 * PIECE_TOKENS
    await running.open("b", 0, 2, 300, prompt=PROMPT, reuse=2 * PIECE_TOKENS, prompt_tokens=len(PROMPT))
    assert engine.position("b") == 2 * PIECE_TOKENS
    assert sum(running.queue_by_class_s()) == pytest.approx(running.prefill_s_per_layer * 2)


async def test_without_room_nothing_is_kept(running):
    await running.open("a", 0, 2, 1024)
    await running.open("b", 0, 2, 1024)
    with pytest.raises(NoRoom):
        await running.open("c", 0, 2, 1024)
    assert running.kv_usage() == 1.0
    for name in "abc":
        await running.close(name)
    assert running.kv_usage() == 0.0
