"""The SDK's core: which gateway is asked what, and when it gives up."""

from __future__ import annotations

import json

import pytest

from shoal.client.asking import Ask, chat_ask, text_ask
from shoal.client.exchange import Exchange, Interrupted
from shoal.client.gateways import DEFAULT, Gateways, base_of, found
from shoal.client.reading import LINE_BYTES_MAX, Events
from shoal.errors import (
    DaemonAbsent,
    DaemonGarbled,
    DaemonRefused,
    DaemonSilent,
    ResourceLimit,
    UsageProblem,
)

ASK = text_ask("m", "hi", {"temperature": 0})
A, B = "http://a:1", "http://b:2"


def chunk(text: str, *tokens: int, finish: str | None = None) -> dict:
    return {"model": "m", "choices": [{"text": text, "token_ids": list(tokens), "finish_reason": finish}]}


def exchange_of(*addresses: str, ask: Ask = ASK, **more) -> Exchange:
    return Exchange(Gateways(addresses or (A, B)), ask, 0.0, **more)


def error_body(code: str) -> bytes:
    return json.dumps({"error": {"message": "no", "code": code}}).encode()


def test_an_answer_goes_on_at_the_next_gateway_behind_the_tokens_that_came():
    exchange = exchange_of()
    first = exchange.call(0.0)
    assert (first.url, first.body.get("continue_token_ids")) == (f"{A}/v1/completions", None)
    exchange.document(chunk("Hel", 1, 2), 1.0)
    assert exchange.broke("reset", 1.5) == 0.0
    second = exchange.call(1.5)
    assert (second.url, second.body["continue_token_ids"]) == (f"{B}/v1/completions", [1, 2])
    piece = exchange.document(chunk("lo", 3, finish="stop"), 2.0)
    assert (piece.text, piece.tokens, piece.finish) == ("lo", (3,), "stop")
    assert exchange.ended(2.5) is None
    answer = exchange.answer(2.5)
    assert (answer.text, answer.tokens, answer.gateways, answer.ttft_s) == ("Hello", (1, 2, 3), (A, B), 1.0)


def test_before_the_first_text_the_request_is_sent_again_as_it_was():
    exchange = exchange_of()
    body = exchange.call(0.0).body
    exchange.broke("refused", 0.1)
    assert exchange.call(0.1).body == body


def test_text_without_tokens_cannot_be_gone_on_with_elsewhere():
    exchange = exchange_of()
    exchange.call(0.0)
    exchange.document({"choices": [{"text": "Hel"}]}, 1.0)
    with pytest.raises(DaemonSilent, match="tells no tokens"):
        exchange.broke("reset", 1.5)


def test_a_single_gateway_is_asked_again_after_longer_and_longer_pauses_then_given_up():
    exchange = exchange_of(A)
    for wait_s in (0.25, 0.5, 1.0):
        exchange.call(0.0)
        assert exchange.broke("refused", 0.0) == wait_s
    with pytest.raises(DaemonAbsent, match=r"no node answers at http://a:1 \(refused\)"):
        exchange.broke("refused", 0.0)


def test_an_end_without_a_finish_is_a_break():
    exchange = exchange_of()
    exchange.call(0.0)
    exchange.document(chunk("Hel", 1), 1.0)
    assert exchange.ended(1.0) == 0.0
    assert exchange.call(1.0).url.startswith(B)


@pytest.mark.parametrize(("code", "passing"), [("node_lost", True), ("deadline_exceeded", False)])
def test_errors_in_the_stream_are_final_or_passing(code, passing):
    exchange = exchange_of()
    exchange.call(0.0)
    with pytest.raises(DaemonRefused) as caught:
        exchange.document({"error": {"message": "no", "code": code}}, 1.0)
    assert isinstance(caught.value, Interrupted) == passing


def test_a_busy_node_is_asked_again_when_it_says():
    exchange = exchange_of(A)
    exchange.call(0.0)
    assert exchange.refused(429, error_body("overloaded"), "2.5", 0.0) == 2.5


def test_a_busy_node_is_not_waited_for_beyond_the_deadline():
    exchange = exchange_of(A, timeout_s=2.0)
    exchange.call(0.0)
    with pytest.raises(ResourceLimit) as caught:
        exchange.refused(429, error_body("overloaded"), "2.5", 0.0)
    assert caught.value.retry_after_s == 2.5


def test_wrong_requests_are_not_repeated():
    exchange = exchange_of()
    exchange.call(0.0)
    with pytest.raises(DaemonRefused) as caught:
        exchange.refused(400, error_body("invalid_value"), None, 0.0)
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")


def test_the_deadline_travels_with_the_request_and_ends_it():
    exchange = exchange_of(timeout_s=10.0)
    call = exchange.call(4.0)
    assert (call.left_s, call.headers["X-Shoal-Deadline"]) == (6.0, "6.000")
    with pytest.raises(DaemonSilent, match="within 10 s"):
        exchange.call(10.0)


@pytest.mark.parametrize("choice", [7, {"token_ids": ["x"], "text": "a"}, {"token_ids": 5}])
def test_garbage_in_an_event_is_named(choice):
    exchange = exchange_of()
    exchange.call(0.0)
    with pytest.raises(DaemonGarbled):
        exchange.document({"choices": [choice]}, 0.0)


def test_a_sampled_answer_gets_a_seed_so_that_others_can_go_on_with_it():
    first, second = (chat_ask("m", "hi", {}).body["seed"] for _ in range(2))
    assert first != second
    assert chat_ask("m", "hi", {"seed": 7}).body["seed"] == 7
    assert "seed" not in ASK.body


@pytest.mark.parametrize("name", ["n", "stream", "logprobs"])
def test_what_the_sdk_cannot_do_is_refused_by_name(name):
    with pytest.raises(UsageProblem, match=f"^{name}: "):
        chat_ask("m", "hi", {name: 2})


def test_gateways_that_failed_rest_and_the_first_is_preferred():
    gateways = Gateways([A, B])
    assert gateways.choose(0.0) == A
    gateways.failed(A, 0.0)
    assert gateways.choose(5.0) == B
    assert gateways.choose(11.0) == A
    gateways.failed(B, 12.0)
    gateways.failed(A, 13.0)
    assert gateways.choose(13.0) == B
    gateways.worked(A)
    assert gateways.choose(13.0) == A


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("127.0.0.1:80", "http://127.0.0.1:80"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h", "https://h"),
        ("[::]:5", "http://[::1]:5"),
    ],
)
def test_addresses_are_taken_as_people_write_them(given, base):
    assert base_of(given) == base


@pytest.mark.parametrize("given", ["", "ftp://h:1", "h:99999", "http://h:1/other"])
def test_wrong_addresses_are_named(given):
    with pytest.raises(UsageProblem, match="the gateway is"):
        base_of(given)


def test_without_addresses_the_environment_then_the_running_daemon_then_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_DATA_DIR", str(tmp_path))
    assert found(()).addresses == (DEFAULT,)
    (tmp_path / "daemon.json").write_text(json.dumps({"pid": 1, "api": "http://127.0.0.1:9", "peer": "p"}))
    assert found(()).addresses == ("http://127.0.0.1:9",)
    monkeypatch.setenv("SHOAL_GATEWAYS", "a:1, b:2")
    assert found(()).addresses == (A, B)
    assert found(("c:3",)).addresses == ("http://c:3",)


def test_events_may_be_cut_anywhere():
    data = b': keepalive\n\ndata: {"a": 1}\r\n\ndata: {"b": 2}\n\ndata: [DONE]\n\ndata: {"c": 3}\n'
    for at in range(len(data)):
        events = Events()
        got = [*events.push(data[:at]), *events.push(data[at:])]
        assert got == [{"a": 1}, {"b": 2}]
        assert events.done


def test_a_line_without_end_is_given_up():
    with pytest.raises(DaemonGarbled, match="more than"):
        list(Events().push(b"x" * (LINE_BYTES_MAX + 1)))
