"""Requests that the gateway splits over two chains: when it does, what is shown of it, and what becomes of failures."""

from __future__ import annotations

import pytest
import torch
import trio
from rings import MANIFEST, Ring, ring_of, tokens_of, wish

from node.errors import StageLost
from node.metrics import Metrics
from node.serve.config import ServeConfig
from node.serve.gateway import MeshGateway
from node.serve.protocol import PIECE_TOKENS
from node.serve.session import Session

LONG = tuple(range(7, 7 + 300))
CRUNCHER = {"prefill_s_per_token_per_layer": 1e-6, "s_per_layer": 0.05}
READER = {"prefill_s_per_token_per_layer": 1e-3, "s_per_layer": 0.001}
WHOLE = [(0, 8), (0, 8)]
HALVES = [(0, 4), (4, 8), (0, 4), (4, 8)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def told(ring):
    """The first half of the nodes computes fast, the second reads memory fast; so they say."""
    for number, node in enumerate(ring.nodes):
        ring.rates[node.me] = CRUNCHER if number < len(ring.nodes) // 2 else READER
    return ring


def splits(ring):
    return ring.count("shoal_split_sessions_total")


async def text(ring, request):
    with trio.fail_after(20):
        return [event.token for event in await tokens_of(ring, request)]


def at_the_first_part(ring, giver, act):
    """`act()` once the first part of a cache that a node hands over is on its way."""
    engine = ring.nodes[giver].computes[MANIFEST].engine
    export = engine.export_session

    def parts(*args, **more):
        found = export(*args, **more)
        yield next(found)
        trio.from_thread.run_sync(act)
        yield from found

    engine.export_session = parts


def nothing_held(ring, dead=()):
    alive = [node for number, node in enumerate(ring.nodes) if number not in dead]
    return not any(
        node.computes[MANIFEST].engine.kv_bytes_used() or len(node.stages.handovers) for node in alive
    )


@pytest.mark.parametrize("spans", [WHOLE, HALVES])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11}])
async def test_a_request_that_is_split_gives_the_tokens_of_one_chain(model, alone, spans, how):
    request = wish(LONG, **how)
    async with ring_of(model, spans) as ring:
        assert await text(ring, request) == alone(request)
        assert splits(ring) == 0, "nodes that are alike are no reason to split"
        await ring.quiet()
        before = [node.computes[MANIFEST].tokens for node in ring.nodes]
        other = Ring(ring.network, ring.nodes, ring.nodes[-1], ring.spans)
        assert await text(told(other), request) == alone(request)
        assert splits(other) == 1
        done = [node.computes[MANIFEST].tokens - b for node, b in zip(ring.nodes, before, strict=True)]
        half = len(spans) // 2
        assert done[half:] == [request.max_tokens - 1] * half
        assert all(300 - 2 * PIECE_TOKENS <= read <= 300 for read in done[:half])
        with trio.fail_after(5):
            while not nothing_held(ring):
                await trio.lowlevel.checkpoint()


async def test_what_is_split_is_shown_as_such(model):
    async with ring_of(model, WHOLE) as ring:
        async with told(ring).gateway.generate(wish(LONG, max_tokens=500)) as events:
            await anext(events)
            (live,) = ring.gateway.live.values()
            assert [stage.peer for stage in live.prefill] == [ring.nodes[0].me]
            assert [stage.peer for stage in live.chain] == [ring.nodes[1].me]
        await ring.quiet()


@pytest.mark.parametrize("why", ["never", "background", "one token", "a short prompt"])
async def test_where_it_cannot_pay_or_is_not_wanted_nothing_is_split(model, alone, why):
    prompt = LONG[:4] if why == "a short prompt" else LONG
    more = {"background": {"priority": "background"}, "one token": {"max_tokens": 1}}.get(why, {})
    request = wish(prompt, **more)
    async with ring_of(model, WHOLE) as ring:
        told(ring)
        if why == "never":
            entry, metrics = ring.entry, Metrics()
            ring.gateway = MeshGateway(
                entry.rpc, entry.me, entry.returns, None, ring.atlas, lambda model: "", dict, metrics,
                ServeConfig(split_gain=1.0),
            )  # fmt: skip
            ring.metrics = metrics
        assert await text(ring, request) == alone(request)
        assert splits(ring) == 0
        assert {standing.state for standing in ring.gateway.standings().values()} <= {"good"}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 3}])
async def test_when_a_node_dies_during_the_handover_another_chain_gives_the_same_text(
    model, alone, victim, how
):
    request = wish(LONG, **how)
    async with ring_of(model, WHOLE) as ring:
        at_the_first_part(told(ring), 0, lambda: ring.network.kill(ring.nodes[victim].host.peer_id))
        assert await text(ring, request) == alone(request)
        assert splits(ring) == 0
        assert ring.gateway.standings()[ring.nodes[victim].me].state == "out"
        with trio.fail_after(5):
            while not nothing_held(ring, {victim}):
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_when_a_node_of_longer_chains_dies_the_text_is_the_same(model, alone, victim):
    request = wish(LONG)
    async with ring_of(model, HALVES) as ring:
        giver = victim % 2
        at_the_first_part(told(ring), giver, lambda: ring.network.kill(ring.nodes[victim].host.peer_id))
        assert await text(ring, request) == alone(request)
        with trio.fail_after(5):
            while not nothing_held(ring, {victim}):
                await trio.lowlevel.checkpoint()


async def test_when_all_that_could_go_on_have_died_there_is_one_clear_error(model):
    async with ring_of(model, WHOLE) as ring:

        def kill():
            for node in ring.nodes:
                ring.network.kill(node.host.peer_id)

        at_the_first_part(told(ring), 0, kill)
        with pytest.raises(StageLost, match="was lost"):
            await text(ring, wish(LONG))
        assert not ring.gateway.live


async def test_after_a_handover_that_failed_requests_stay_whole_for_a_while(model, alone):
    async with ring_of(model, [(0, 8)] * 3) as ring:
        for node, rates in zip(ring.nodes, (CRUNCHER, CRUNCHER, READER), strict=True):
            ring.rates[node.me] = rates
            engine = node.computes[MANIFEST].engine
            engine.export_session = lambda *args, **more: iter([memoryview(b"nothing of the kind")])
        for _ in range(3):
            assert await text(ring, wish(LONG)) == alone(wish(LONG))
        assert splits(ring) == 0
        states = [standing.state for standing in ring.gateway.standings().values()]
        assert states.count("out") == 1, "the other one was not asked"
        sessions = ring.gateway._selector.ledger._sessions
        assert all(session.closed_s is not None for session in sessions.values())


async def test_nothing_is_shown_before_the_chain_that_answers_made_a_token(model, alone, monkeypatch):
    begun, begin = trio.Event(), Session.begin

    async def told_first_token(self, token, prompt):
        begun.set()
        await begin(self, token, prompt)

    monkeypatch.setattr(Session, "begin", told_first_token)
    request = wish(LONG)
    async with ring_of(model, WHOLE) as ring:
        engine = told(ring).nodes[0].computes[MANIFEST].engine
        export = engine.export_session

        def parts(*args, first, **more):
            for part in export(*args, first=first, **more):
                if first == 2 * PIECE_TOKENS:
                    trio.from_thread.run(begun.wait)
                    trio.from_thread.run_sync(ring.network.kill, ring.nodes[1].host.peer_id)
                yield part

        engine.export_session = parts
        assert await text(ring, request) == alone(request)


async def test_a_node_that_dies_after_tokens_were_shown_is_not_noticed(model, alone):
    request = wish(LONG, max_tokens=20)
    async with ring_of(model, WHOLE) as ring:
        seen = []
        async with told(ring).gateway.generate(request) as events:
            async for event in events:
                seen.append(event.token)
                if event.index == 3:
                    ring.network.kill(ring.nodes[1].host.peer_id)
        assert seen == alone(request)


async def test_the_chain_that_read_the_beginning_before_reads_the_rest(model, alone):
    first, second = wish(LONG, max_tokens=3), wish((*LONG[:280], 5, 6, 7))
    async with ring_of(model, WHOLE) as ring:
        await text(told(ring), first)
        assert await text(ring, second) == alone(second)
        assert splits(ring) == 2
        assert ring.count("shoal_prefix_cache_hits_total") == 2 * PIECE_TOKENS


async def test_a_deadline_that_only_two_chains_keep_is_kept(model):
    async with ring_of(model, WHOLE) as ring:
        assert len(await text(told(ring), wish(LONG, deadline_s=2.3))) == 12, "by one chain at least 2.4 s"
        assert splits(ring) == 1


async def test_room_that_the_reading_chain_gave_back_is_room_again(model):
    async with ring_of(model, WHOLE) as ring:
        selector = told(ring).gateway._selector
        async with ring.gateway.generate(wish(LONG, max_tokens=400)) as events:
            await anext(events)
            sessions = selector.ledger._sessions
            assert sorted(session.closed_s is None for session in sessions.values()) == [False, True]
