"""What a client may ask: the bodies of the two OpenAI endpoints as frozen dataclasses.

Parsing is strict about types and ranges. OpenAI fields that change nothing here are accepted; fields that
would change the answer and are not supported are refused, so that nobody gets silently less than asked for.
No model is known yet: lengths against a context are checked later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from model_shards import GrammarError, check_form
from node.api.config import ApiConfig
from node.api.fields import Fields
from node.api.problems import invalid, unsupported
from node.api.tools import NO_TOOLS, Tools, parse_tools, said_calls

TOKENS_MAX = 1 << 24
SEED_BITS = 63
MODEL_CHARS_MAX = 256
USER_CHARS_MAX = 512
NAME_CHARS_MAX = 256
FORM_CHARS_MAX = 1 << 16
LOGIT_BIASES_MAX = 1024
CHAT_LOGPROBS_MAX = 20
PLAIN_LOGPROBS_MAX = 5
SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Options:
    """What both endpoints share. `max_tokens` None: what the context leaves. `seed` None: choose one. `logprobs`: how
    many likeliest tokens to tell beside each, None where no log-probabilities are asked for. Of `best_of` answers to a
    prompt the `choices` likeliest are given. `made`: the first tokens of an answer which another gateway began."""

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stops: tuple[str, ...]
    choices: int
    ignore_eos: bool
    stream: bool
    include_usage: bool
    user: str | None = None
    service_tier: str | None = None
    form: str = ""
    form_text: str = ""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    best_of: int = 1
    token_ids: bool = False
    made: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`POST /v1/chat/completions`. Messages are as chat templates expect them: `role`, `content`, and of tools
    `tool_calls`, `tool_call_id` and `name`."""

    options: Options
    messages: tuple[dict[str, Any], ...]
    tools: Tools = NO_TOOLS


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """`POST /v1/completions`. Each prompt is a text or a tuple of token ids."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]


def parse_chat(body: dict[str, Any], config: ApiConfig) -> ChatRequest:
    """Read a chat request. Raises ApiProblem (400)."""
    fields = Fields(body)
    options = _options(fields, config, _chat_logprobs(fields))
    _refuse_unless(fields, "functions", ([],), "leave it out")
    _refuse_unless(fields, "function_call", ("none", "auto"), "leave it out")
    _refuse_unless(fields, "modalities", (["text"],), "only text is produced")
    _refuse_unless(fields, "audio", (), "only text is produced")
    messages = tuple(_message(message) for message in fields.objects("messages", config.messages_max))
    tools = parse_tools(fields)
    if tools.offered and options.made:
        raise invalid("continue_token_ids", len(options.made), "no tools beside it")
    if tools.schema:
        if options.form:
            raise invalid("tool_choice", fields.raw("tool_choice"), "no response_format beside it")
        options = replace(options, form="json_schema", form_text=tools.schema)
        _check_form("tools", options.form, options.form_text)
    return ChatRequest(options, messages, tools)


def parse_completion(body: dict[str, Any], config: ApiConfig) -> CompletionRequest:
    """Read a plain completion request. Raises ApiProblem (400)."""
    fields = Fields(body)
    options = _options(fields, config, fields.integer("logprobs", None, 0, PLAIN_LOGPROBS_MAX))
    _refuse_unless(fields, "echo", (False,), "leave it out")
    _refuse_unless(fields, "suffix", ("",), "leave it out")
    best_of = fields.integer("best_of", options.choices, options.choices, config.choices_max)
    best_of = best_of or options.choices
    if options.made and best_of > 1:
        raise invalid("best_of", best_of, "1 where continue_token_ids says how the one answer began")
    if options.stream and best_of > options.choices:
        raise invalid("best_of", best_of, "the value of n where the answer is streamed")
    return CompletionRequest(
        replace(options, best_of=best_of), prompts_of(fields, "prompt", config.prompts_max)
    )


def _options(fields: Fields, config: ApiConfig, logprobs: int | None) -> Options:
    stream = fields.flag("stream", False)
    form, form_text = _form(fields)
    ignore_eos = fields.flag("ignore_eos", False)
    if form and ignore_eos:
        raise invalid("ignore_eos", True, "false where response_format asks for a form, which must end")
    top_k = fields.integer("top_k", 0, -1, TOKENS_MAX)
    choices = fields.integer("n", 1, 1, config.choices_max)
    return Options(
        model=fields.text("model", chars_max=MODEL_CHARS_MAX),
        max_tokens=_max_tokens(fields),
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=max(top_k or 0, 0),
        seed=_seed(fields),
        stops=_stops(fields, config),
        choices=choices or 1,
        ignore_eos=ignore_eos,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        user=user_of(fields),
        service_tier=fields.choice("service_tier", "", SERVICE_TIERS) or None,
        form=form,
        form_text=form_text,
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(fields),
        logprobs=logprobs,
        best_of=choices or 1,
        token_ids=fields.flag("return_token_ids", False),
        made=_made(fields, choices or 1),
    )


def _made(fields: Fields, choices: int) -> tuple[int, ...]:
    """`continue_token_ids`: the tokens of the answer that the client has already, from another gateway."""
    value = fields.raw("continue_token_ids")
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > TOKENS_MAX:
        raise invalid("continue_token_ids", value, "a list of token ids")
    if choices != 1:
        raise invalid("n", choices, "1 where continue_token_ids says how the one answer began")
    return _tokens("continue_token_ids", value)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", 0, 0, CHAT_LOGPROBS_MAX) or 0
    if top and not wanted:
        raise invalid("top_logprobs", top, "logprobs to be true beside it")
    return top if wanted else None


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    value = fields.raw("logit_bias")
    if value is None:
        return ()
    expected = f"an object of at most {LOGIT_BIASES_MAX} token ids, each with a number from -100 to 100"
    if not isinstance(value, dict) or len(value) > LOGIT_BIASES_MAX:
        raise invalid("logit_bias", value, expected)
    inner = Fields(value, "logit_bias.")
    found = {}
    for name in value:
        if not (name.isascii() and name.isdigit() and len(name) <= 9) or value[name] is None:
            raise invalid("logit_bias", {name: value[name]}, expected)
        found[int(name)] = inner.number(name, 0.0, -100.0, 100.0)
    return tuple(sorted(found.items()))


def _form(fields: Fields) -> tuple[str, str]:
    """What `response_format` asks for: OpenAI's forms, and {"type": "regex", "pattern": ...}."""
    given = fields.raw("response_format")
    if given is None:
        return "", ""
    if not isinstance(given, dict):
        raise invalid("response_format", given, "an object")
    inner = Fields(given, "response_format.")
    form = inner.choice("type", "", ("text", "json_object", "json_schema", "regex"))
    text, where = "", "response_format"
    if form in ("", "text"):
        return "", ""
    if form == "json_schema":
        described = inner.raw("json_schema")
        where = "response_format.json_schema.schema"
        if not isinstance(described, dict) or not isinstance(described.get("schema"), dict | bool):
            raise invalid(where, described, "a JSON schema")
        text = json.dumps(described["schema"])
    elif form == "regex":
        where = "response_format.pattern"
        text = inner.text("pattern", chars_max=FORM_CHARS_MAX)
    _check_form(where, form, text)
    return form, text


def _check_form(where: str, form: str, text: str) -> None:
    try:
        check_form(form, text)
    except GrammarError as problem:
        raise invalid(where, text[:100], f"a form that answers can meet ({problem})") from None


def _refuse_unless(fields: Fields, field: str, harmless: tuple[Any, ...], instead: str) -> None:
    value = fields.raw(field)
    if value is None:
        return
    for accepted in harmless:
        if value == accepted and isinstance(value, bool) == isinstance(accepted, bool):
            return
    raise unsupported(fields.name(field), value, instead)


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", None, 1, TOKENS_MAX)
    older = fields.integer("max_tokens", None, 1, TOKENS_MAX)
    return older if newer is None else newer


def _seed(fields: Fields) -> int | None:
    seed = fields.integer("seed", None, -(1 << 63), (1 << 63) - 1)
    return None if seed is None else seed % (1 << SEED_BITS)


def _include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.raw("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise invalid("stream_options", value, 'an object such as {"include_usage": true}')
    wanted = Fields(value, "stream_options.").flag("include_usage", False)
    if not stream:
        raise invalid("stream_options", value, "stream to be true beside it")
    return wanted


def user_of(fields: Fields) -> str | None:
    """Whom the client names as its user."""
    for name in ("user", "safety_identifier"):
        if fields.raw(name) is not None:
            return fields.text(name, chars_max=USER_CHARS_MAX) or None
    return None


def _stops(fields: Fields, config: ApiConfig) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    expected = f"a text or a list of at most {config.stops_max} texts, none of them empty"
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > config.stops_max:
        raise invalid("stop", value, expected)
    if not all(isinstance(item, str) and item for item in items):
        raise invalid("stop", value, expected)
    return tuple(fields.text("stop", item, config.stop_chars_max) for item in items)


def _message(fields: Fields) -> dict[str, Any]:
    fields.require("role", "one of " + ", ".join(ROLES))
    role = fields.choice("role", "", ROLES)
    _refuse_unless(fields, "function_call", (), "leave it out")
    content = fields.raw("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = _joined(fields, content)
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": fields.text("content", content),
    }
    if role == "assistant" and (calls := said_calls(fields)):
        message["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if role == "tool" and fields.raw(name) is not None:
            message[name] = fields.text(name, chars_max=NAME_CHARS_MAX)
    return message


def _joined(fields: Fields, parts: list[Any]) -> str:
    """The texts of a list of content parts."""
    texts = []
    for index, part in enumerate(parts):
        name = f"{fields.name('content')}[{index}]"
        if not isinstance(part, dict):
            raise invalid(name, part, 'an object such as {"type": "text", "text": "..."}')
        reader = Fields(part, f"{name}.")
        kind = reader.text("type")
        if kind != "text":
            raise unsupported(f"{name}.type", kind, 'only parts of type "text" are')
        texts.append(reader.text("text"))
    return "".join(texts)


def prompts_of(fields: Fields, field: str, count_max: int) -> tuple[str | tuple[int, ...], ...]:
    """The texts, or tuples of token ids, of a field which must be there: one or a list of them."""
    expected = f"a text, a list of token ids, or a list of at most {count_max} of either"
    value = fields.require(field, expected)
    if isinstance(value, str):
        return (fields.text(field, value),)
    if not isinstance(value, list) or not value:
        raise invalid(field, value, expected)
    if _is_token(value[0]):
        return (_tokens(field, value),)
    if len(value) > count_max:
        raise invalid(field, value, expected)
    prompts: list[str | tuple[int, ...]] = []
    for index, item in enumerate(value):
        name = f"{field}[{index}]"
        if isinstance(item, list) and item:
            prompts.append(_tokens(name, item))
        elif isinstance(item, str):
            prompts.append(fields.text(name, item))
        else:
            raise invalid(name, item, "a text or a list of token ids")
    return tuple(prompts)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(name: str, value: list[Any]) -> tuple[int, ...]:
    for index, item in enumerate(value):
        if not _is_token(item) or item < 0:
            raise invalid(f"{name}[{index}]", item, "a token id: a whole number of at least 0")
    return tuple(value)
