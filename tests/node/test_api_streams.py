"""Streams over time: clients that leave, waits, and a node that stops."""

from __future__ import annotations

import json
import socket
import struct

import pytest
import trio

from node.api import ApiConfig, ServerConfig
from node.errors import StageLost

EOS = 256
BODY = {"model": "bytes", "prompt": "hi"}


def raw_request(body: dict, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def read_until(stream: trio.SocketStream, marker: bytes) -> bytes:
    seen = b""
    while marker not in seen:
        chunk = await stream.receive_some()
        if not chunk:
            break
        seen += chunk
    return seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_a_client_that_leaves_ends_the_generation(how, stream, make_gateway, serving) -> None:
    gateway = make_gateway((*b"Hel", trio.Event()))
    async with serving(gateway) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        await client.send_all(raw_request(BODY | {"stream": stream, "n": 2}))
        if stream:
            assert b"Hel" not in await read_until(client, b'"l"')
        with trio.fail_after(5):
            await gateway.entered.wait()
            if how == "half-close":
                await client.send_eof()
            elif how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await client.aclose()
            else:
                await client.aclose()
            await gateway.left.wait()
            while gateway.running:
                await trio.lowlevel.checkpoint()
        await client.aclose()
        text = site.metrics.text().decode()
    assert 'shoal_num_requests_running{model_name="bytes"} 0.0' in text
    assert 'shoal_request_failure_total{code="cancelled",model_name="bytes"} 2.0' in text


async def test_a_client_that_stops_reading_ends_the_generation(make_gateway, serving) -> None:
    def script(_):
        while True:
            yield ord("x")

    gateway = make_gateway(script)
    object.__setattr__(gateway.infos[0], "context_tokens", 1 << 24)
    async with serving(gateway, server=ServerConfig(send_stall_s=0.2)) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        await client.send_all(raw_request(BODY | {"stream": True}))
        with trio.fail_after(20):
            await gateway.left.wait()
        await client.aclose()
    assert gateway.running == 0


async def test_comments_keep_a_waiting_stream_alive(make_gateway, serving) -> None:
    gate = trio.Event()
    config = ApiConfig(first_byte_s=0.01, keepalive_s=0.01)
    async with serving(make_gateway((gate, *b"ok", EOS)), config=config) as site:
        async with site.http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                if lines.count(": keepalive") == 3:
                    gate.set()
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    texts = [json.loads(item)["choices"][0]["delta"].get("content", "") for item in data[:-1]]
    assert "".join(texts) == "ok"
    assert json.loads(data[0])["choices"][0]["delta"]["role"] == "assistant"


async def test_the_official_client_reads_past_comments(make_gateway, serving) -> None:
    gate = trio.Event()
    config = ApiConfig(first_byte_s=0.0, keepalive_s=0.01)
    async with serving(make_gateway((gate, *b"ok", EOS)), config=config) as site:
        site.nursery.start_soon(open_later, gate)
        chunks, problem = await site.stream("completion", prompt="hi")
    assert problem is None
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ok"


async def open_later(gate: trio.Event) -> None:
    with trio.move_on_after(0.1):
        await trio.sleep_forever()
    gate.set()


async def test_an_error_after_the_first_byte_is_an_event_and_closes_the_stream(make_gateway, serving) -> None:
    gate = trio.Event()
    config = ApiConfig(first_byte_s=0.0)
    async with serving(make_gateway((gate, StageLost("12D3", "gone"))), config=config) as site:
        async with site.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            gate.set()
            lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
    assert answer.status_code == 200
    assert len(lines) == 1
    assert json.loads(lines[0][6:])["error"]["code"] == "node_lost"


async def test_a_bug_in_the_middle_of_a_stream_is_an_event_without_its_details(
    make_gateway, serving, caplog
) -> None:
    async with serving(make_gateway((*b"Hel", KeyError("a secret path")))) as site:
        chunks, problem = await site.stream("completion", prompt="hi")
    assert "Hel".startswith("".join(chunk.choices[0].text for chunk in chunks))
    assert problem.code == "internal_error"
    assert "secret" not in str(problem)
    assert "a secret path" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_ends_open_requests_with_a_clear_error(stream, make_gateway, serving) -> None:
    gateway = make_gateway((*b"Hel", trio.Event()))
    answers = []

    async def ask(site) -> None:
        answers.append(await site.http.post("/v1/completions", json=BODY | {"stream": stream}))

    async with serving(gateway, server=ServerConfig(stop_grace_s=60)) as site, trio.open_nursery() as nursery:
        nursery.start_soon(ask, site)
        await gateway.entered.wait()
        site.stop()
        with trio.fail_after(20):
            await site.stopped.wait()
    assert gateway.running == 0
    text = answers[0].text
    error = json.loads(text.splitlines()[-2][6:]) if stream else answers[0].json()
    assert answers[0].status_code == (200 if stream else 503)
    assert "this node is stopping" in error["error"]["message"]


async def test_a_stop_is_prompt_even_where_a_client_reads_nothing(make_gateway, serving) -> None:
    def script(_):
        while True:
            yield ord("x")

    gateway = make_gateway(script)
    object.__setattr__(gateway.infos[0], "context_tokens", 1 << 24)
    async with serving(gateway, server=ServerConfig(stop_grace_s=0.05)) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        idle = await trio.open_tcp_stream("127.0.0.1", site.port)
        await client.send_all(raw_request(BODY | {"stream": True}))
        generated = -1.0
        while (now := tokens(site)) != generated or now == 0:
            generated = now
            with trio.move_on_after(0.2):
                await trio.sleep_forever()
        site.stop()
        with trio.fail_after(10):
            await site.stopped.wait()
    assert gateway.running == 0
    for stream in (client, idle):
        await stream.aclose()


def tokens(site) -> float:
    for line in site.metrics.text().decode().splitlines():
        if line.startswith("shoal_generation_tokens_total{"):
            return float(line.split()[-1])
    return 0.0


def chat(**more) -> dict:
    return {"model": "bytes", "messages": [{"role": "user", "content": "hi"}], **more}
