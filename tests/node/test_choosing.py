"""What the choice of a token depends on reaches the last stage, however the request's prompt and answer are cut."""

from __future__ import annotations

import pytest
import torch
import trio
from rings import CUTS, Ring, ring_of, tokens_of, wish

from model_shards import ModelError
from node.errors import GatewayError
from node.serve.choosing import sampling_asked, sampling_of

LONG = tuple(range(7, 7 + 150)) * 2
FAST_AND_SLOW = (
    {"prefill_s_per_token_per_layer": 1e-6, "s_per_layer": 0.05},
    {"prefill_s_per_token_per_layer": 1e-3, "s_per_layer": 0.001},
)
WAYS = {
    "repetition": {"repetition_penalty": 1.7},
    "counts": {"presence_penalty": 1.5, "frequency_penalty": 1.0},
    "min_p": {"min_p": 0.3, "temperature": 1.5, "seed": 3},
    "bias": {"logit_bias": ((11, 30.0), (12, 29.0)), "temperature": 1.0, "seed": 5},
    "form": {"form": "regex", "form_text": "[a-z]{40}", "temperature": 1.0, "seed": 7},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def chosen(ring, request):
    with trio.fail_after(20):
        return [event.token for event in await tokens_of(ring, request)]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_changes_the_answer(alone, way):
    plain = {name: value for name, value in WAYS[way].items() if name in ("temperature", "seed")}
    assert alone(wish(LONG, **WAYS[way])) != alone(wish(LONG, **plain))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_ring_chooses_as_one_engine_does(model, alone, cut, way):
    request = wish(LONG, **WAYS[way])
    async with ring_of(model, CUTS[cut]) as ring:
        assert await chosen(ring, request) == alone(request)
        assert await chosen(ring, request) == alone(request), "with the prompt's pieces from the cache"


@pytest.mark.parametrize("spans", [[(0, 8), (0, 8)], [(0, 4), (4, 8), (0, 4), (4, 8)]])
@pytest.mark.parametrize("way", WAYS)
async def test_so_does_a_pair_of_chains(model, alone, spans, way):
    request = wish(LONG, **WAYS[way])
    async with ring_of(model, spans) as ring:
        half = len(spans) // 2
        for number, node in enumerate(ring.nodes):
            ring.rates[node.me] = FAST_AND_SLOW[number >= half]
        other = Ring(ring.network, ring.nodes, ring.nodes[-1], ring.spans)
        other.rates = ring.rates
        assert await chosen(other, request) == alone(request)
        assert other.count("shoal_split_sessions_total") == 1


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_goes_on_elsewhere_is_chosen_as_in_one_piece(model, alone, way):
    """What a session's prompt holds of the answer counts as answered."""
    request = wish(LONG, **WAYS[way])
    whole = alone(request)
    async with ring_of(model, CUTS["two"]) as ring:
        compute = ring.nodes[-1].computes["m" * 64]
        begun = tuple(whole[:5])
        sampling = await sampling_of(sampling_asked(request, begun), compute)
        assert sampling.answered == (begun if way in ("counts", "form") else ())
        assert sampling.seen == (frozenset(LONG + begun) if way == "repetition" else frozenset())
        if sampling.grammar is not None:
            assert sampling.grammar.allowed(begun)[whole[5]]


async def test_the_likeliest_tokens_come_with_each_token(model):
    request = wish(LONG, top_logprobs=3)
    async with ring_of(model, CUTS["two"]) as ring:
        events = await tokens_of(ring, request)
    for event in events:
        assert len(event.top) == 3
        assert event.top[0] == (event.token, event.logprob), "greedy takes the likeliest"
        assert [pair[1] for pair in event.top] == sorted((pair[1] for pair in event.top), reverse=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"logit_bias": ((1 << 30, 1.0),)}, "vocabulary"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"top_logprobs": 1000}, "top_logprobs"),
    ],
)
async def test_a_stage_refuses_what_no_api_lets_through(model, alone, prompt, wrong, words):
    async with ring_of(model, CUTS["two"]) as ring:
        with pytest.raises(GatewayError, match=words):
            await tokens_of(ring, wish(prompt, **wrong))
        assert await chosen(ring, wish(prompt)) == alone(wish(prompt))


async def test_tokens_told_must_be_of_the_vocabulary(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        compute = ring.nodes[-1].computes["m" * 64]
        for made in ((1 << 20,), (-1,)):
            spec = sampling_asked(wish(prompt, repetition_penalty=2.0), made)
            with pytest.raises(ModelError, match="outside the vocabulary"):
                await sampling_of(spec, compute)
