"""Batches, priorities and measured times of one engine's worker."""

from __future__ import annotations

import threading

import pytest
import torch
import trio
import trio.testing

from model_shards import CheckpointIndex, Engine, ModelConfig, NoRoom, ParkingLot, Step, StepError, load_span
from node import embedded
from node.serve import compute as module
from node.serve.compute import Abandoned, Compute, Stale
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
    nursery.start_soon(running.step, Step("first", 0, (1,)))
    await gate.running()
    async with trio.open_nursery() as others:
        for name in list(names)[1:]:
            others.start_soon(running.step, Step(name, 0, (1,)))
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["first"], ["urgent", "usual"], ["late"]]


async def test_a_background_batch_stops_between_layers_for_other_work_and_runs_again(
    running, engine, monkeypatch
):
    await opened(running, "late", BACKGROUND)
    await opened(running, "usual")
    gate, done = Gate(engine, monkeypatch), []

    async def step(name):
        result = await running.step(Step(name, 0, (1, 2, 3)))
        done.append((name, result.hidden.shape[0]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, "late")
        await gate.running()
        nursery.start_soon(step, "usual")
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
        nursery.start_soon(running.step, Step("usual", 0, (1,)))
        await gate.running()
        nursery.start_soon(running.step, Step("urgent", 0, (1,)))
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["usual"], ["urgent"]]


async def test_queues_tell_what_prompts_have_still_to_come_by_class(running):
    running.prefill_s_per_layer = 0.01
    await opened(running, "usual", NORMAL, tokens=40)
    await opened(running, "late", BACKGROUND, tokens=24)
    assert running.queue_by_class_s() == pytest.approx((0.0, 32 * 0.02, 16 * 0.02))
    assert running.tokens_yielding() == 32  # in whole blocks
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


def kv_engine(parking_bytes):
    directory = embedded.path()
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    span = load_span(directory, index, config, 0, 2)
    return Engine(span, kv_bytes_max=1 << 20, parking=ParkingLot(parking_bytes))


async def test_background_sessions_are_parked_for_others_and_go_on_bit_for_bit(nursery):
    compute = Compute(kv_engine(1 << 20), trio.CapacityLimiter(1))
    nursery.start_soon(compute.run)
    await compute.open("alone", 0, 2, 1024)
    wanted = [await compute.step(Step("alone", at, (at + 3,))) for at in range(4)]
    await compute.close("alone")
    await compute.open("guest", 0, 2, 1024, priority=BACKGROUND)
    await compute.open("kept", 0, 2, 1024)
    found = [await compute.step(Step("guest", at, (at + 3,))) for at in range(2)]
    await compute.open("urgent", 0, 2, 1024)
    assert compute.tokens_yielding() == 0

    async def go_on():
        for at in range(2, 4):
            found.append(await compute.step(Step("guest", at, (at + 3,))))

    async with trio.open_nursery() as waiting:
        waiting.start_soon(go_on)
        await compute.step(Step("urgent", 0, (1, 2, 3)))
        await trio.testing.wait_all_tasks_blocked()
        assert len(found) == 2
        with pytest.raises(NoRoom):
            await compute.open("newcomer", 0, 2, 16, priority=BACKGROUND)
        await compute.close("urgent")
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(wanted, found, strict=True))
    for name in ("guest", "kept"):
        await compute.close(name)
    assert compute.kv_usage() == 0.0


async def test_without_room_to_park_nobody_is_parked_and_the_newcomer_hears_when_to_come_again(nursery):
    compute = Compute(kv_engine(0), trio.CapacityLimiter(1))
    nursery.start_soon(compute.run)
    await compute.open("guest", 0, 2, 1024, priority=BACKGROUND)
    await compute.open("kept", 0, 2, 1024)
    await compute.step(Step("guest", 0, (1, 2)))
    with pytest.raises(NoRoom) as refused:
        await compute.open("usual", 0, 2, 16)
    assert 0 < refused.value.retry_after_s <= 60
    assert (await compute.step(Step("guest", 2, (3,)))).hidden.shape[0] == 1


async def test_a_long_message_runs_in_pieces_and_a_decode_waits_for_one_of_them(
    running, engine, monkeypatch, nursery
):
    await running.open("long", 0, 2, 400)
    await opened(running, "talk")
    gate, whole = Gate(engine, monkeypatch), []

    async def read():
        whole.append(await running.step(Step("long", 0, tuple(range(3 * PIECE_TOKENS + 5)))))

    async with trio.open_nursery() as others:
        others.start_soon(read)
        await gate.running()
        others.start_soon(running.step, Step("talk", 0, (1,)))
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert gate.batches == [["long"], ["talk"], ["long"], ["long"], ["long"]]
    assert whole[0].hidden.shape[0] == 3 * PIECE_TOKENS + 5
    await running.open("pieces", 0, 2, 400)
    parts = [
        await running.step(Step("pieces", at, tuple(range(3 * PIECE_TOKENS + 5))[at : at + PIECE_TOKENS]))
        for at in range(0, 3 * PIECE_TOKENS + 5, PIECE_TOKENS)
    ]
    assert torch.equal(torch.cat([part.hidden for part in parts]), whole[0].hidden)


async def test_a_session_that_is_closed_while_its_only_step_runs_stops_between_layers(
    running, engine, monkeypatch
):
    await opened(running, "gone")
    gate = Gate(engine, monkeypatch)
    async with trio.open_nursery() as nursery:

        async def step():
            with pytest.raises(Abandoned):
                await running.step(Step("gone", 0, (1, 2)))

        nursery.start_soon(step)
        await gate.running()
        nursery.start_soon(running.close, "gone")
        await trio.testing.wait_all_tasks_blocked()
        gate.go.set()
    assert engine.sessions() == 0
    with pytest.raises(StepError, match="not open"):
        await running.step(Step("gone", 2, (1,)))


def test_what_a_prompts_token_takes_is_known_before_the_first_prompt(engine, monkeypatch):
    times = iter([0.0, 9.0, 10.0, 10.512])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    assert module.warm_up_prompt(engine) == pytest.approx(0.512 / (PIECE_TOKENS * 2))
    assert (engine.sessions(), engine.kv_bytes_used()) == (0, 0)


def test_where_there_is_no_room_for_a_piece_nothing_is_measured(engine):
    while engine.kv_tokens_free() >= PIECE_TOKENS:
        engine.open(f"hog{engine.kv_tokens_free()}", 0, 2, PIECE_TOKENS)
    hogs = engine.sessions()
    assert module.warm_up_prompt(engine) == 0.0
    assert engine.sessions() == hogs
