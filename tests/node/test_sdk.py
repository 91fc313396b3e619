"""`from shoal import Client, AsyncClient` against the node's own HTTP side."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import trio

from node.errors import Overloaded, StageLost
from shoal import AsyncClient, Client, ResourceLimit
from shoal.errors import DaemonAbsent, DaemonRefused

EOS = 256
TEXT = "Grüße, world"


def behind(request):
    """The whole answer, whoever began it."""
    return [*TEXT.encode(), EOS][len(request.made) :]


@pytest.fixture
def two(make_gateway, serving):
    """Two nodes of one mesh; the first breaks off after `shown` tokens, where that is given."""

    class Two:
        def __init__(self) -> None:
            self.first, self.second = make_gateway(behind), make_gateway(behind)

        def breaks(self, shown: int, how: object) -> None:
            self.first.script = lambda request: [*behind(request)[:shown], how]

    return Two()


async def test_the_async_client_on_trio(make_gateway, serving) -> None:
    gateway = make_gateway(behind)
    async with serving(gateway) as site, AsyncClient(site.url) as shoal:
        answer = await shoal.chat("bytes", "hi", seed=3, max_tokens=50)
        assert (answer.text, answer.finish, answer.completion_tokens) == (
            TEXT,
            "stop",
            len(TEXT.encode()) + 1,
        )
        assert answer.tokens == tuple(TEXT.encode())
        assert gateway.requests[0].seed == 3
        async with shoal.stream("bytes", "hi") as stream:
            pieces = [piece.text async for piece in stream]
        assert "".join(pieces) == TEXT
        assert len(pieces) > 5
        assert [model.name for model in await shoal.models() if model.ready] == ["bytes"]
        [row] = await shoal.embed("bytes", "four")
        assert row == pytest.approx([0.6, 0.8])
        assert (await shoal.mesh())["mesh"] == "m"


async def test_the_async_client_on_asyncio(make_gateway, serving) -> None:
    async def ask(url: str) -> tuple[str, str]:
        async with AsyncClient(url) as shoal:
            whole = await shoal.complete("bytes", [1, 2])
            async with shoal.stream_chat("bytes", "hi") as stream:
                return whole.text, "".join([piece.text async for piece in stream])

    async with serving(make_gateway(behind)) as site:
        assert await trio.to_thread.run_sync(lambda: asyncio.run(ask(site.url))) == (TEXT, TEXT)


async def test_the_blocking_client(make_gateway, serving) -> None:
    def ask(url: str) -> tuple[str, str, int]:
        with Client(url) as shoal, shoal.stream("bytes", "hi", timeout_s=30) as stream:
            text = "".join(piece.text for piece in stream)
            return text, str(shoal.chat("bytes", [{"role": "user", "content": "x"}])), len(shoal.models())

    async with serving(make_gateway(behind)) as site:
        assert await trio.to_thread.run_sync(partial(ask, site.url)) == (TEXT, TEXT, 2)


@pytest.mark.parametrize("shown", range(len(TEXT.encode()) + 1))
async def test_a_stream_goes_on_at_the_next_gateway_wherever_it_broke(shown, two, serving) -> None:
    two.breaks(shown, StageLost("node", "it died"))
    async with serving(two.first) as one, serving(two.second) as other:
        async with AsyncClient(one.url, other.url) as shoal:
            answer = await shoal.chat("bytes", "hi", temperature=0.7)
    assert (answer.text, answer.finish) == (TEXT, "stop")
    assert two.first.requests[0].seed == two.second.requests[0].seed
    assert bytes(two.second.requests[0].made).decode(errors="ignore") == TEXT.encode()[:shown].decode(
        errors="ignore"
    )


async def test_a_gateway_that_stops_in_mid_sentence_is_replaced(two, serving) -> None:
    two.breaks(6, trio.Event())
    async with serving(two.first) as one, serving(two.second) as other:
        async with AsyncClient(one.url, other.url) as shoal, shoal.stream("bytes", "hi") as stream:
            pieces = [(await anext(stream)).text for _ in range(3)]
            one.stop()
            pieces += [piece.text async for piece in stream]
            answer = await stream.answer()
    assert "".join(pieces) == answer.text == TEXT
    assert answer.gateways == (one.url, other.url)


async def test_a_blocking_stream_too(two, serving) -> None:
    two.breaks(6, StageLost("node", "it died"))

    def ask(*urls: str) -> str:
        with Client(*urls) as shoal:
            return shoal.complete("bytes", "hi").text

    async with serving(two.first) as one, serving(two.second) as other:
        assert await trio.to_thread.run_sync(partial(ask, one.url, other.url)) == TEXT


async def test_leaving_a_stream_ends_it_in_the_mesh(make_gateway, serving) -> None:
    gateway = make_gateway([*b"Hel", trio.Event()])
    async with serving(gateway) as site, AsyncClient(site.url) as shoal:
        async with shoal.stream("bytes", "hi") as stream:
            await anext(stream)
        with trio.fail_after(5):
            await gateway.left.wait()
        assert gateway.running == 0


async def test_errors_are_typed(make_gateway, serving) -> None:
    gateway = make_gateway(behind)
    async with serving(gateway) as site, AsyncClient(site.url) as shoal:
        with pytest.raises(DaemonRefused) as caught:
            await shoal.chat("nothing", "hi")
        assert caught.value.code == "model_not_found"
        gateway.on_enter = [Overloaded(30.0, "full")]
        with pytest.raises(ResourceLimit) as busy:
            await shoal.chat("bytes", "hi", timeout_s=20)
        assert busy.value.retry_after_s == 30.0
    with pytest.raises(DaemonAbsent, match="shoal up"):
        await shoal_of(site.url).models()


def shoal_of(url: str) -> AsyncClient:
    return AsyncClient(url)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_token_ids": [1], "n": 2}, "n"),
        ({"continue_token_ids": [1], "best_of": 2}, "best_of"),
        ({"continue_token_ids": [999]}, "continue_token_ids"),
        ({"continue_token_ids": ["x"]}, "continue_token_ids[0]"),
        ({"continue_token_ids": "x"}, "continue_token_ids"),
        ({"continue_token_ids": [72, 72], "max_tokens": 2}, "continue_token_ids"),
        ({"continue_token_ids": [72], "stop": "H"}, "continue_token_ids"),
        ({"continue_token_ids": [72], "prompt": ["a", "b"]}, "prompt"),
    ],
)
async def test_a_continuation_that_cannot_be_is_refused(fields, param, make_gateway, serving) -> None:
    async with serving(make_gateway(behind)) as site:
        body = {"model": "bytes", "prompt": "hi", **fields}
        response = await site.http.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_token_ids_are_told_only_where_asked_for(make_gateway, serving) -> None:
    async with serving(make_gateway(behind)) as site:
        body = {"model": "bytes", "prompt": "hi"}
        plain = (await site.http.post("/v1/completions", json=body)).json()
        asked = (await site.http.post("/v1/completions", json=body | {"return_token_ids": True})).json()
    assert "token_ids" not in plain["choices"][0]
    assert asked["choices"][0]["token_ids"] == list(TEXT.encode())
