"""`/v1/responses` in its basic form: text in, text out, whole or as events. Nothing is stored.

A request is read as the chat that it stands for; what of it would need tools, files or memory is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from node.api.answers import Told, Usage, dump
from node.api.config import ApiConfig
from node.api.fields import Fields
from node.api.problems import ApiProblem, invalid, unsupported
from node.api.requests import ChatRequest, parse_chat

PASSED = (
    "model",
    "temperature",
    "top_p",
    "stream",
    "user",
    "safety_identifier",
    "service_tier",
    "seed",
    "top_k",
    "stop",
)
REFUSED: dict[str, tuple[Any, str]] = {
    "tools": ([], "leave it out"),
    "previous_response_id": (None, "send the whole conversation as input"),
    "conversation": (None, "send the whole conversation as input"),
    "background": (False, "leave it out"),
    "prompt": (None, "send input"),
    "include": ([], "leave it out"),
}
TYPES = {"input_text": "text", "output_text": "text", "text": "text"}


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """`POST /v1/responses`: the chat that it stands for, and what the answer repeats."""

    chat: ChatRequest
    instructions: str | None
    metadata: dict[str, Any]


def parse_responses(body: dict[str, Any], config: ApiConfig) -> ResponsesRequest:
    """Read a request. Raises ApiProblem (400)."""
    fields = Fields(body)
    for name, (harmless, instead) in REFUSED.items():
        if fields.raw(name) not in (None, harmless):
            raise unsupported(name, body[name], instead)
    instructions = None if fields.raw("instructions") is None else fields.text("instructions")
    chat = {name: body[name] for name in PASSED if name in body}
    if fields.raw("max_output_tokens") is not None:
        chat["max_completion_tokens"] = fields.integer("max_output_tokens", None, 1, 1 << 30)
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    chat["messages"] = system + _messages(fields)
    form = _form(fields)
    if form is not None:
        chat["response_format"] = form
    metadata = fields.raw("metadata") or {}
    if not isinstance(metadata, dict):
        raise invalid("metadata", metadata, "an object")
    return ResponsesRequest(parse_chat(chat, config), instructions, metadata)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.require("input", "a text or a list of messages")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise invalid("input", given, "a text or a list of messages")
    return [_message(index, item) for index, item in enumerate(given)]


def _message(index: int, item: Any) -> dict[str, Any]:
    where = f"input[{index}]"
    if not isinstance(item, dict):
        raise invalid(where, item, "a message: an object with role and content")
    if item.get("type", "message") != "message":
        raise unsupported(f"{where}.type", item["type"], 'only items of type "message" are')
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(f"{where}.content[{at}]", part) for at, part in enumerate(content)]
    return {"role": item.get("role", "user"), "content": content}


def _part(where: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid(where, part, 'an object such as {"type": "input_text", "text": "..."}')
    if part["type"] not in TYPES:
        raise unsupported(f"{where}.type", part["type"], 'only parts of type "input_text" are')
    return {"type": "text", "text": part.get("text")}


def _form(fields: Fields) -> dict[str, Any] | None:
    """`text.format` as chat's `response_format`: a schema lies one level higher there."""
    text = fields.raw("text")
    if text is None:
        return None
    if not isinstance(text, dict):
        raise invalid("text", text, "an object")
    form = text.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return form if form is None or isinstance(form, dict) else {"type": form}


@dataclass(slots=True)
class ResponsesAnswer:
    """The documents of one answer. A streamed one counts its events and gathers its text, which later events repeat."""

    id: str
    created_s: int
    model: str
    asked: ResponsesRequest
    _events: int = 0
    _text: list[str] = field(default_factory=list)
    _finish: str | None = None

    def whole(self, told: Sequence[Told], usage: Usage) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        return self._response(told[0].text, told[0].finish, usage)

    def begin(self, _: Sequence[int]) -> bytes:
        """What a stream starts with: the response, its one message, and that message's one part."""
        empty = self._response("", None, None)
        return b"".join(
            (
                self._event("response.created", {"response": empty}),
                self._event("response.in_progress", {"response": empty}),
                self._event(
                    "response.output_item.added", {"output_index": 0, "item": self._message(None, None)}
                ),
                self._event("response.content_part.added", self._place() | {"part": _text_part("")}),
            )
        )

    def say(self, _: int, told: Told) -> bytes:
        """A piece of text."""
        self._finish = told.finish or self._finish
        if not told.text:
            return b""
        self._text.append(told.text)
        return self._event("response.output_text.delta", self._place() | {"delta": told.text, "logprobs": []})

    def end(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        text = "".join(self._text)
        whole = self._response(text, self._finish, usage)
        name = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return b"".join(
            (
                self._event("response.output_text.done", self._place() | {"text": text, "logprobs": []}),
                self._event("response.content_part.done", self._place() | {"part": _text_part(text)}),
                self._event(
                    "response.output_item.done",
                    {"output_index": 0, "item": self._message(text, self._finish)},
                ),
                self._event(name, {"response": whole}),
            )
        )

    def fail(self, problem: ApiProblem) -> bytes:
        """The event of a stream that could not go on."""
        error = problem.body()["error"]
        return self._event("error", {name: error.get(name) for name in ("code", "message", "param")})

    def _event(self, name: str, content: dict[str, Any]) -> bytes:
        document = {"type": name, "sequence_number": self._events, **content}
        self._events += 1
        return b"event: " + name.encode() + b"\ndata: " + dump(document) + b"\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id(), "output_index": 0, "content_index": 0}

    def _item_id(self) -> str:
        return "msg_" + self.id.removeprefix("resp_")

    def _message(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """The one message of the answer; without text it is only beginning."""
        status = "in_progress" if text is None else _status(finish)
        content = [] if text is None else [_text_part(text)]
        return {
            "id": self._item_id(),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(self, text: str, finish: str | None, usage: Usage | None) -> dict[str, Any]:
        """The response as it is now; without `usage` it is only beginning."""
        options = self.asked.chat.options
        status = "in_progress" if usage is None else _status(finish)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.asked.instructions,
            "max_output_tokens": options.max_tokens,
            "metadata": self.asked.metadata,
            "model": self.model,
            "output": [] if usage is None else [self._message(text, finish)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": options.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": options.user,
        }


def _status(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
