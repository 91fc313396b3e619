"""Windows of guesses through chains of stages: fewer passes, and never another text."""

from __future__ import annotations

import random
import re

import pytest
import torch
import trio
from rings import CUTS, MANIFEST, ring_of, tokens_of, wish

from model_shards import ParkingLot, Window, tensor_to_bytes
from node.errors import StageLost
from node.serve import guessing
from node.serve.config import ServeConfig
from node.serve.guessing import Asking
from node.serve.protocol import (
    RELEASE,
    RETURN,
    SESSION,
    Activations,
    Guesses,
    Prompt,
    ReleaseAsk,
    ReturnOpen,
    SamplingSpec,
    SessionInput,
    SessionNote,
    SessionOpen,
    StageRef,
    TokenOut,
)
from p2p import CallFailed, Rpc, RpcRefusal, Tensor

WARM = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11}
PENAL = {
    "temperature": 0.7,
    "seed": 2,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Eager:
    """Wants as many rows as it may have: how long passes take says nothing here."""

    def __init__(self, rows_max):
        self.rows_max = rows_max

    def rows(self, limit):
        return min(limit, self.rows_max)

    def told(self, *seen):
        pass


class Knowing:
    """Guesses the known text as a line or a tree, wrongly now and then."""

    text: tuple[int, ...] = ()
    wrong = 0.3
    trees = False

    def __init__(self):
        self.chance = random.Random(4)
        self.length = 0

    def add(self, tokens):
        self.length += len(tokens)

    def guess(self, rows):
        ahead = self.text[self.length - 1 : self.length - 1 + rows]
        parents, tokens, at = [-1], [ahead[0]], 0
        for token in ahead[1:]:
            guesses = [(token + 1) % 4096, token] if self.trees else [token]
            if self.chance.random() < self.wrong:
                guesses = [(token + 2) % 4096]
            guesses = guesses[: rows - len(tokens)]
            if not guesses:
                break
            parents += [at] * len(guesses)
            tokens += guesses
            at = len(tokens) - 1
        return Window(tuple(parents), tuple(tokens))


@pytest.fixture
def eager(monkeypatch):
    """Every stage guesses as much as it may."""
    monkeypatch.setattr(guessing, "Pace", Eager)


@pytest.fixture
def knowing(eager, monkeypatch, alone):
    """knowing(request) makes the first stages guess the text of `request`, which is returned."""

    def know(request, *, wrong=0.3, trees=False):
        expected = alone(request)
        guesser = type(
            "Knows", (Knowing,), {"text": (*request.prompt, *expected), "wrong": wrong, "trees": trees}
        )
        monkeypatch.setattr(guessing, "PromptLookup", guesser)
        return expected

    return know


def passes(ring):
    return ring.count("shoal_passes_total")


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("how", [{}, WARM, PENAL], ids=["greedy", "warm", "penalties"])
async def test_guesses_right_or_wrong_give_the_tokens_of_one_engine(model, knowing, prompt, cut, how, trees):
    request = wish(prompt, max_tokens=40, top_logprobs=2, **how)
    expected = knowing(request, trees=trees)
    async with ring_of(model, CUTS[cut]) as ring:
        events = await tokens_of(ring, request)
        assert [event.token for event in events] == expected
        assert [event.index for event in events] == list(range(40))
        assert [event.finish for event in events] == [None] * 39 + ["length"]
        assert all(len(event.top) == 2 for event in events)
        assert passes(ring) < 40
        await ring.quiet()


@pytest.mark.parametrize("cut", ["one", "two"])
async def test_right_guesses_save_passes_and_all_is_counted(model, knowing, prompt, cut):
    request = wish(prompt, max_tokens=33)
    expected = knowing(request, wrong=0.0)
    async with ring_of(model, CUTS[cut]) as ring:
        assert [event.token for event in await tokens_of(ring, request)] == expected
        assert passes(ring) == 1 + 32 / 8
        assert ring.count("shoal_spec_decode_num_draft_tokens_total") == 28
        assert ring.count("shoal_spec_decode_num_accepted_tokens_total") == 28


async def test_wrong_guesses_cost_no_pass(model, knowing, prompt):
    request = wish(prompt, max_tokens=20)
    expected = knowing(request, wrong=1.0)
    async with ring_of(model, CUTS["two"]) as ring:
        assert [event.token for event in await tokens_of(ring, request)] == expected
        assert passes(ring) == 20
        assert ring.count("shoal_spec_decode_num_accepted_tokens_total") == 0


async def test_look_up_finds_what_stands_in_the_prompt(model, alone, eager):
    """The model repeats what it read; from the prompt alone that can be guessed."""
    text = model[2].encode("    def read(self):\n        return self.data\n\n" * 6)
    request = wish(text, max_tokens=60)
    async with ring_of(model, CUTS["four"]) as ring:
        assert [event.token for event in await tokens_of(ring, request)] == alone(request)
        assert passes(ring) < 30


async def test_told_not_to_guess_a_chain_goes_token_by_token(model, knowing, prompt):
    request = wish(prompt, max_tokens=20)
    expected = knowing(request, wrong=0.0)
    async with ring_of(model, CUTS["two"]) as ring:
        ring.gateway._config = ServeConfig(window=1)
        assert [event.token for event in await tokens_of(ring, request)] == expected
        assert passes(ring) == 20


@pytest.mark.parametrize("at", range(1, 12))
async def test_an_end_within_a_window_is_the_last_token(model, knowing, prompt, monkeypatch, at):
    expected = knowing(wish(prompt, max_tokens=20), wrong=0.0)
    async with ring_of(model, CUTS["two"]) as ring:
        eos = expected[at]
        first = expected.index(eos)
        for node in ring.nodes:
            config = node.computes[MANIFEST].engine.span.config
            monkeypatch.setattr(type(config), "eos_ids", (eos,), raising=False)
        events = await tokens_of(ring, wish(prompt, max_tokens=20, ignore_eos=False))
        assert [event.token for event in events] == expected[: first + 1]
        assert [event.finish for event in events] == [None] * first + ["stop"]
        await ring.quiet()


@pytest.mark.parametrize("most", [1, 2, 3, 9, 10])
async def test_the_most_tokens_are_never_exceeded(model, knowing, prompt, most):
    request = wish(prompt, max_tokens=most)
    expected = knowing(request, wrong=0.0)
    async with ring_of(model, CUTS["four"]) as ring:
        events = await tokens_of(ring, request)
        assert [event.token for event in events] == expected
        assert events[-1].finish == "length"


async def test_a_form_is_kept_over_windows(model, eager, prompt):
    asked = {"temperature": 1.0, "seed": 3, "ignore_eos": False, "max_tokens": 60}
    asked |= {"form": "regex", "form_text": "(ab ab ab ab |cd cd cd ){8,9}end"}
    async with ring_of(model, CUTS["two"]) as ring:
        events = await tokens_of(ring, wish(prompt, **asked))
        many = passes(ring)
        ring.gateway._config = ServeConfig(window=1)
        assert [event.token for event in await tokens_of(ring, wish(prompt, **asked))] == [
            e.token for e in events
        ]
        assert many < len(events)
        text = model[2].decode([event.token for event in events[:-1]]).strip()
        assert re.fullmatch(asked["form_text"], text) or events[-1].finish == "length"


async def test_requests_that_guess_and_others_side_by_side_do_not_disturb_one_another(
    model, alone, eager, prompt
):
    text = model[2].encode("    def read(self):\n        return self.data\n\n" * 6)
    requests = [
        wish([text, prompt][i % 2], seed=i, temperature=0.5 * (i % 3), max_tokens=30) for i in range(6)
    ]
    found = {}
    async with ring_of(model, CUTS["four"]) as ring:

        async def run(i):
            found[i] = [event.token for event in await tokens_of(ring, requests[i])]

        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(run, i)
        assert passes(ring) < 180
        await ring.quiet()
    assert [found[i] for i in range(6)] == [alone(request) for request in requests]


async def test_leaving_amid_windows_frees_every_stage(model, knowing, prompt):
    request = wish(prompt, max_tokens=200)
    knowing(request)
    async with ring_of(model, CUTS["four"]) as ring:
        async with ring.gateway.generate(request) as events:
            async for event in events:
                if event.index == 5:
                    break
            assert ring.busy() == 4
        await ring.quiet()
        assert all(node.computes[MANIFEST].kv_usage() == 0 for node in ring.nodes)


@pytest.mark.parametrize("victim", range(4))
async def test_a_stage_that_dies_amid_windows_is_named_and_the_others_are_freed(
    model, knowing, prompt, victim
):
    request = wish(prompt, max_tokens=400)
    expected = knowing(request)
    seen = []
    async with ring_of(model, CUTS["four"]) as ring:

        async def run():
            async with ring.gateway.generate(request) as events:
                async for event in events:
                    seen.append(event.token)
                    if event.index == 6:
                        ring.network.kill(ring.nodes[victim].host.peer_id)

        with pytest.raises(StageLost) as lost, trio.fail_after(20):
            await run()
        assert lost.value.peer == ring.nodes[victim].me
        assert seen == expected[: len(seen)]
        survivors = [node for i, node in enumerate(ring.nodes) if i != victim]
        with trio.fail_after(5):
            while any(node.computes[MANIFEST].engine.sessions() for node in survivors):
                await trio.lowlevel.checkpoint()


async def test_an_answer_read_elsewhere_is_guessed_from_its_prompt(model, alone, eager):
    slow, fast = {"s_per_layer": 0.05}, {"s_per_layer": 0.001}
    text = (model[2].encode("    def read(self):\n        return self.data\n\n" * 30))[:300]
    async with ring_of(model, [(0, 8), (0, 8)]) as ring:
        ring.rates[ring.nodes[0].me] = {"prefill_s_per_token_per_layer": 1e-6, **slow}
        ring.rates[ring.nodes[1].me] = {"prefill_s_per_token_per_layer": 1e-3, **fast}
        request = wish(text, max_tokens=40)
        assert [event.token for event in await tokens_of(ring, request)] == alone(request)
        assert ring.count("shoal_split_sessions_total") == 1
        assert passes(ring) < 20
        await ring.quiet()


async def test_background_work_that_gives_way_amid_windows_goes_on_as_if_it_had_not(model, knowing, prompt):
    """Its cache leaves with the rows of a window whose guesses were not judged yet, and comes back with them."""
    request = wish(prompt, max_tokens=60, priority="background")
    expected = knowing(request, wrong=0.2)
    loose = []

    async def park(compute):
        compute.engine._lot = ParkingLot(1 << 20)
        async with compute._idle:
            ((name, cache),) = compute.engine._sessions.items()
            loose.append(cache.loose)
            compute._batcher.parked(name, compute.engine.park(name))

    async with ring_of(model, CUTS["two"]) as ring, ring.gateway.generate(request) as events:
        seen = []
        async for event in events:
            seen.append(event.token)
            if event.index in (10, 20, 30):
                await park(ring.nodes[event.index // 10 % 2].computes[MANIFEST])
    assert seen == expected
    assert max(loose) > 0


def opening(ring, **changes):
    fields = {
        "session": "s",
        "manifest_id": MANIFEST,
        "stages": tuple(StageRef(n.me, *s) for n, s in zip(ring.nodes, ring.spans, strict=True)),
        "index": 0,
        "gateway": ring.entry.me,
        "prompt_tokens": 4,
        "new_tokens_max": 8,
        "ignore_eos": True,
        "sampling": SamplingSpec(0.0, 1.0, 0, 0),
        "window": 8,
    }
    return SessionOpen(**(fields | changes))


@pytest.mark.parametrize("window", [-1, 33])
async def test_a_window_no_honest_gateway_asks_for_is_refused(model, window):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(CallFailed, match="window is") as refused, trio.fail_after(5):
            async with ring.entry.rpc.open(
                ring.nodes[0].me, SESSION, opening(ring, window=window)
            ) as channel:
                await channel.receive()
        assert refused.value.code == "invalid"
        await ring.quiet()


def hidden_of(rows):
    return Tensor(*tensor_to_bytes(torch.zeros(rows, 192, dtype=torch.bfloat16)))


BAD_WINDOWS = {
    "too_many_rows": (
        Activations(4, hidden_of(33), True, parents=tuple(range(-1, 32))),
        None,
        "up to 32 rows",
    ),
    "no_parent": (
        Activations(4, hidden_of(3), True, parents=(-1, 5, 0)),
        Guesses(4, (1, 2, 3)),
        "none before it",
    ),
    "other_rows": (Activations(4, hidden_of(3), True, parents=(-1, 0)), Guesses(4, (1, 2)), "2 rows over 3"),
    "other_position": (
        Activations(4, hidden_of(2), True, parents=(-1, 0)),
        Guesses(5, (1, 2)),
        "for position 5",
    ),
    "fewer_tokens": (Activations(4, hidden_of(2), True, parents=(-1, 0)), Guesses(4, (1,)), "with 1 tokens"),
    "unknown_tokens": (
        Activations(4, hidden_of(2), True, parents=(-1, 0)),
        Guesses(4, (1, 1 << 40)),
        "vocabulary",
    ),
    "kept_of_nothing": (Activations(5, hidden_of(1), True, kept=(1,)), None, "position 5, expected 4"),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
async def test_a_bad_window_ends_its_session_and_leaves_nothing(model, name):
    bad, guesses, told = BAD_WINDOWS[name]

    async def send(first, last, tokens):
        request = opening(ring, index=1, gateway=first.me)
        async with first.rpc.open(last.me, SESSION, request) as channel:
            await channel.send(SessionInput(activations=Activations(0, hidden_of(4), True)))
            await tokens.receive()
            if guesses is not None:
                await first.returns.guess("s", guesses)
            await channel.send(SessionInput(activations=bad))
            while True:
                await channel.receive()

    async with ring_of(model, CUTS["two"]) as ring:
        first, last = ring.nodes
        expecting = first.returns.expect("s", "gateway", last.me)
        with trio.fail_after(5), first.returns.expect("s", "stage", last.me) as tokens, expecting:
            with pytest.raises(CallFailed, match=told) as refused:
                await send(first, last, tokens)
        assert refused.value.code == "invalid"
        await ring.quiet()


async def test_tokens_that_nobody_guessed_are_not_taken(model, prompt):
    async def last_stage(call, request, channel):
        """It says more than it was asked."""
        await channel.send(SessionNote(1, -1))
        async with liar.open(call.peer, RETURN, ReturnOpen("s", "stage")) as out:
            await channel.receive()
            await out.send(TokenOut(0, 5, more=True))
            await out.send(TokenOut(1, 6))
            await trio.sleep_forever()

    async def ask(request):
        async with ring.entry.rpc.open(ring.nodes[0].me, SESSION, request) as channel:
            ids = Tensor(*tensor_to_bytes(torch.tensor(prompt[:4], dtype=torch.int32)))
            await channel.send(SessionInput(prompt=Prompt(0, ids)))
            while True:
                await channel.receive()

    async with ring_of(model, [(0, 8)]) as ring, trio.open_nursery() as nursery:
        host = ring.network.host("liar")
        liar = Rpc(host)
        liar.serve_channel(SESSION, last_stage)
        await nursery.start(liar.run)
        await host.connect(ring.nodes[0].host.addrs())
        stages = (StageRef(ring.nodes[0].me, 0, 4), StageRef(str(host.peer_id), 4, 8))
        with pytest.raises(CallFailed, match="nobody guessed"), trio.fail_after(5):
            await ask(opening(ring, stages=stages))
        # What broke below it could still be mended, until its gateway says that it is over.
        await ring.entry.rpc.call(ring.nodes[0].me, RELEASE, ReleaseAsk("s"))
        await ring.quiet()
        nursery.cancel_scope.cancel()


async def test_a_last_stage_that_is_no_more_is_told_no_guesses(model):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(RpcRefusal, match="left session"):
            await ring.nodes[0].returns.guess("s", Guesses(4, (1, 2)))


def test_windows_shrink_with_what_else_a_node_has_to_do(monkeypatch):
    monkeypatch.setattr(guessing, "Pace", Eager)
    shares = [8, 3, 1]
    asking = Asking(
        SessionOpen("s", "m", (), 0, "g", 4, 60, True, SamplingSpec(0.0, 1.0, 0, 0), window=8),
        frozenset(),
        lambda: shares.pop(0),
    )
    asking.read([7, 7, 7])
    rows = [asking.after(tokens, at)[0].rows for at, tokens in enumerate([[7], [7] * 8, [7] * 3])]
    assert rows == [8, 3, 1]
