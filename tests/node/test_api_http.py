"""Everything around the OpenAI endpoints: routes, errors, limits, keys, and who may ask."""

from __future__ import annotations

import json

import openai
import pytest
import trio

import node.api
from node.api import ApiConfig, ServerConfig, build_app, is_loopback, serve_http
from node.errors import ListenProblem
from node.metrics import Metrics

CHAT = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}


def error_of(answer) -> dict:
    document = answer.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/audio/speech", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_there_is_said_in_openais_shape(
    method, path, status, code, make_gateway, serving
) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"model": 5}'])
async def test_a_bad_body_is_a_400_and_the_node_goes_on(body, path, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.http.post(path, content=body)
        assert answer.status_code == 400
        assert error_of(answer)["type"] == "invalid_request_error"
        again = await site.http.post("/v1/chat/completions", json=CHAT)
    assert again.json()["choices"][0]["message"]["content"] == "Hello, world"


async def test_a_wrong_type_through_the_official_client_names_the_parameter(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(openai.BadRequestError, match=r"'temperature': got \"hot\"") as caught:
            await site.openai.chat.completions.create(**CHAT, temperature="hot")
    assert caught.value.param == "temperature"


async def test_a_token_outside_the_vocabulary_is_refused(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.http.post("/v1/completions", json={"model": "bytes", "prompt": [5, 257]})
    assert answer.status_code == 400
    assert "below 257" in error_of(answer)["message"]


@pytest.mark.parametrize("prompt", ["", ["a", ""]])
async def test_an_empty_prompt_is_refused(prompt, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.http.post("/v1/completions", json={"model": "bytes", "prompt": prompt})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_refused_after_it_was_read(chunked, make_gateway, serving) -> None:
    async def pieces():
        for _ in range(30):
            yield b" " * 100_000

    gateway = make_gateway()
    async with serving(gateway, config=ApiConfig(body_bytes_max=1000)) as site:
        content = pieces() if chunked else b" " * 3_000_000
        answer = await site.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"
        fits = json.dumps(CHAT).encode().ljust(1000)
        assert (await site.http.post("/v1/chat/completions", content=fits)).status_code == 200
        over = await site.http.post("/v1/chat/completions", content=fits + b" ")
    assert over.status_code == 413
    assert len(gateway.requests) == 1


async def test_a_body_that_does_not_arrive_is_given_up(make_gateway, serving) -> None:
    async with serving(make_gateway(), config=ApiConfig(body_deadline_s=0.05)) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with client:
            await client.send_all(
                b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n\r\n{"
            )
            with trio.fail_after(5):
                seen = b""
                while chunk := await client.receive_some():
                    seen += chunk
    assert seen.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("status", [200, 404])
async def test_a_client_that_wants_the_connection_closed_sees_it_closed(
    status, make_gateway, serving
) -> None:
    path = "/health" if status == 200 else "/nowhere"
    async with serving(make_gateway()) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with client:
            request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
            await client.send_all(request.encode())
            with trio.fail_after(5):
                seen = b""
                while chunk := await client.receive_some():
                    seen += chunk
    assert seen.startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 200,
        b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000,
        b"GET /%ff%00 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n\r\n",
    ],
)
async def test_garbage_on_a_connection_leaves_the_node_serving(garbage, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        client = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with client:
            with trio.move_on_after(0.3):
                try:
                    await client.send_all(garbage)
                    while await client.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass
        answer = await site.http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200


async def test_a_bug_is_a_500_without_its_details(make_gateway, serving, caplog) -> None:
    async with serving(make_gateway((KeyError("a secret path"),))) as site:
        answer = await site.http.post("/v1/chat/completions", json=CHAT)
        again = await site.http.get("/health")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert again.status_code == 200
    assert "a secret path" in caplog.text


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2:x", True), ("a b", False), ("x" * 200, False), ("", False)]
)
async def test_every_answer_carries_a_request_id(given, kept, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        headers = {"x-request-id": given} if given else {}
        found = (await site.http.get("/nowhere", headers=headers)).headers.get_list("x-request-id")
    assert len(found) == 1
    assert (found[0] == given) == kept
    assert found[0]


async def test_health_metrics_mesh_and_the_page(make_gateway, serving) -> None:
    gateway = make_gateway()
    gateway.mesh_document = {
        "mesh": "m",
        "self": "p",
        "nodes": [{"self": True, "connected": True, "rtt_ms": None}],
        "models": [{"name": "bytes", "copies_min": 2, "ready": True}],
    }
    async with serving(gateway) as site:
        await site.http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4})
        health = (await site.http.get("/health")).json()
        metrics = await site.http.get("/metrics")
        mesh = (await site.http.get("/mesh")).json()
        page = await site.http.get("/")
    assert health == {"status": "ok", "models": 2, "models_ready": 1}
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = metrics.text.splitlines()
    assert 'shoal_generation_tokens_total{model_name="bytes"} 4.0' in lines
    assert 'shoal_request_success_total{finished_reason="length",model_name="bytes"} 1.0' in lines
    assert 'shoal_mesh_rarest_layer_replicas{model_name="bytes"} 2.0' in lines
    assert mesh == gateway.mesh_document
    assert page.headers["content-type"].startswith("text/html")
    for link in ("/v1/models", "/mesh", "/metrics", "/health"):
        assert f'href="{link}"' in page.text


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic one", 401),
        ("Bearer", 401),
        ("Bearer one", 200),
        ("bearer two", 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/mesh", "/metrics"])
async def test_with_keys_set_a_key_is_needed(path, authorization, status, make_gateway, serving) -> None:
    async with serving(make_gateway(), config=ApiConfig(api_keys=("one", "two"))) as site:
        headers = {} if authorization is None else {"authorization": authorization}
        answer = await site.http.get(path, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert error_of(answer)["code"] == "invalid_api_key"
        assert (await site.http.get("/health")).status_code == 200
        page = await site.http.get("/")
    assert page.status_code == 200
    assert "org/absent" not in page.text


async def test_the_official_client_presents_its_key(make_gateway, serving) -> None:
    config = ApiConfig(api_keys=("right",))
    async with serving(make_gateway(), config=config, key="right") as site:
        assert (await site.openai.models.list()).data
    async with serving(make_gateway(), config=config, key="wrong") as site:
        with pytest.raises(openai.AuthenticationError):
            await site.openai.models.list()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8080"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[bad"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_without_keys_no_foreign_page_can_use_the_node(headers, status, make_gateway, serving) -> None:
    gateway = make_gateway()
    async with serving(gateway) as site:
        answer = await site.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == status
    assert len(gateway.requests) == (1 if status == 200 else 0)


@pytest.mark.parametrize(
    ("client", "path", "keys", "status"),
    [
        ("192.168.1.9", "/v1/models", (), 403),
        ("192.168.1.9", "/mesh", (), 403),
        ("192.168.1.9", "/metrics", (), 403),
        ("192.168.1.9", "/health", (), 200),
        ("192.168.1.9", "/", (), 200),
        ("192.168.1.9", "/v1/models", ("k",), 200),
        ("192.168.1.9", "/shoal/stop", ("k",), 403),
        ("192.168.1.9", "/shoal/stop", (), 403),
        ("127.0.0.1", "/v1/models", (), 200),
        ("::1", "/v1/models", (), 200),
    ],
)
async def test_other_computers_need_a_key_and_never_give_orders(
    client, path, keys, status, make_gateway
) -> None:
    app = build_app(make_gateway(), Metrics(), None, ApiConfig(api_keys=keys))
    headers = [
        (b"host", b"127.0.0.1"),
        (b"authorization", b"Bearer k"),
        (b"content-type", b"application/json"),
    ]
    scope = {
        "type": "http",
        "method": "POST" if path.startswith("/shoal") else "GET",
        "path": path,
        "headers": headers,
        "client": (client, 5),
        "query_string": b"",
    }
    sent = []

    async def receive():
        await trio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["status"] == status


async def test_further_host_names_can_be_allowed(make_gateway, serving) -> None:
    async with serving(make_gateway(), config=ApiConfig(hosts=("my.box",))) as site:
        answer = await site.http.get("/v1/models", headers={"host": "my.box:80"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("a.localhost", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("localhost.evil.example", False),
        ("", False),
        ("2130706433", False),
    ],
)
def test_loopback_is_recognised(host, expected) -> None:
    assert is_loopback(host) is expected


def test_the_face_is_what_it_is() -> None:
    assert node.api.__all__ == ["ApiConfig", "ServerConfig", "build_app", "is_loopback", "serve_http"]


async def test_a_port_in_use_is_one_clear_line(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(ListenProblem, match=rf"127.0.0.1:{site.port}.*another program") as caught:
            await serve_http(site.app, "127.0.0.1", site.port)
    assert "\n" not in str(caught.value)


async def test_a_host_that_is_not_ours_is_one_clear_line(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(ListenProblem, match=r"192\.0\.2\.1"):
            await serve_http(site.app, "192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("localhost", "localhost"), ("127.0.0.2", "127.0.0.2")]
)
async def test_the_reported_url_can_be_used_on_this_computer(host, shown, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site, trio.open_nursery() as nursery:

        async def run(task_status=trio.TASK_STATUS_IGNORED):
            await serve_http(site.app, host, 0, task_status=task_status)

        url = await nursery.start(run)
        assert url.startswith(f"http://{shown}:")
        assert int(url.rpartition(":")[2]) > 0
        nursery.cancel_scope.cancel()


async def test_too_many_connections_are_turned_away_with_an_answer(make_gateway, serving) -> None:
    async with serving(make_gateway(), server=ServerConfig(connections_max=2)) as site:
        first = await trio.open_tcp_stream("127.0.0.1", site.port)
        second = await trio.open_tcp_stream("127.0.0.1", site.port)
        answer = await site.http.get("/health")
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "too_many_connections"
        await first.aclose()
        with trio.fail_after(5):
            while (await site.http.get("/health")).status_code != 200:
                await trio.lowlevel.checkpoint()
        await second.aclose()
