"""`/v1/responses` by the official client."""

from __future__ import annotations

import openai
import pytest
import trio

from node.errors import StageLost

EOS = 256
HELLO = (*b"Hello, world", EOS)


async def test_a_response_has_text_status_and_usage(make_gateway, serving) -> None:
    gateway = make_gateway(HELLO)
    async with serving(gateway) as site:
        answer = await site.openai.responses.create(
            model="bytes", input="hi", instructions="be kind", max_output_tokens=50, metadata={"a": "b"}
        )
    assert (answer.output_text, answer.status, answer.error) == ("Hello, world", "completed", None)
    assert gateway.requests[0].prompt == tuple(b"system|be kind;user|hi;")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(gateway.requests[0].prompt), 13)
    assert (answer.instructions, answer.metadata, answer.store) == ("be kind", {"a": "b"}, False)


async def test_a_conversation_of_messages_and_parts(make_gateway, serving) -> None:
    gateway = make_gateway(HELLO)
    conversation = [
        {"role": "user", "content": "one"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
    ]
    async with serving(gateway) as site:
        await site.openai.responses.create(model="bytes", input=conversation)
    assert gateway.requests[0].prompt == tuple(b"user|one;assistant|two;user|three;")


async def test_an_answer_that_is_cut_is_incomplete(make_gateway, serving) -> None:
    async with serving(make_gateway(HELLO)) as site:
        answer = await site.openai.responses.create(model="bytes", input="hi", max_output_tokens=5)
    assert (answer.output_text, answer.status) == ("Hello", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"


def collected(url: str) -> list:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(model="bytes", input="hi") as stream:
            events = list(stream)
            return [*events, stream.get_final_response()]


async def test_a_stream_of_events(make_gateway, serving) -> None:
    async with serving(make_gateway(HELLO)) as site:
        *events, final = await trio.to_thread.run_sync(collected, site.url)
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == "Hello, world"
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[-1].type, final.output_text, final.usage.output_tokens) == (
        "response.completed",
        "Hello, world",
        13,
    )


async def test_a_stream_that_cannot_go_on_says_so(make_gateway, serving) -> None:
    async with serving(make_gateway((*b"Hel", StageLost("node", "it died")))) as site:
        body = {"model": "bytes", "input": "hi", "stream": True}
        text = (await site.http.post("/v1/responses", json=body)).text
    assert "event: error\n" in text
    assert '"code":"node_lost"' in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "hi", "temperature": 9}, "temperature"),
        ({"input": "hi", "text": 5}, "text"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(fields, param, make_gateway, serving) -> None:
    async with serving(make_gateway(HELLO)) as site:
        response = await site.http.post("/v1/responses", json={"model": "bytes", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_schema_is_kept_to(make_gateway, serving) -> None:
    gateway = make_gateway(HELLO)
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    async with serving(gateway) as site:
        await site.openai.responses.create(model="bytes", input="hi", text={"format": form})
    assert (gateway.requests[0].form, gateway.requests[0].form_text) == ("json_schema", '{"type": "object"}')
