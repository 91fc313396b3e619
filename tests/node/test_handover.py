"""A prompt read on one chain and answered on another: the same tokens, and nothing left whatever breaks on the way."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import trio
import trio.testing
from rings import MANIFEST, ring_of, wish

from node.errors import Overloaded, StageLost
from node.serve.handover import Giver, Handovers
from node.serve.prefixes import marks_of
from node.serve.protocol import (
    BACKGROUND,
    HANDOVER,
    PIECE_TOKENS,
    SESSION,
    HandoverOpen,
    SamplingSpec,
    SessionOpen,
    StageRef,
)
from node.serve.session import CacheStale
from node.serve.split import open_split, openings
from p2p import CallFailed, RpcRefusal

LONG = tuple(range(7, 7 + 300))
# Spans of nodes, then the chains over them: (node, start, end) of those that read and of those that answer.
CHAINS = {
    "alike": ([(0, 4), (4, 8)] * 2, [(0, 0, 4), (1, 4, 8)], [(2, 0, 4), (3, 4, 8)]),
    "uneven": (
        [(0, 3), (3, 8), (0, 1), (1, 5), (5, 8)],
        [(0, 0, 3), (1, 3, 8)],
        [(2, 0, 1), (3, 1, 5), (4, 5, 8)],
    ),
    "one to many": ([(0, 8), (0, 2), (2, 5), (5, 8)], [(0, 0, 8)], [(1, 0, 2), (2, 2, 5), (3, 5, 8)]),
    "many to one": ([(0, 2), (2, 5), (5, 8), (0, 8)], [(0, 0, 2), (1, 2, 5), (2, 5, 8)], [(3, 0, 8)]),
    "one stage in both": ([(0, 4), (4, 8), (0, 4)], [(0, 0, 4), (1, 4, 8)], [(2, 0, 4), (1, 4, 8)]),
    "one stage in both in part": ([(0, 4), (2, 8), (0, 2)], [(0, 0, 4), (1, 4, 8)], [(2, 0, 2), (1, 2, 8)]),
    "the same nodes cut elsewhere": ([(0, 6), (2, 8)], [(0, 0, 6), (1, 6, 8)], [(0, 0, 2), (1, 2, 8)]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chain(ring, stages):
    return tuple(StageRef(ring.nodes[number].me, start, end) for number, start, end in stages)


def opened(ring, request, chains, *, handover_s=5.0, reuse=0, **more):
    """The two sessions of a request over (chain that reads, chain that answers)."""
    whole = SessionOpen(
        session="s",
        manifest_id=MANIFEST,
        stages=chain(ring, chains[1]),
        index=0,
        gateway=ring.entry.me,
        prompt_tokens=len(request.prompt),
        new_tokens_max=request.max_tokens,
        ignore_eos=request.ignore_eos,
        sampling=SamplingSpec(request.temperature, request.top_p, request.top_k, request.seed),
        marks=marks_of(request.prompt),
        reuse=reuse,
        **more,
    )
    return openings(whole, chain(ring, chains[0]), handover_s)


async def answer(ring, request, chains, *, seen=None, **more):
    """The tokens of a request over two chains. `seen` collects what stages took."""
    first, second = opened(ring, request, chains, **more)
    seen = [] if seen is None else seen
    observers = tuple(lambda *took, part=part: seen.append((part, *took)) for part in ("read", "answer"))
    found = []
    with trio.fail_after(20):
        async with open_split(
            ring.entry.rpc,
            ring.entry.returns,
            first,
            second,
            request.prompt,
            observers,
            lambda: seen.append("moved"),
        ) as tokens:
            async for token in tokens:
                found.append(token)
                if token.finish is not None:
                    break
    return found


async def nothing_left(ring, dead=()):
    """No session, no cache, nobody who gives or waits for anything."""
    alive = [node for number, node in enumerate(ring.nodes) if number not in dead]
    with trio.fail_after(5):
        while (
            any(node.computes[MANIFEST].engine.sessions() for node in alive)
            or any(len(node.stages.handovers) or node.stages.sessions for node in alive)
            or len(ring.entry.returns)
        ):
            await trio.lowlevel.checkpoint()
    assert [node.computes[MANIFEST].engine.kv_bytes_used() for node in alive] == [0] * len(alive)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11}])
async def test_two_chains_give_the_tokens_of_one(model, alone, name, how):
    spans, *chains = CHAINS[name]
    request = wish(LONG, max_tokens=10, **how)
    async with ring_of(model, spans) as ring:
        found = await answer(ring, request, chains)
        assert [token.token for token in found] == alone(request)
        assert [token.index for token in found] == list(range(10))
        assert [token.finish for token in found] == [None] * 9 + ["length"]
        await nothing_left(ring)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("alike", {(0, 2, 0, 4), (1, 3, 4, 8)}),
        ("uneven", {(0, 2, 0, 1), (0, 3, 1, 3), (1, 3, 3, 5), (1, 4, 5, 8)}),
        ("one stage in both", {(0, 2, 0, 4)}),
        ("one stage in both in part", {(0, 2, 0, 2), (0, 1, 2, 4)}),
        ("the same nodes cut elsewhere", {(0, 1, 2, 6)}),
    ],
)
async def test_only_layers_that_change_their_node_travel(model, monkeypatch, name, moved):
    spans, *chains = CHAINS[name]
    asked, serve = set(), Handovers._serve

    async def note(self, call, request, channel):
        asked.add((self._me, call.peer, request.start, request.end))
        await serve(self, call, request, channel)

    monkeypatch.setattr(Handovers, "_serve", note)
    async with ring_of(model, spans) as ring:
        numbers = {node.me: number for number, node in enumerate(ring.nodes)}
        await answer(ring, wish(LONG, max_tokens=3), chains)
        assert {(numbers[giver], numbers[heir], *layers) for giver, heir, *layers in asked} == moved


async def test_the_cache_travels_while_the_prompt_is_still_read(model, alone):
    spans, *chains = CHAINS["one to many"]
    request, go = wish(LONG, max_tokens=4), threading.Event()
    async with ring_of(model, spans) as ring:
        reader, heir = (ring.nodes[number].computes[MANIFEST].engine for number in (0, 1))
        run = reader.run

        def held(steps, check_cancelled):
            if steps[0].position == 2 * PIECE_TOKENS:
                go.wait(10)
            return run(steps, check_cancelled=check_cancelled)

        reader.run = held
        found = []

        async def ask():
            found.extend(await answer(ring, request, chains))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            with trio.fail_after(5):
                while not heir.sessions() or heir.reached("s", 0, 2) < 2 * PIECE_TOKENS:
                    await trio.lowlevel.checkpoint()
            go.set()
        assert [token.token for token in found] == alone(request)


async def test_the_chain_that_reads_is_free_once_it_has_handed_over(model):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        first, second = opened(ring, wish(LONG, max_tokens=500), chains)
        async with open_split(
            ring.entry.rpc, ring.entry.returns, first, second, LONG, (lambda *_: None,) * 2, lambda: None
        ) as tokens:
            for _ in range(5):
                await anext(tokens)
            with trio.fail_after(5):
                while any(node.computes[MANIFEST].engine.sessions() for node in ring.nodes[:2]):
                    await trio.lowlevel.checkpoint()
            assert [node.computes[MANIFEST].engine.sessions() for node in ring.nodes[2:]] == [1, 1]
        await nothing_left(ring)


async def test_what_the_stages_took_is_told_of_each_chain_and_not_what_they_waited(model):
    spans, *chains = CHAINS["alike"]
    seen = []
    async with ring_of(model, spans) as ring:
        await answer(ring, wish(LONG, max_tokens=40), chains, seen=seen)
    reads = [took[1:3] for took in seen if took[0] == "read"]
    assert sorted(reads) == sorted([(stage, tokens) for stage in (0, 1) for tokens in (128, 128, 44)])
    answers = [took[1:3] for took in seen if took[0] == "answer"]
    assert sorted(answers) == [(0, 1), (1, 1)], (
        "the step of token 32; that of the first token waited for the cache"
    )
    assert seen.count("moved") == 1


async def test_a_prompt_whose_beginning_is_cached_is_read_in_part_and_handed_over_whole(model, alone):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        await answer(ring, wish(LONG, max_tokens=2), chains)
        await nothing_left(ring)
        before = ring.nodes[0].computes[MANIFEST].tokens
        request = wish((*LONG[:280], 5, 6, 7), max_tokens=6)
        found = await answer(ring, request, chains, reuse=2 * PIECE_TOKENS)
        assert [token.token for token in found] == alone(request)
        assert ring.nodes[0].computes[MANIFEST].tokens - before == 283 - 2 * PIECE_TOKENS
        await nothing_left(ring)
        with pytest.raises(CacheStale):
            await answer(ring, wish(tuple(reversed(LONG)), max_tokens=6), chains, reuse=2 * PIECE_TOKENS)
        await nothing_left(ring)


async def test_an_answer_that_ends_with_its_first_token_needs_no_handover(model, alone):
    spans, *chains = CHAINS["alike"]
    request = wish(LONG, max_tokens=9, ignore_eos=False)
    token = alone(request)[0]
    async with ring_of(model, spans) as ring:
        for node in ring.nodes:
            span = node.computes[MANIFEST].engine.span
            span.config = replace(span.config, eos_ids=(token,))
        found = await answer(ring, request, chains)
        assert [(one.token, one.finish) for one in found] == [(token, "stop")]
        await nothing_left(ring)


def parts_changed(ring, number, change):
    """`change(parts)` in place of the parts that a node hands over; it runs on a thread."""
    engine = ring.nodes[number].computes[MANIFEST].engine
    export = engine.export_session
    engine.export_session = lambda *args, **more: change(export(*args, **more))


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
async def test_a_node_that_dies_while_the_cache_travels_is_named_and_the_others_are_freed(model, victim):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:

        def die(parts):
            yield next(parts)
            trio.from_thread.run_sync(ring.network.kill, ring.nodes[victim].host.peer_id)
            yield from parts

        parts_changed(ring, victim % 2, die)
        with pytest.raises(StageLost) as lost:
            await answer(ring, wish(LONG), chains)
        assert lost.value.peer == ring.nodes[victim].me
        await nothing_left(ring, dead={victim})


def _cut(part):
    return part[:-1]


def _elsewhere(part):
    return bytes(part).replace(b'"layers":[0,4]', b'"layers":[4,8]').replace(b'"layers":[0,', b'"layers":[9,')


def _infinite(part):
    return bytes(part[:-2]) + b"\x80\x7f"


@pytest.mark.parametrize(
    "change", [_cut, _elsewhere, _infinite, lambda part: b"", lambda part: bytes(9_000_000)]
)
async def test_a_source_that_hands_over_what_is_no_cache_is_named(model, change):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        parts_changed(ring, 0, lambda parts: (memoryview(change(part)) for part in parts))
        with pytest.raises(StageLost) as lost:
            await answer(ring, wish(LONG), chains)
        assert lost.value.peer == ring.nodes[0].me
        await nothing_left(ring)


async def test_a_source_that_hands_over_too_little_is_named(model):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        parts_changed(ring, 1, lambda parts: iter(list(parts)[:-1]))
        with pytest.raises(StageLost, match="positions") as lost:
            await answer(ring, wish(LONG), chains)
        assert lost.value.peer == ring.nodes[1].me
        await nothing_left(ring)


@pytest.mark.parametrize("number", [0, 1])
async def test_a_source_that_stalls_is_named_when_its_time_is_over(model, number):
    spans, *chains = CHAINS["alike"]
    go = threading.Event()

    def stall(parts):
        go.wait(10)
        yield from parts

    async with ring_of(model, spans) as ring:
        parts_changed(ring, number, stall)
        try:
            with pytest.raises(StageLost, match="did not hand its cache over within") as lost:
                await answer(ring, wish(LONG), chains, handover_s=0.2)
        finally:
            go.set()
        assert lost.value.peer == ring.nodes[number].me
        await nothing_left(ring)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_without_room_on_either_chain_nothing_is_kept(model, number):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        engine = ring.nodes[number].computes[MANIFEST].engine
        while engine.kv_tokens_free():
            engine.open(f"hog{engine.kv_tokens_free()}", *spans[number], min(1024, engine.kv_tokens_free()))
        with pytest.raises(Overloaded):
            await answer(ring, wish(LONG), chains)
        hogs = [engine.sessions()]
        with trio.fail_after(5):
            while (
                sum(node.computes[MANIFEST].engine.sessions() for node in ring.nodes) > hogs[0]
                or engine.sessions() > 4
            ):
                await trio.lowlevel.checkpoint()
        assert not len(ring.entry.returns)


async def test_leaving_early_frees_both_chains(model):
    spans, *chains = CHAINS["uneven"]
    async with ring_of(model, spans) as ring:
        for wanted in (1, len(ring.nodes)):
            with trio.CancelScope() as left:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer, ring, wish(LONG, max_tokens=500), chains)
                    with trio.fail_after(5):
                        while ring.busy() < wanted:
                            await trio.lowlevel.checkpoint()
                    left.cancel()
            await nothing_left(ring)


async def test_only_heirs_get_a_cache_and_only_their_layers(model, monkeypatch):
    monkeypatch.setattr("node.serve.handover.GIVER_WAIT_S", 0.05)
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        first, _ = opened(ring, wish(LONG, max_tokens=9), chains)
        reader = ring.nodes[0].me

        async def refused(node, *wanted):
            with pytest.raises(CallFailed) as found:
                async with node.rpc.open(reader, HANDOVER, HandoverOpen(*wanted)) as channel:
                    await channel.receive()
            return found.value.code

        assert await refused(ring.nodes[2], first.session, 0, 4) == "not_found"
        with ring.entry.returns.expect(first.session, "gateway", ring.nodes[1].me), trio.fail_after(5):
            async with ring.entry.rpc.open(reader, SESSION, replace(first, reuse=0)):
                while not len(ring.nodes[0].stages.handovers):
                    await trio.lowlevel.checkpoint()
                assert await refused(ring.nodes[3], first.session, 0, 4) == "denied"
                assert await refused(ring.nodes[2], first.session, 0, 5) == "denied"
                assert await refused(ring.entry, first.session, 0, 1) == "denied"
                assert await refused(ring.nodes[2], first.session, 2, 2) == "denied"
        await nothing_left(ring)


async def test_who_waits_for_a_cache_hears_why_it_will_not_come():
    stage, heir = StageRef("a", 0, 4), StageRef("b", 0, 4)
    request = SessionOpen(
        "s", MANIFEST, (stage,), 0, "g", 300, 1, True, SamplingSpec(0.0, 1.0, 0, 0), heirs=(heir,)
    )
    giver, why = (
        Giver(request, None, trio.CapacityLimiter(1)),
        RpcRefusal("unavailable", "gone", detail={"peer": "c"}),
    )
    found = []

    async def ask():
        with pytest.raises(RpcRefusal) as refused:
            await giver.give("b", 0, 4, None)
        found.append((refused.value.code, refused.value.message, refused.value.detail))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await giver.end(why)
    assert found == [("unavailable", "gone", {"peer": "c"})]


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        (0, {"new_tokens_max": 2}),
        (0, {"sources": "stages", "source": "other"}),
        (0, {"priority": BACKGROUND}),
        (0, {"heirs": "short"}),
        (0, {"heirs": "gap"}),
        (1, {"source": ""}),
        (1, {"source": "s"}),
        (1, {"source": "x" * 200}),
        (1, {"sources": ()}),
        (1, {"sources": "short"}),
        (1, {"marks": (b"12345678",)}),
        (1, {"new_tokens_max": 1}),
        (1, {"priority": BACKGROUND}),
        (1, {"handover_s": -1.0}),
        (1, {"handover_s": 1e9}),
    ],
)
async def test_a_handover_that_no_honest_gateway_asks_for_is_refused(model, which, changes):
    spans, *chains = CHAINS["alike"]
    async with ring_of(model, spans) as ring:
        request = opened(ring, wish(LONG, max_tokens=9), chains)[which]
        there = chain(ring, chains[1])
        words = {"stages": there, "short": there[:1], "gap": (there[0], replace(there[1], start=5))}
        changes = {
            name: words.get(value, value) if name != "source" else value for name, value in changes.items()
        }
        with pytest.raises(CallFailed) as refused, trio.fail_after(5):
            async with ring.entry.rpc.open(
                request.stages[0].peer, SESSION, replace(request, **changes)
            ) as channel:
                await channel.receive()
        assert refused.value.code == "invalid"
        await nothing_left(ring)
