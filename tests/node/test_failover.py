"""Streams that outlive the nodes of their chains: real stages over an in-memory network, lost at any step."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing
from rings import CUTS, ring_of, tokens_of, wish

from node.errors import GatewayError, StageLost
from node.serve.config import ServeConfig
from node.serve.failover import Patience
from p2p import RpcRefusal

WARM = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11}
PENAL = {
    "temperature": 0.7,
    "seed": 2,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
}
HOWS = {"greedy": {}, "warm": WARM, "penalties": PENAL}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def broken(ring, request, losses):
    """The tokens of a request whose chain loses its stages of these numbers at these tokens: {index: (stage, ...)}."""
    found = []
    async with ring.gateway.generate(request) as events:
        async for event in events:
            found.append(event)
            for number in losses.get(event.index, ()):
                (live,) = ring.gateway.live.values()
                ring.network.kill(live.chain[number].peer)
    return found


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_stage_that_dies_is_not_noticed(model, alone, prompt, victim, how):
    request = wish(prompt, max_tokens=24, **HOWS[how])
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        with trio.fail_after(20):
            events = await broken(ring, request, {5: (victim,)})
        assert [event.token for event in events] == alone(request)
        assert [event.index for event in events] == list(range(24))
        assert ring.count("shoal_failovers_total") == 1


STEPS = 64


async def swept(model, alone, prompt, how, victims, steps):
    """Each step in turn, one mesh for several: the dead come back under new names."""
    request = wish(prompt, max_tokens=STEPS, **HOWS[how])
    expected = alone(request)
    for step in steps:
        async with ring_of(model, CUTS["four"], copies=2) as ring:
            with trio.fail_after(30):
                events = await broken(ring, request, {step: victims})
            assert [event.token for event in events] == expected, (step, victims)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["greedy", "warm"])
@pytest.mark.parametrize("victims", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("part", range(4))
async def test_whoever_dies_at_any_step_the_text_is_the_same(model, alone, prompt, how, victims, part):
    await swept(model, alone, prompt, how, victims, range(part * 16, (part + 1) * 16))


@pytest.mark.parametrize("victims", [(0, 3), (1, 2), (0, 1, 2, 3)])
async def test_several_that_die_at_once_are_not_noticed(model, alone, prompt, victims):
    await swept(model, alone, prompt, "penalties", victims, [7])


@pytest.mark.parametrize("victim", [0, 1, 3])
async def test_a_stage_that_hangs_is_replaced_and_not_heard_when_it_wakes(model, alone, prompt, victim):
    request = wish(prompt, max_tokens=24, **WARM)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        found = []
        with trio.fail_after(20):
            async with ring.gateway.generate(request) as events:
                async for event in events:
                    found.append(event.token)
                    (live,) = ring.gateway.live.values()
                    if event.index == 4:
                        hung = live.chain[victim].peer
                        ring.network.freeze(hung)
                    if event.index == 12:
                        assert hung not in {stage.peer for stage in live.chain}
                        ring.network.heal()
            assert found == alone(request)
            await ring.quiet()


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_link_that_carries_nothing_is_gone_around(model, alone, prompt, at):
    request = wish(prompt, max_tokens=24)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        found = []
        with trio.fail_after(20):
            async with ring.gateway.generate(request) as events:
                async for event in events:
                    found.append(event.token)
                    (live,) = ring.gateway.live.values()
                    if event.index == 4:
                        ring.network.partition([live.chain[at].peer], [live.chain[at + 1].peer])
        assert found == alone(request)


async def test_a_replacement_that_dies_is_replaced(model, alone, prompt):
    request = wish(prompt, max_tokens=24, **WARM)
    async with ring_of(model, CUTS["four"], copies=3) as ring:
        killed = []
        with trio.fail_after(20):
            async with ring.gateway.generate(request) as events:
                found = []
                async for event in events:
                    found.append(event.token)
                    (live,) = ring.gateway.live.values()
                    if event.index == 4:
                        old = {stage.peer for stage in live.chain}
                        ring.network.kill(live.chain[1].peer)
                    if live.chain and event.index == 5 and not killed:
                        (new,) = {stage.peer for stage in live.chain} - old
                        killed.append(new)
                        ring.network.kill(new)
        assert found == alone(request)
        assert ring.count("shoal_failovers_total") == 2


async def test_streams_side_by_side_outlive_a_stage_of_all(model, alone, prompt):
    requests = [wish(prompt[: 4 + i], max_tokens=20, seed=i, temperature=0.7 * (i % 2)) for i in range(5)]
    found = {}
    async with ring_of(model, CUTS["two"], copies=2) as ring:

        async def run(i):
            found[i] = []
            async with ring.gateway.generate(requests[i]) as events:
                async for event in events:
                    found[i].append(event.token)
                    if i == 2 and event.index == 6:
                        live = next(iter(ring.gateway.live.values()))
                        ring.network.kill(live.chain[1].peer)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for i in range(5):
                    nursery.start_soon(run, i)
    assert [found[i] for i in range(5)] == [alone(request) for request in requests]


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_stage_that_dies_while_a_prompt_is_read_costs_no_error(model, alone, prompt, victim):
    request = wish((prompt * 200)[:900], max_tokens=6)
    async with ring_of(model, CUTS["four"], copies=2) as ring:

        async def kill():
            while not ring.gateway.live:
                await trio.lowlevel.checkpoint()
            (live,) = ring.gateway.live.values()
            node = next(n for n in ring.nodes if n.me == live.chain[victim].peer)
            while node.computes["m" * 64].tokens < 300:
                await trio.lowlevel.checkpoint()
            ring.network.kill(node.me)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill)
                events = await tokens_of(ring, request)
        assert [event.token for event in events] == alone(request)


@pytest.mark.parametrize("victim", [0, 1, 3])
async def test_a_prompt_that_was_cached_is_read_again_where_nobody_kept_it(model, alone, prompt, victim):
    long = (prompt * 200)[:500]
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        await tokens_of(ring, wish(long, max_tokens=4))
        request = wish((*long[:450], 5, 6, 7), max_tokens=16)
        with trio.fail_after(30):
            events = await broken(ring, request, {4: (victim,)})
        assert ring.count("shoal_prefix_cache_hits_total") == 384
        assert [event.token for event in events] == alone(request)


async def test_where_nobody_can_take_its_place_there_is_one_error_and_all_room_is_free(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(StageLost) as lost:
            await broken(ring, wish(prompt, max_tokens=200), {3: (1,)})
        assert lost.value.peer == ring.nodes[1].me
        with trio.fail_after(5):
            while ring.nodes[0].computes["m" * 64].engine.sessions():
                await trio.lowlevel.checkpoint()


async def lose_after(ring, request, index, victims):
    return [event.token for event in await broken(ring, request, {index: victims})]


@pytest.mark.parametrize("victims", [(0,), (1,), (3,), (0, 3)])
async def test_an_answer_keeps_its_form_over_a_loss(model, alone, prompt, victims):
    asked = {"temperature": 2.0, "ignore_eos": True, "max_tokens": 12, "seed": 5}
    asked |= {"form": "regex", "form_text": "(yes|no), [0-9]{20,40}"}
    request = wish(prompt, **asked)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        with trio.fail_after(20):
            assert await lose_after(ring, request, 6, victims) == alone(request)


@pytest.mark.parametrize("victims", [(0,), (1,), (3,), (0, 3)])
async def test_what_is_told_of_a_token_is_the_same_after_a_loss(model, prompt, victims):
    request = wish(prompt, max_tokens=16, top_logprobs=3)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        with trio.fail_after(30):
            whole = await tokens_of(ring, request)
            assert await broken(ring, request, {4: victims}) == whole


@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("step", [3, 4, 9])
async def test_guesses_under_way_are_lost_and_guessed_anew(model, alone, victim, step):
    serve = ServeConfig(window=8, patience=Patience(mend_s=0.3))
    request = wish((7, 8, 9, 10) * 12, max_tokens=32, repetition_penalty=1.0)
    async with ring_of(model, CUTS["four"], copies=2, serve=serve) as ring:
        with trio.fail_after(20):
            assert await lose_after(ring, request, step, (victim,)) == alone(request)
            assert ring.count("shoal_spec_decode_num_draft_tokens_total") > 0


async def test_a_node_may_take_a_second_part_of_the_same_chain(model, alone, prompt):
    request = wish(prompt, max_tokens=16)
    async with ring_of(model, [(0, 8), (4, 8)]) as ring:
        whole, later = ring.nodes
        ring.rates = {whole.me: {"s_per_layer": 0.05}, later.me: {"s_per_layer": 1e-5}}
        found = []
        with trio.fail_after(20):
            async with ring.gateway.generate(request) as events:
                async for event in events:
                    found.append(event.token)
                    (live,) = ring.gateway.live.values()
                    if event.index == 4:
                        assert [stage.peer for stage in live.chain] == [whole.me, later.me]
                        ring.network.kill(later.me)
        assert found == alone(request)
        assert [(stage.peer, stage.start) for stage in live.chain] == [(whole.me, 0), (whole.me, 4)]
        await ring.quiet()


async def test_a_stage_that_fails_by_itself_leaves_those_below_what_they_have(model, alone, prompt):
    """Its engine refuses a step: the node is there, but its part of the session is gone."""
    request = wish(prompt, max_tokens=16)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        found = []
        with trio.fail_after(20):
            async with ring.gateway.generate(request) as events:
                async for event in events:
                    found.append(event.token)
                    (live,) = ring.gateway.live.values()
                    if event.index == 4:
                        nodes = {node.me: node for node in ring.nodes}
                        chain = [nodes[stage.peer] for stage in live.chain]
                        before = [node.computes["m" * 64].tokens for node in chain]
                        engine = chain[1].computes["m" * 64].engine
                        engine.close(*engine._sessions)
        assert found == alone(request)
        after = [node.computes["m" * 64].tokens for node in chain]
        assert [after[at] - before[at] for at in (0, 2, 3)] == pytest.approx([11, 11, 11], abs=1)


@pytest.mark.parametrize("bound", [(0, 1 << 20), (0, 0), (2000, 1000)])
async def test_what_was_handed_on_may_lie_on_the_disk_or_be_forgotten(model, alone, prompt, bound):
    request = wish((prompt * 40)[:200], max_tokens=16)
    async with ring_of(model, CUTS["four"], copies=2) as ring:
        for node in ring.nodes:
            node.stages._shelf.memory_bytes_max, node.stages._shelf.disk_bytes_max = bound
        with trio.fail_after(20):
            assert await lose_after(ring, request, 5, (2,)) == alone(request)
            await ring.quiet()
        assert all(node.stages.kept_bytes == (0, 0) for node in ring.living)


def faulty(begun, cancels):
    """A stage's work of which a part raises when it is cancelled; `cancels`: at once, by the session's own end."""

    async def fault_at_the_end():
        try:
            await trio.sleep_forever()
        finally:
            raise RpcRefusal("invalid", "tokens that make no sense")

    async def run(lodger, stay, asked, queues_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fault_at_the_end)
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            begun.set()
            if cancels:
                stay.whole.cancel()

    return run


async def test_a_fault_that_comes_with_a_sessions_end_ends_that_session_alone(
    model, alone, prompt, monkeypatch
):
    request = wish(prompt, max_tokens=6)
    async with ring_of(model, CUTS["two"]) as ring:
        stages = ring.nodes[1].stages
        with monkeypatch.context() as patched:
            patched.setattr(stages, "_run", faulty(trio.Event(), cancels=True))
            with pytest.raises(GatewayError):
                await tokens_of(ring, request)
        assert stages.sessions == 0
        assert [event.token for event in await tokens_of(ring, request)] == alone(request)


async def test_a_fault_that_comes_with_a_nodes_end_is_not_its_error(model, prompt, monkeypatch):
    begun = trio.Event()
    async with trio.open_nursery() as nursery, ring_of(model, CUTS["two"]) as ring:
        monkeypatch.setattr(ring.nodes[1].stages, "_run", faulty(begun, cancels=False))
        nursery.start_soon(tokens_of, ring, wish(prompt, max_tokens=6))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert begun.is_set()
