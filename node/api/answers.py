"""The JSON documents of the two OpenAI endpoints, whole and in chunks.

Pure: texts and counts in, dictionaries and SSE bytes out. The two endpoints differ only in names and
nesting; that difference is this file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from node.api.problems import ApiProblem
from node.api.tools import Call

Kind = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request: the prompts once each, the answers of all choices."""

    prompt_tokens: int
    completion_tokens: int

    def document(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Told:
    """A choice, or a piece of one: its text, why it ended (None: it goes on), its tokens' log-probabilities, and the
    tokens' ids where they were asked for, and calls of tools, of which `first_call` came before."""

    text: str
    finish: str | None
    logprobs: dict[str, Any] | None = None
    tokens: tuple[int, ...] | None = None
    calls: tuple[Call, ...] = ()
    first_call: int = 0

    def with_tokens(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice's document with the ids, by vLLM's name."""
        return choice if self.tokens is None else choice | {"token_ids": list(self.tokens)}


class Writing(Protocol):
    """How an endpoint says an answer: as one document, or as a stream's bytes from `begin` to `end` or `fail`."""

    def whole(self, told: Sequence[Told], usage: Usage) -> dict[str, Any]: ...
    def begin(self, indexes: Sequence[int]) -> bytes: ...
    def say(self, index: int, told: Told) -> bytes: ...
    def end(self, usage: Usage) -> bytes: ...
    def fail(self, problem: ApiProblem) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What all documents of one answer share."""

    kind: Kind
    id: str
    created_s: int
    model: str
    include_usage: bool = False
    service_tier: str | None = None

    def whole(self, told: Sequence[Told], usage: Usage) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = []
        for index, one in enumerate(told):
            choice: dict[str, Any] = {"index": index, "logprobs": one.logprobs, "finish_reason": one.finish}
            if self.kind == "chat":
                message: dict[str, Any] = {"role": "assistant", "content": one.text, "refusal": None}
                if one.calls:
                    called = [call.document() for call in one.calls]
                    message |= {"content": one.text or None, "tool_calls": called}
                choice["message"] = message
            else:
                choice["text"] = one.text
            choices.append(one.with_tokens(choice))
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._document(name, choices) | {"usage": usage.document()}

    def begin(self, indexes: Sequence[int]) -> bytes:
        """What a stream starts with."""
        return b"".join(sse(opening) for index in indexes if (opening := self.opening(index)))

    def say(self, index: int, told: Told) -> bytes:
        """A piece of a choice."""
        return b"".join(map(sse, self.piece(index, told)))

    def end(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        closing = self.closing(usage)
        return (sse(closing) if closing else b"") + DONE

    def fail(self, problem: ApiProblem) -> bytes:
        """The event of a stream that could not go on."""
        return sse(problem.body())

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice (chat only): it carries the role."""
        if self.kind != "chat":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, index: int, told: Told) -> list[dict[str, Any]]:
        """The chunks for a piece of text, its tokens and perhaps its end: none where there is nothing to say."""
        text, finish, logprobs = told.text, told.finish, told.logprobs
        if self.kind == "completion":
            content = told.with_tokens({"text": text})
            said = text or finish or told.tokens
            return [self._chunk(index, content, finish, logprobs)] if said else []
        chunks = []
        if text or told.tokens:
            content = told.with_tokens({"delta": {"content": text}})
            chunks.append(self._chunk(index, content, logprobs=logprobs))
        if told.calls:
            called = [call.document(at) for at, call in enumerate(told.calls, told.first_call)]
            chunks.append(self._chunk(index, {"delta": {"tool_calls": called}}))
        if finish:
            chunks.append(self._chunk(index, {"delta": {}}, finish))
        return chunks

    def closing(self, usage: Usage) -> dict[str, Any] | None:
        """The last chunk, without choices, where usage was asked for."""
        if not self.include_usage:
            return None
        return self._document(self._chunk_name(), []) | {"usage": usage.document()}

    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        document = self._document(self._chunk_name(), [choice])
        return document | {"usage": None} if self.include_usage else document

    def _document(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        document = {
            "id": self.id,
            "object": name,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }
        return document | {"service_tier": self.service_tier} if self.service_tier else document


def dump(document: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def sse(document: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(document) + b"\n\n"
