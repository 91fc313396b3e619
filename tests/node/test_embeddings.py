"""Embeddings: of a ring of stages against one engine's, and `/v1/embeddings` by the official client."""

from __future__ import annotations

import base64
import math
import struct

import openai
import pytest
import torch
import trio
from rings import CUTS, MANIFEST, ring_of, tokens_of, wish

from model_shards import Engine, Step, load_span
from node import embedded
from node.errors import GatewayError, Overloaded
from node.serve.choosing import embedding_of
from node.serve.protocol import TokenOut
from p2p import Tensor

LONG = tuple(range(7, 7 + 150)) * 2
POOLS = ["last_hidden", "mean"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pooled(model):
    config, index, _ = model
    engine = Engine(load_span(embedded.path(), index, config, 0, 8), kv_bytes_max=4 << 20)

    def run(prompt, pool):
        engine.open("s", 0, 8, len(prompt))
        row = engine.run([Step("s", 0, tuple(prompt), pool=pool)])[0].embedding
        engine.close("s")
        return row

    return run


async def row_of(ring, prompt, pool):
    with trio.fail_after(20):
        (event,) = await tokens_of(ring, wish(prompt, max_tokens=1, pool=pool))
    assert event.finish == "stop"
    return torch.tensor(event.embedding)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pool", POOLS)
async def test_a_ring_embeds_as_one_engine_does(model, pooled, cut, pool):
    async with ring_of(model, CUTS[cut]) as ring:
        assert len(await tokens_of(ring, wish(LONG, max_tokens=2))) == 2, "its pieces are in the caches now"
        for prompt in (LONG, LONG[:5], LONG):
            expected = pooled(prompt, pool)
            found = await row_of(ring, prompt, pool)
            assert found.shape == expected.shape
            # Pieces of a prompt are computed by themselves, which moves bfloat16's last bits.
            assert float(torch.cosine_similarity(found, expected, 0)) > 0.999
        await ring.quiet()
        assert not torch.equal(await row_of(ring, LONG, pool), await row_of(ring, LONG[1:], pool))


async def test_the_last_row_is_taken_from_cached_pieces_and_a_mean_from_none(model):
    async with ring_of(model, CUTS["two"]) as ring:
        await row_of(ring, LONG, "last_hidden")
        for pool, reads in (("last_hidden", len(LONG) - 256), ("mean", len(LONG))):
            before = ring.nodes[-1].computes[MANIFEST].tokens
            await row_of(ring, LONG, pool)
            assert ring.nodes[-1].computes[MANIFEST].tokens - before == reads


@pytest.mark.parametrize(
    "given",
    [
        None,
        Tensor("int32", (1,), bytes(4)),
        Tensor("float32", (1, 1), bytes(4)),
        Tensor("float32", (0,), b""),
        Tensor("float32", (1,), b"\x00\x00\xc0\x7f"),
    ],
)
def test_what_is_no_embedding_names_who_sent_it(given):
    with pytest.raises(GatewayError, match="node-x"):
        embedding_of(TokenOut(0, 0, embedding=given), "node-x")


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("given", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
async def test_the_official_client_gets_vectors_of_unit_length(make_gateway, serving, encoding, given):
    gateway = make_gateway()
    async with serving(gateway) as site:
        answer = await site.openai.embeddings.create(model="bytes", input=given, encoding_format=encoding)
        default = await site.openai.embeddings.create(model="bytes", input=given)
    length = math.hypot(3.0, 3.0)
    for found in (answer, default):
        (one,) = found.data
        row = one.embedding
        if isinstance(row, str):
            row = struct.unpack("<2f", base64.b64decode(row))
        assert row == pytest.approx([3 / length, 3 / length])
        assert (one.index, one.object) == (0, "embedding")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)
    assert gateway.requests[0].pool == "last_hidden"
    assert gateway.requests[0].prompt == tuple(b"abc")


async def test_many_inputs_keep_their_order_and_a_bad_one_spoils_all(make_gateway, serving):
    texts = ["x" * (1 + n % 7) for n in range(60)]
    gateway = make_gateway()
    async with serving(gateway) as site:
        answer = await site.openai.embeddings.create(
            model="bytes", input=texts, extra_body={"pooling": "mean"}, encoding_format="float"
        )
        assert [one.index for one in answer.data] == list(range(60))
        for text, one in zip(texts, answer.data, strict=True):
            assert one.embedding[1] / one.embedding[0] == pytest.approx(len(text) / 3)
        assert {request.pool for request in gateway.requests} == {"mean"}
        gateway.on_enter = [None, None, Overloaded(3.0, "no room")]
        with pytest.raises(openai.RateLimitError):
            await site.openai.embeddings.create(model="bytes", input=texts)
        assert gateway.running == 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("input", [], "a text, a list"),
        ("input", "", "no tokens"),
        ("input", [999999], "token ids below"),
        ("input", ["a"] * 3000, "at most 2048"),
        ("input", "x" * 500, "128"),
        ("encoding_format", "hex", "one of base64, float"),
        ("pooling", "max", "one of last_hidden, mean"),
        ("dimensions", 7, "2, which this model has"),
    ],
)
async def test_wrong_input_is_named(make_gateway, serving, field, value, words):
    async with serving(make_gateway()) as site:
        body = {"model": "bytes", "input": "abc"} | {field: value}
        answer = await site.http.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert words in answer.json()["error"]["message"]
