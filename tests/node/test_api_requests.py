"""Wrong types and values in request bodies: each a 400 that names the field, the value and what would be right."""

from __future__ import annotations

import json

import pytest

from node.api import ApiConfig
from node.api.fields import parse_json
from node.api.problems import ApiProblem
from node.api.requests import parse_chat, parse_completion

CONFIG = ApiConfig()
CHAT = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "bytes", "prompt": "hi"}

BOTH = [
    ("model", 5, "a text"),
    ("model", "x" * 300, "at most 256 characters"),
    ("model", "\ud800", "Unicode"),
    ("stream", "yes", "true or false"),
    ("stream", 1, "true or false"),
    ("temperature", "hot", "a number from 0 to 2"),
    ("temperature", True, "a number"),
    ("temperature", -0.1, "from 0 to 2"),
    ("temperature", 2.1, "from 0 to 2"),
    ("temperature", [1], "a number"),
    ("top_p", 1.01, "from 0 to 1"),
    ("top_p", "1", "a number"),
    ("top_k", 1.5, "a whole number"),
    ("top_k", -2, "from -1"),
    ("seed", "a", "a whole number"),
    ("seed", 1 << 63, "a whole number"),
    ("seed", 1.0, "a whole number"),
    ("max_tokens", 0, "from 1"),
    ("max_tokens", "5", "a whole number"),
    ("max_tokens", True, "a whole number"),
    ("max_completion_tokens", -1, "from 1"),
    ("n", 0, "from 1 to 8"),
    ("n", 9, "from 1 to 8"),
    ("n", [1], "a whole number"),
    ("stop", 5, "a text or a list"),
    ("stop", [""], "none of them empty"),
    ("stop", "", "none of them empty"),
    ("stop", ["a", 5], "a text or a list"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", "x" * 2000, "at most 1024"),
    ("ignore_eos", "no", "true or false"),
    ("stream_options", "usage", "an object"),
    ("stream_options", {"include_usage": True}, "stream to be true"),
    ("frequency_penalty", 2.5, "from -2 to 2"),
    ("presence_penalty", -3, "from -2 to 2"),
    ("presence_penalty", False, "a number"),
    ("repetition_penalty", 0, "from 0.01 to 10"),
    ("min_p", 1.1, "from 0 to 1"),
    ("logit_bias", [5], "an object of at most"),
    ("logit_bias", {"five": 1}, "an object of at most"),
    ("logit_bias", {"-5": 1}, "an object of at most"),
    ("logit_bias", {"\u0665": 1}, "an object of at most"),
    ("logit_bias", {str(token): 1 for token in range(2000)}, "at most 1024"),
    ("logit_bias", {"5": None}, "an object of at most"),
    ("user", 5, "a text"),
    ("user", "x" * 600, "at most 512 characters"),
    ("service_tier", "gold", "one of auto"),
    ("service_tier", 1, "one of auto"),
]
CHAT_ONLY = [
    ("messages", "hi", "a list of 1 to"),
    ("messages", [], "a list of 1 to"),
    ("messages", {"role": "user"}, "a list of 1 to"),
    ("messages[0]", ["hi"], "an object"),
    ("messages[0].role", [{"role": "robot", "content": "x"}], "one of assistant"),
    ("messages[0].role", [{"role": 5, "content": "x"}], "one of assistant"),
    ("messages[0].role", [{"content": "x"}], "required"),
    ("messages[0].content", [{"role": "user"}], "required"),
    ("messages[0].content", [{"role": "user", "content": 5}], "a text"),
    ("messages[0].content", [{"role": "user", "content": "\udc00"}], "Unicode"),
    ("messages[0].content[0]", [{"role": "user", "content": ["x"]}], "an object"),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "image_url"}]}], "not supported"),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text"}]}], "required"),
    ("messages[0].tool_calls[0]", [{"role": "assistant", "tool_calls": [{}]}], "a function's name"),
    ("tools[0]", [{"type": "function"}], "an object such as"),
    ("tool_choice", "required", "no tools"),
    ("functions", [{}], "not supported"),
    ("modalities", ["audio"], "not supported"),
    ("logprobs", 3, "true or false"),
    ("top_logprobs", 3, "logprobs to be true"),
    ("top_logprobs", 21, "from 0 to 20"),
    ("logit_bias.5", {"5": 101}, "from -100 to 100"),
    ("logit_bias.5", {"5": "1"}, "a number"),
]
PLAIN_ONLY = [
    ("prompt", 5, "a text, a list"),
    ("prompt", [], "a text, a list"),
    ("prompt", {"a": 1}, "a text, a list"),
    ("prompt", ["a"] * 17, "at most 16"),
    ("prompt[1]", ["a", 5], "a text or a list of token ids"),
    ("prompt[1]", [5, "a"], "a token id"),
    ("prompt[1]", [5, True], "a token id"),
    ("prompt[0]", [-1], "a token id"),
    ("prompt[0]", [[]], "a text or a list of token ids"),
    ("prompt[0][1]", [[1, 2.5]], "a token id"),
    ("echo", True, "not supported"),
    ("suffix", "end", "not supported"),
    ("logprobs", 6, "from 0 to 5"),
    ("logprobs", True, "a whole number"),
    ("best_of", 0, "from 1 to 8"),
    ("best_of", 9, "from 1 to 8"),
]


def _assert_refused(parse, body, param: str, words: str) -> None:
    with pytest.raises(ApiProblem) as caught:
        parse(body, CONFIG)
    problem = caught.value
    assert problem.status == 400
    assert problem.param == param
    assert param in problem.message
    assert words in problem.message
    assert problem.body()["error"]["type"] == "invalid_request_error"
    json.dumps(problem.body()).encode("ascii")


@pytest.mark.parametrize(("field", "value", "words"), BOTH)
def test_a_wrong_common_field_is_named_in_both_endpoints(field, value, words) -> None:
    _assert_refused(parse_chat, CHAT | {field: value}, field, words)
    _assert_refused(parse_completion, PLAIN | {field: value}, field, words)


@pytest.mark.parametrize(("param", "value", "words"), CHAT_ONLY)
def test_a_wrong_chat_field_is_named(param, value, words) -> None:
    field = param.partition("[")[0].partition(".")[0]
    if param == "messages[0]":
        value = [value]
    _assert_refused(parse_chat, CHAT | {field: value}, param, words)


@pytest.mark.parametrize(("param", "value", "words"), PLAIN_ONLY)
def test_a_wrong_completion_field_is_named(param, value, words) -> None:
    _assert_refused(parse_completion, PLAIN | {param.partition("[")[0]: value}, param, words)


FORMS = [
    ("text", "response_format", "an object"),
    ({"type": "yaml"}, "response_format.type", "one of"),
    ({"type": "json_schema"}, "response_format.json_schema.schema", "a JSON schema"),
    (
        {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}},
        "response_format.json_schema.schema",
        "can meet",
    ),
    ({"type": "regex", "pattern": "a("}, "response_format.pattern", "can meet"),
]


@pytest.mark.parametrize(("value", "param", "words"), FORMS)
def test_a_form_that_no_answer_can_meet_is_refused(value, param, words) -> None:
    _assert_refused(parse_chat, CHAT | {"response_format": value}, param, words)


def test_forms_are_read_and_must_end() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    described = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    options = parse_chat(CHAT | {"response_format": described}, CONFIG).options
    assert (options.form, json.loads(options.form_text)) == ("json_schema", schema)
    options = parse_completion(PLAIN | {"response_format": {"type": "json_object"}}, CONFIG).options
    assert (options.form, options.form_text) == ("json_object", "")
    options = parse_chat(CHAT | {"response_format": {"type": "regex", "pattern": "a+"}}, CONFIG).options
    assert (options.form, options.form_text) == ("regex", "a+")
    _assert_refused(
        parse_chat, CHAT | {"response_format": described, "ignore_eos": True}, "ignore_eos", "must end"
    )


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field) -> None:
    body = {name: value for name, value in CHAT.items() if name != field}
    with pytest.raises(ApiProblem, match=f"'{field}' is required") as caught:
        parse_chat(body, CONFIG)
    assert caught.value.code == "missing_required_parameter"


HARMLESS = {
    "metadata": {"a": "b"},
    "store": False,
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "something_new": [1],
    "n": 1,
    "logprobs": None,
    "stop": None,
    "temperature": None,
    "max_tokens": None,
    "stream_options": None,
}


@pytest.mark.parametrize("extra", [HARMLESS, {"tools": [], "tool_choice": "none", "modalities": ["text"]}])
def test_fields_that_change_nothing_are_accepted(extra) -> None:
    assert parse_chat(CHAT | extra, CONFIG) == parse_chat(CHAT, CONFIG)


def test_fields_of_plain_completions_that_change_nothing_are_accepted() -> None:
    extra = HARMLESS | {"echo": False, "suffix": None, "best_of": 1}
    assert parse_completion(PLAIN | extra, CONFIG) == parse_completion(PLAIN, CONFIG)


def test_weights_and_likelihoods_are_read() -> None:
    weights = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -100, "5": 1.5},
    }
    options = parse_chat(CHAT | weights | {"logprobs": True, "top_logprobs": 20}, CONFIG).options
    assert (options.min_p, options.repetition_penalty) == (0.1, 1.2)
    assert (options.presence_penalty, options.frequency_penalty) == (-1.0, 0.5)
    assert options.logit_bias == ((5, 1.5), (7, -100.0))
    assert options.logprobs == 20
    assert parse_chat(CHAT | {"logprobs": True}, CONFIG).options.logprobs == 0
    assert parse_chat(CHAT | {"logprobs": False}, CONFIG).options.logprobs is None
    assert parse_completion(PLAIN | {"logprobs": 0}, CONFIG).options.logprobs == 0
    assert parse_completion(PLAIN | {"n": 2, "best_of": 5}, CONFIG).options.best_of == 5
    assert parse_completion(PLAIN | {"n": 3}, CONFIG).options.best_of == 3


def test_more_answers_than_are_shown_cannot_be_streamed_nor_fewer_tried() -> None:
    for extra, words in (({"stream": True}, "streamed"), ({"n": 4}, "from 4 to 8")):
        with pytest.raises(ApiProblem, match=words) as caught:
            parse_completion(PLAIN | {"best_of": 3} | extra, CONFIG)
        assert caught.value.param == "best_of"


def test_messages_are_brought_into_the_form_templates_expect() -> None:
    messages = [
        {"role": "developer", "content": "be kind", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": ""},
    ]
    parsed = parse_chat(CHAT | {"messages": messages}, CONFIG)
    assert parsed.messages == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
    )


@pytest.mark.parametrize(
    ("given", "seen"), [(0, 0), (7, 7), (-1, (1 << 63) - 1), ((1 << 63) - 1, (1 << 63) - 1)]
)
def test_seeds_become_whole_numbers_of_63_bits(given, seen) -> None:
    assert parse_completion(PLAIN | {"seed": given}, CONFIG).options.seed == seen


def test_the_newer_name_of_max_tokens_wins() -> None:
    body = CHAT | {"max_tokens": 5, "max_completion_tokens": 9}
    assert parse_chat(body, CONFIG).options.max_tokens == 9


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'"x"', "must be a JSON object, got str"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "deeper than 32"),
        (b'{"a": ' + b"[" * 200_000, "deeper than 32"),
        (b'{"a": ' * 200_000, "deeper than 32"),
    ],
)
def test_a_body_that_is_no_reasonable_json_is_refused(body, words) -> None:
    with pytest.raises(ApiProblem, match=words) as caught:
        parse_json(body, 32)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_the_deepest_allowed_json_is_read() -> None:
    body = b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}"
    assert parse_json(body, 32).keys() == {"a"}


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(ApiProblem) as caught:
        parse_chat(CHAT | {"temperature": "x" * 10_000}, CONFIG)
    assert len(caught.value.message) < 200
