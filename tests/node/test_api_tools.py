"""Tools: what models are told of them, and calls in what they say."""

from __future__ import annotations

import json

import openai
import pytest

from model_shards import Tokenizer
from node.api.fields import Fields
from node.api.problems import ApiProblem
from node.api.tools import CallReader, parse_tools

EOS = 256
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '{"name": "weather", "arguments": {"town": "Bern"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}|{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }}:{{ c.function.arguments.town }}){% endfor %};{% endfor %}"
)


def read(text: str, cuts: int) -> tuple[str, list[tuple[str, str]]]:
    """The text given `cuts` characters at a time."""
    reader, shown = CallReader(parse_tools(Fields({"tools": [WEATHER, CLOCK]}))), ""
    for at in range(0, len(text), cuts):
        shown += reader.push(text[at : at + cuts])[0]
    shown += reader.push("", end=True)[0]
    return shown, [(call.name, call.arguments) for call in reader.calls]


FOUND = [("weather", '{"town": "Bern"}')]


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (TAGGED, "", FOUND),
        (f"Let me see. {TAGGED}", "Let me see. ", FOUND),
        (f"{TAGGED}\n{TAGGED} done", "\n done", FOUND * 2),
        (CALL, "", FOUND),
        (f"  [{CALL}]\n", "", FOUND),
        ('{"name": "weather", "parameters": {"town": "Bern"}}', "", FOUND),
        ('{"name": "clock"}', "", [("clock", "{}")]),
        ('{"name": "rm"}', '{"name": "rm"}', []),
        ('{"name": ["x"]}', '{"name": ["x"]}', []),
        (f"[{CALL}, 5]", f"[{CALL}, 5]", []),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
        ("<tool_call>{", "<tool_call>{", []),
        ("a < b <tool", "a < b <tool", []),
        ("{} is empty", "{} is empty", []),
        ("", "", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, shown, calls, cuts):
    assert read(text, cuts) == (shown, calls)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(fields, param):
    with pytest.raises(ApiProblem) as caught:
        parse_tools(Fields(fields))
    assert caught.value.param == param


@pytest.fixture
def talking(byte_tokenizer, tmp_path, make_gateway):
    """A gateway of a model whose template knows tools, that says `text`."""
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_json())
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    def make(text: str):
        gateway = make_gateway((*text.encode(), EOS))
        gateway._tokenizer = Tokenizer.from_dir(tmp_path)
        return gateway

    return make


ASK = {
    "model": "bytes",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [WEATHER, CLOCK],
    "max_tokens": 90,
}


async def test_a_call_by_the_official_client(talking, serving) -> None:
    gateway = talking(f"So: {TAGGED}")
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(**ASK)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So: ")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"town": "Bern"},
    )
    assert gateway.requests[0].prompt == tuple(b"[weather][clock]user|hi;")


async def test_a_streamed_call(talking, serving) -> None:
    clock = '<tool_call>{"name": "clock"}</tool_call>'
    async with serving(talking(clock * 2)) as site:
        chunks, problem = await site.stream(
            "chat", **{name: ASK[name] for name in ("messages", "tools", "max_tokens")}
        )
    assert problem is None
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "clock"), (1, "clock")]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


async def test_what_a_tool_answered_goes_to_the_template(talking, serving) -> None:
    gateway = talking("Rain.")
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bern"}'}}
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "wet"},
    ]
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(**ASK | {"messages": messages})
    assert gateway.requests[0].prompt == tuple(b"[weather][clock]user|hi;assistant|(weather:Bern);tool|wet;")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Rain.", "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_must_be_is_kept_to_by_a_grammar(choice, talking, serving) -> None:
    gateway = talking(CALL)
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(**ASK, tool_choice=choice)
    assert gateway.requests[0].form == "json_schema"
    assert '"weather"' in gateway.requests[0].form_text
    assert ('"clock"' in gateway.requests[0].form_text) == (choice == "required")
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


async def test_none_offers_nothing(talking, serving) -> None:
    gateway = talking(CALL)
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(**ASK, tool_choice="none")
    assert gateway.requests[0].prompt == tuple(b"user|hi;")
    assert answer.choices[0].message.content == CALL


async def test_a_template_that_knows_no_tools_is_said(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(openai.BadRequestError, match="knows of none"):
            await site.openai.chat.completions.create(**ASK)


async def test_an_answer_that_is_cut_in_a_call_is_text(talking, serving) -> None:
    async with serving(talking(TAGGED)) as site:
        answer = await site.openai.chat.completions.create(**ASK | {"max_tokens": 20})
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", TAGGED[:20])
