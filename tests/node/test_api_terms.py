"""For whom a request counts, how urgent it is and how long it may take: headers, body fields and configuration."""

from __future__ import annotations

import pytest

from node.api import ApiConfig
from node.errors import DeadlinePassed, Overloaded

CHAT = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "bytes", "prompt": "hi"}


async def asked(site, gateway, body=PLAIN, **headers):
    """The request that reaches the gateway, and the answer."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await site.http.post(path, json=body, headers=named)
    return gateway.requests[-1] if gateway.requests else None, answer


@pytest.mark.parametrize(
    ("body", "headers", "priority", "tier"),
    [
        (PLAIN, {}, "normal", None),
        (CHAT, {"x_shoal_priority": "background"}, "background", None),
        (PLAIN, {"x_shoal_priority": "High"}, "high", None),
        (CHAT | {"service_tier": "flex"}, {}, "background", "flex"),
        (PLAIN | {"service_tier": "priority"}, {}, "high", "priority"),
        (PLAIN | {"service_tier": "auto"}, {}, "normal", "default"),
        (PLAIN | {"service_tier": "flex"}, {"x_shoal_priority": "normal"}, "normal", "default"),
    ],
)
async def test_urgency(serving, make_gateway, body, headers, priority, tier):
    gateway = make_gateway()
    async with serving(gateway) as site:
        request, answer = await asked(site, gateway, body, **headers)
    assert request.priority == priority
    assert answer.json().get("service_tier") == tier


@pytest.mark.parametrize(
    ("headers", "config", "limits"),
    [
        ({}, {}, (None, None)),
        ({"x_shoal_deadline": "12.5", "x_shoal_first_token": "2"}, {}, (12.5, 2.0)),
        ({}, {"request_deadline_s": 30.0, "first_token_s": 3.0}, (30.0, 3.0)),
        ({"x_shoal_deadline": "99"}, {"request_deadline_s": 30.0}, (30.0, None)),
        ({"x_shoal_deadline": "5"}, {"request_deadline_s": 30.0}, (5.0, None)),
    ],
)
async def test_times(serving, make_gateway, headers, config, limits):
    gateway = make_gateway()
    async with serving(gateway, config=ApiConfig(**config)) as site:
        request, _ = await asked(site, gateway, **headers)
    assert (request.deadline_s, request.first_token_s) == limits


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9", ""])
@pytest.mark.parametrize("name", ["x_shoal_deadline", "x_shoal_first_token"])
async def test_times_that_are_none_are_refused_by_name(serving, make_gateway, name, value):
    gateway = make_gateway()
    async with serving(gateway) as site:
        request, answer = await asked(site, gateway, **{name: value})
    assert (request, answer.status_code) == (None, 400)
    assert answer.json()["error"]["param"] == name.replace("_", "-")


async def test_a_class_that_is_none_is_refused(serving, make_gateway):
    gateway = make_gateway()
    async with serving(gateway) as site:
        _, answer = await asked(site, gateway, x_shoal_priority="urgent")
    assert answer.status_code == 400
    assert "high, normal, background" in answer.json()["error"]["message"]


async def clients(site, gateway, *asks):
    return [(await asked(site, gateway, body, **headers))[0].client for body, headers in asks]


async def test_without_keys_the_user_field_tells_clients_apart_and_else_the_address(serving, make_gateway):
    gateway = make_gateway()
    async with serving(gateway) as site:
        ann, ann_chat, bob, nobody, key = await clients(
            site,
            gateway,
            (PLAIN | {"user": "ann"}, {}),
            (CHAT | {"safety_identifier": "ann"}, {}),
            (PLAIN | {"user": "bob"}, {}),
            (PLAIN, {}),
            (PLAIN, {"authorization": "Bearer anything"}),
        )
    assert ann == ann_chat
    assert len({ann, bob, nobody}) == 3
    assert nobody == key
    assert "ann" not in ann


async def test_with_keys_a_holder_is_one_client_whatever_users_it_names(serving, make_gateway):
    gateway = make_gateway()
    one, two = {"authorization": "Bearer one"}, {"authorization": "bearer two"}
    async with serving(gateway, config=ApiConfig(api_keys=("one", "two"))) as site:
        plain, named, other = await clients(
            site, gateway, (PLAIN, one), (PLAIN | {"user": "ann"}, one), (PLAIN | {"user": "ann"}, two)
        )
    assert plain == named != other
    assert "one" not in plain.partition(":")[2]


@pytest.mark.parametrize(("body", "likely"), [(PLAIN, 256), (PLAIN | {"max_tokens": 7}, 0)])
async def test_an_answer_of_open_length_has_a_likely_one(serving, make_gateway, body, likely):
    gateway = make_gateway()
    async with serving(gateway) as site:
        request, _ = await asked(site, gateway, body)
    assert request.likely_tokens == likely


@pytest.mark.parametrize("stream", [False, True])
async def test_too_late_is_said_with_its_own_status(serving, make_gateway, stream):
    gateway = make_gateway([DeadlinePassed(2.5)])
    async with serving(gateway) as site:
        _, answer = await asked(site, gateway, PLAIN | {"stream": stream})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert "2.5 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_says_why_and_when_to_come_back(serving, make_gateway, stream):
    gateway = make_gateway()
    gateway.on_enter = [Overloaded(7.2, "it would wait 9.0 s, 7.2 s too long")]
    async with serving(gateway) as site:
        _, answer = await asked(site, gateway, PLAIN | {"stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "8")
    assert "9.0 s" in answer.json()["error"]["message"]
