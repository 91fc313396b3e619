"""Serving sessions over an in-memory network: the embedded model cut into stages, without sockets or processes."""

from __future__ import annotations

import re
import threading

import pytest
import torch
import trio
from rings import CUTS, MANIFEST, Ring, ring_of, tokens_of, wish

from model_shards import tensor_to_bytes
from node.errors import (
    ContextTooLong,
    DeadlinePassed,
    GatewayError,
    ModelNotReady,
    Overloaded,
    StageLost,
    UnknownModel,
)
from node.serve.prefixes import marks_of
from node.serve.protocol import (
    PIECE_TOKENS,
    RETURN,
    SESSION,
    Prompt,
    ReturnOpen,
    SamplingSpec,
    SessionInput,
    SessionOpen,
    StageRef,
    TokenOut,
)
from node.serve.selection import Selector
from p2p import CallFailed, Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11}])
async def test_a_ring_gives_the_tokens_of_one_engine(model, alone, prompt, cut, how):
    request = wish(prompt, **how)
    async with ring_of(model, CUTS[cut]) as ring:
        events = await tokens_of(ring, request)
        assert [event.token for event in events] == alone(request)
        assert [event.index for event in events] == list(range(12))
        assert [event.finish for event in events] == [None] * 11 + ["length"]
        await ring.quiet()


@pytest.mark.parametrize("cut", ["one", "two"])
@pytest.mark.parametrize("at", [0, -1])
async def test_a_stage_can_be_its_own_gateway(model, alone, prompt, cut, at):
    request = wish(prompt)
    async with ring_of(model, CUTS[cut]) as ring:
        own = Ring(ring.network, ring.nodes, ring.nodes[at], ring.spans)
        with trio.fail_after(20):
            assert [event.token for event in await tokens_of(own, request)] == alone(request)
            await own.quiet()


async def test_a_prompt_of_several_chunks_gives_the_tokens_of_one_engine(model, alone, prompt):
    request = wish((prompt * 200)[:900], max_tokens=5)
    async with ring_of(model, CUTS["two"]) as ring:
        assert [event.token for event in await tokens_of(ring, request)] == alone(request)


async def test_requests_side_by_side_do_not_disturb_one_another(model, alone, prompt):
    requests = [wish(prompt[: 2 + i], seed=i, temperature=0.7 * (i % 2)) for i in range(5)]
    found = {}
    async with ring_of(model, CUTS["four"]) as ring:

        async def run(i):
            found[i] = [event.token for event in await tokens_of(ring, requests[i])]

        async with trio.open_nursery() as nursery:
            for i in range(5):
                nursery.start_soon(run, i)
        await ring.quiet()
    assert [found[i] for i in range(5)] == [alone(request) for request in requests]


async def test_an_eos_token_ends_the_stream_unless_it_is_ignored(model, alone, prompt, monkeypatch):
    request = wish(prompt, max_tokens=10, ignore_eos=False)
    eos = alone(request)[3]
    async with ring_of(model, CUTS["two"]) as ring:
        for node in ring.nodes:
            monkeypatch.setattr(
                type(node.computes[MANIFEST].engine.span.config), "eos_ids", (eos,), raising=False
            )
        events = await tokens_of(ring, request)
        assert events[-1].token == eos
        assert events[-1].finish == "stop"
        assert len(await tokens_of(ring, wish(prompt, max_tokens=10))) == 10


async def test_leaving_early_frees_every_stage(model, prompt):
    async with ring_of(model, CUTS["four"]) as ring:
        async with ring.gateway.generate(wish(prompt, max_tokens=500)) as events:
            async for event in events:
                if event.index == 2:
                    break
            assert ring.busy() == 4
        await ring.quiet()
        assert not ring.gateway.live


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_stage_that_dies_is_named_and_the_others_are_freed(model, prompt, victim):
    async with ring_of(model, CUTS["four"]) as ring:

        async def run():
            async with ring.gateway.generate(wish(prompt, max_tokens=900)) as events:
                async for event in events:
                    if event.index == 2:
                        ring.network.kill(ring.nodes[victim].host.peer_id)

        with pytest.raises(StageLost) as lost:
            await run()
        assert lost.value.peer == ring.nodes[victim].me
        survivors = [node for i, node in enumerate(ring.nodes) if i != victim]
        with trio.fail_after(5):
            while any(node.computes[MANIFEST].engine.sessions() for node in survivors):
                await trio.lowlevel.checkpoint()


async def test_before_the_first_token_another_chain_is_tried(model, alone, prompt):
    request = wish(prompt)
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        for victim in (0, 2):
            ring.network.kill(ring.nodes[victim].host.peer_id)
        for _ in range(4):
            assert [event.token for event in await tokens_of(ring, request)] == alone(request)


async def test_the_only_host_of_some_layers_that_fails_once_is_asked_again(model, alone, prompt):
    class NotAtFirst(dict):
        asked = 0

        def get(self, key):
            self.asked += 1
            return None if self.asked == 1 else super().get(key)

    async with ring_of(model, CUTS["two"]) as ring:
        last = ring.nodes[-1]
        last.computes = NotAtFirst(last.computes)
        assert [event.token for event in await tokens_of(ring, wish(prompt))] == alone(wish(prompt))
        assert last.computes.asked == 2


async def test_without_room_the_gateway_says_when_to_come_back(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        async with ring.gateway.generate(wish(prompt, max_tokens=1000)) as events:
            await anext(events)
            for node in ring.nodes:
                node.computes[MANIFEST].engine.open("hog", *ring.spans[ring.nodes.index(node)], 1024)
            free = min(node.computes[MANIFEST].engine.kv_tokens_free() for node in ring.nodes)
            for node in ring.nodes:
                span = ring.spans[ring.nodes.index(node)]
                while node.computes[MANIFEST].engine.kv_tokens_free() >= 1024:
                    node.computes[MANIFEST].engine.open(f"hog{free}", *span, 1024)
                    free += 1
            with pytest.raises(Overloaded) as full:
                await tokens_of(ring, wish(prompt, max_tokens=1000, first_token_s=0.5))
            assert full.value.retry_after_s > 0


async def test_what_cannot_be_served_is_said(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(UnknownModel):
            await tokens_of(ring, wish(prompt, model="other"))
        with pytest.raises(ContextTooLong):
            await tokens_of(ring, wish(prompt, max_tokens=1024))
        ring.suspects.add(ring.nodes[1].me)
        with pytest.raises(ModelNotReady):
            await tokens_of(ring, wish(prompt))


@pytest.mark.parametrize("temperature", [0.0, 2.0])
async def test_answers_keep_to_a_form_and_end_with_it(model, prompt, temperature):
    async with ring_of(model, CUTS["two"]) as ring:
        asked = {"temperature": temperature, "ignore_eos": False, "max_tokens": 60}
        asked |= {"form": "regex", "form_text": "(yes|no), [0-9]{2,4}"}
        events = await tokens_of(ring, wish(prompt, **asked))
        assert events[-1].finish == "stop"
        text = model[2].decode([event.token for event in events[:-1]])
        assert re.fullmatch("(yes|no), [0-9]{2,4}", text.strip())
        with pytest.raises(GatewayError, match="regex"):
            await tokens_of(ring, wish(prompt, form="regex", form_text="a("))
        await ring.quiet()


def opening(ring, **changes):
    fields = {
        "session": "s",
        "manifest_id": MANIFEST,
        "stages": tuple(StageRef(n.me, *s) for n, s in zip(ring.nodes, ring.spans, strict=True)),
        "index": 0,
        "gateway": ring.entry.me,
        "prompt_tokens": 4,
        "new_tokens_max": 4,
        "ignore_eos": True,
        "sampling": SamplingSpec(0.0, 1.0, 0, 0),
    }
    return SessionOpen(**(fields | changes))


async def to_the_end(channel):
    """Whatever notes come, until the call fails."""
    while True:
        await channel.receive()


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 9},
        {"index": -1},
        {"index": 1},
        {"stages": ()},
        {"prompt_tokens": 0},
        {"new_tokens_max": -1},
        {"prompt_tokens": 1 << 40},
        {"manifest_id": "other"},
        {"new_tokens_max": 2000},
        {"session": ""},
        {"session": "x" * 5000},
        {"gateway": "x" * 5000},
        {"sampling": SamplingSpec(-1.0, 7.0, -3, 0)},
        {"sampling": SamplingSpec(0.0, 1.0, 0, 0, "yaml", "a: b")},
        {"sampling": SamplingSpec(0.0, 1.0, 0, 0, "regex", "a(")},
        {"pool": "mean"},
        {
            "pool": "mean",
            "new_tokens_max": 1,
            "prompt_tokens": 300,
            "marks": (b"m" * 8, b"m" * 8),
            "reuse": 128,
        },
    ],
)
async def test_a_session_no_honest_gateway_opens_is_refused_and_leaves_nothing(model, ring_refusals, changes):
    async with ring_of(model, CUTS["two"]) as ring:
        request = opening(ring, **changes)
        with pytest.raises(CallFailed) as refused, trio.fail_after(5):
            async with ring.entry.rpc.open(ring.nodes[0].me, SESSION, request) as channel:
                await to_the_end(channel)
        assert refused.value.code in ring_refusals
        await ring.quiet()


async def test_a_session_that_nobody_feeds_gives_its_room_back(model, monkeypatch):
    monkeypatch.setattr("node.serve.feed.PROMPT_WAIT_S", 0.05)
    async with ring_of(model, CUTS["two"]) as ring:
        request = opening(ring)
        with ring.entry.returns.expect("s", "gateway", ring.nodes[-1].me), trio.fail_after(5):
            async with ring.entry.rpc.open(ring.nodes[0].me, SESSION, request) as channel:
                with pytest.raises(CallFailed, match="nothing came"):
                    await to_the_end(channel)
        await ring.quiet()


async def test_tokens_come_from_the_last_stage_or_not_at_all(model):
    async with ring_of(model, CUTS["two"]) as ring:
        first, last = (node.me for node in ring.nodes)
        with ring.entry.returns.expect("s", "gateway", last) as tokens, trio.fail_after(5):
            with pytest.raises(CallFailed) as refused:
                async with ring.nodes[0].rpc.open(
                    ring.entry.me, RETURN, ReturnOpen("s", "gateway")
                ) as channel:
                    await channel.receive()
            assert refused.value.code == "not_found"
            async with ring.nodes[1].rpc.open(ring.entry.me, RETURN, ReturnOpen("s", "gateway")) as channel:
                await channel.send(TokenOut(0, 7))
                assert (await tokens.receive()).token == 7
        assert first != last


@pytest.fixture
def ring_refusals():
    return {"invalid", "not_found", "busy"}


def test_a_gateway_error_is_one_tree():
    assert issubclass(StageLost, GatewayError)
    assert issubclass(Overloaded, GatewayError)


LONG = tuple(range(7, 7 + 300))


def fill(ring, leave):
    """Sessions on every stage that leave room for so many tokens."""
    made = []
    for number, node in enumerate(ring.nodes):
        engine = node.computes[MANIFEST].engine
        while (free := engine.kv_tokens_free()) > leave:
            engine.open(f"hog{free}", *ring.spans[number], min(1024, free - leave))
            made.append((number, f"hog{free}"))
    return made


def computed(ring):
    """Tokens that each stage's engine ran so far."""
    return [node.computes[MANIFEST].tokens for node in ring.nodes]


@pytest.mark.parametrize("cut", ["one", "four"])
async def test_a_prompt_that_begins_like_an_earlier_one_is_recomputed_in_part_only(model, alone, cut):
    first, second = wish(LONG, max_tokens=3), wish((*LONG[:280], 5, 6, 7), max_tokens=6)
    async with ring_of(model, CUTS[cut]) as ring:
        await tokens_of(ring, first)
        before = computed(ring)
        assert [event.token for event in await tokens_of(ring, second)] == alone(second)
        again = [b - a for a, b in zip(before, computed(ring), strict=True)]
        assert again == [283 - 2 * PIECE_TOKENS + 5] * len(ring.nodes)
        assert ring.count("shoal_prefix_cache_hits_total") == 2 * PIECE_TOKENS
        assert ring.count("shoal_prefix_cache_queries_total") == 300 + 283


async def test_of_two_replicas_the_one_that_holds_the_prompt_gets_it(model, alone):
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        await tokens_of(ring, wish(LONG, max_tokens=2))
        before = computed(ring)
        for _ in range(4):
            await tokens_of(ring, wish(LONG, max_tokens=2))
        grown = [b - a for a, b in zip(before, computed(ring), strict=True)]
        assert sorted(count > 0 for count in grown) == [False, False, True, True]
        assert max(grown) == 4 * (300 - 2 * PIECE_TOKENS + 1)


async def test_another_gateway_learns_from_adverts_who_holds_a_prompt(model, alone):
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        await tokens_of(ring, wish(LONG, max_tokens=2))
        own = Ring(ring.network, ring.nodes, ring.nodes[0], ring.spans)
        assert [event.token for event in await tokens_of(own, wish(LONG))] == alone(wish(LONG))
        assert own.count("shoal_prefix_cache_hits_total") == 2 * PIECE_TOKENS


async def test_a_cache_that_lost_what_it_told_of_costs_one_more_try_and_no_answer(model, alone):
    async with ring_of(model, CUTS["two"]) as ring:
        await tokens_of(ring, wish(LONG, max_tokens=2))
        await ring.quiet()
        hogs = fill(ring, leave=0)
        for number, name in hogs:
            ring.nodes[number].computes[MANIFEST].engine.close(name)
        assert [event.token for event in await tokens_of(ring, wish(LONG))] == alone(wish(LONG))
        assert ring.count("shoal_prefix_cache_hits_total") == 0
        assert ring.gateway.standings()[ring.nodes[1].me].state == "good", "no failure of the node"


async def test_a_gateway_cannot_put_other_tokens_under_a_mark(model):
    async with ring_of(model, CUTS["two"]) as ring:
        prompt = LONG[:130]
        request = opening(ring, prompt_tokens=130, marks=marks_of(tuple(reversed(prompt))))
        with ring.entry.returns.expect("s", "gateway", ring.nodes[-1].me), trio.fail_after(5):
            async with ring.entry.rpc.open(ring.nodes[0].me, SESSION, request) as channel:
                ids = torch.tensor(prompt[:PIECE_TOKENS], dtype=torch.int32)
                await channel.send(SessionInput(prompt=Prompt(0, Tensor(*tensor_to_bytes(ids)))))
                with pytest.raises(CallFailed, match="not that of its tokens"):
                    await to_the_end(channel)
        await ring.quiet()
        assert computed(ring) == [0, 0]


async def test_only_the_stage_before_opens_a_later_stage(model):
    async with ring_of(model, CUTS["two"]) as ring:
        request = opening(ring, index=1)
        with pytest.raises(CallFailed) as refused, trio.fail_after(5):
            async with ring.entry.rpc.open(ring.nodes[1].me, SESSION, request) as channel:
                await channel.receive()
        assert refused.value.code == "denied"


async def test_the_gateway_sees_what_every_stage_takes(model, prompt, monkeypatch):
    seen = {}

    def note(self, choice, stage, tokens, seconds, now_s):
        seen.setdefault(choice.stages[stage].peer, []).append((tokens, seconds))

    monkeypatch.setattr(Selector, "observe", note)
    async with ring_of(model, CUTS["four"]) as ring:
        slow, run = ring.nodes[2], ring.nodes[2].computes[MANIFEST].engine.run

        def slowly(steps, check_cancelled):
            threading.Event().wait(0.03)
            return run(steps, check_cancelled=check_cancelled)

        slow.computes[MANIFEST].engine.run = slowly
        await tokens_of(ring, wish(prompt, max_tokens=40))
        counts = [[tokens for tokens, _ in seen[node.me]] for node in ring.nodes]
        assert counts == [[len(prompt), 1, 1]] * 4, "the prompt, and the first token of each 32"
        assert min(seconds for _, seconds in seen[slow.me]) >= 0.03


async def test_a_lost_stage_counts_against_its_node(model, prompt):
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        ring.network.kill(ring.nodes[0].host.peer_id)
        for _ in range(6):
            await tokens_of(ring, wish(prompt))
        standings = ring.gateway.standings()
        assert standings[ring.nodes[0].me].state == "out"
        assert standings[ring.nodes[1].me].state == "good"


async def test_background_work_gives_its_room_to_another_gateways_request_and_goes_on(model, alone, prompt):
    late = wish(prompt, max_tokens=150, priority="background")
    async with ring_of(model, CUTS["two"]) as ring:
        hogs = fill(ring, leave=240)
        other = Ring(ring.network, ring.nodes, ring.nodes[0], ring.spans)
        found = []
        async with trio.open_nursery() as nursery, ring.gateway.generate(late) as events:
            found.append(await anext(events))
            nursery.start_soon(tokens_of, other, wish(prompt, max_tokens=200))
            async for event in events:
                found.append(event)
        assert ring.count("shoal_num_preemptions_total") >= 1
        assert [event.index for event in found] == list(range(150))
        assert found[-1].finish == "length"
        assert found[0].token == alone(late)[0]
        with trio.fail_after(5):
            while ring.busy() > len(hogs):
                await trio.lowlevel.checkpoint()


async def test_interactive_work_takes_no_room_from_its_like(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        fill(ring, leave=240)
        other = Ring(ring.network, ring.nodes, ring.nodes[0], ring.spans)
        async with ring.gateway.generate(wish(prompt, max_tokens=150)) as events:
            await anext(events)
            with pytest.raises(Overloaded):
                await tokens_of(other, wish(prompt, max_tokens=200, first_token_s=0.2))
            async for event in events:
                last = event
        assert last.finish == "length"


async def test_a_deadline_ends_a_request_wherever_it_is(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        hold, run = threading.Event(), ring.nodes[1].computes[MANIFEST].engine.run

        def held(steps, check_cancelled):
            hold.wait(0.4)
            return run(steps, check_cancelled=check_cancelled)

        ring.nodes[1].computes[MANIFEST].engine.run = held
        with pytest.raises(DeadlinePassed), trio.fail_after(10):
            await tokens_of(ring, wish(prompt, max_tokens=3, deadline_s=0.15))
        await ring.quiet()


@pytest.mark.parametrize("limit", [{"deadline_s": 0.001}, {"first_token_s": 0.0001}])
async def test_what_cannot_be_kept_is_refused_before_anything_is_done(model, prompt, limit):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(Overloaded) as refused:
            await tokens_of(ring, wish(prompt, max_tokens=500, **limit))
        assert refused.value.retry_after_s >= 1.0
        assert "longer than it may" in str(refused.value)
        assert computed(ring) == [0, 0]
