"""The bodies of requests, from the SDK's arguments. Sans I/O."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UsageProblem

SEED_BITS = 63
Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]
NOT_HERE = {
    "n": "ask several times instead",
    "best_of": "ask several times instead",
    "stream": "use stream_chat or stream",
    "stream_options": "leave it out",
    "logprobs": "use any OpenAI client for them",
    "top_logprobs": "use any OpenAI client for them",
    "tools": "use any OpenAI client for them",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer streams: where to and what, and the headers that go with it."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def chat_ask(model: str, messages: Messages, options: Mapping[str, Any]) -> Ask:
    """A chat; a text counts as the user's one message. Raises UsageProblem."""
    given = (
        [{"role": "user", "content": messages}] if isinstance(messages, str) else list(map(dict, messages))
    )
    if not given:
        raise UsageProblem("messages: there is none; at least one is needed")
    return _ask("/v1/chat/completions", model, {"messages": given}, options)


def text_ask(model: str, prompt: Prompt, options: Mapping[str, Any]) -> Ask:
    """A plain continuation of a text or of token ids. Raises UsageProblem."""
    given = prompt if isinstance(prompt, str) else list(prompt)
    if not given:
        raise UsageProblem("prompt: it is empty")
    return _ask("/v1/completions", model, {"prompt": given}, options)


def _ask(path: str, model: str, what: Mapping[str, Any], options: Mapping[str, Any]) -> Ask:
    """The body with what every stream of the SDK asks for, options that are None left out.

    A sampled answer without a seed gets one here, so that a second gateway can go on with the very same answer.
    """
    body = {"model": model, **what}
    headers = {}
    for name, value in options.items():
        if name in NOT_HERE and value is not None:
            raise UsageProblem(f"{name}: not in this call; {NOT_HERE[name]}")
        if name == "priority" and value is not None:
            headers["X-Shoal-Priority"] = str(value)
        elif value is not None:
            body[name] = value
    if body.get("temperature") != 0 and "seed" not in body:
        body["seed"] = secrets.randbits(SEED_BITS - 1)
    streaming = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    return Ask(path, body | streaming, headers)
