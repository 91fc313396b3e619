"""`shoal run`: a prompt to a model of the mesh, its text as it comes, and how fast it came.

It speaks the OpenAI endpoints like any other client, and computes its figures from what it saw: TTFT from
sending to the first text, tokens/s over the tokens after the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shoal import terminal
from shoal.daemon_client import DaemonClient, connect
from shoal.errors import CommandFailed, DaemonRefused, ShoalError, UsageProblem

PROMPT_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class Figures:
    """What a stream showed. Times in seconds since the request was sent; None until known."""

    ttft_s: float | None = None
    last_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token."""
        if (
            self.ttft_s is None
            or self.last_s is None
            or self.last_s <= self.ttft_s
            or self.completion_tokens < 2
        ):
            return None
        return (self.completion_tokens - 1) / (self.last_s - self.ttft_s)

    def line(self) -> str:
        """`43 tokens, first after 87 ms, 31.2 tokens/s`."""
        parts = ["1 token" if self.completion_tokens == 1 else f"{self.completion_tokens} tokens"]
        if self.ttft_s is not None:
            parts.append(f"first after {terminal.duration(self.ttft_s)}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        return ", ".join(parts)


def run(options: argparse.Namespace) -> int:
    """Stream the answer to stdout."""
    prompt = read_prompt(options.prompt)
    client = connect(options.api, options.data_dir)
    figures = Figures()
    path, body = request_of(options, prompt)
    text = ""
    to_person = terminal.is_terminal(sys.stdout)
    try:
        for piece in generate(client, path, body, figures):
            text += piece
            if not options.json:
                sys.stdout.write(terminal.safe_for_terminal(piece) if to_person else piece)
                sys.stdout.flush()
    except (ShoalError, KeyboardInterrupt) as problem:
        if to_person and text and not text.endswith("\n"):
            print(flush=True)  # what is said next must not stand behind half a sentence
        if isinstance(problem, DaemonRefused) and problem.code == "model_not_found":
            raise CommandFailed(
                f"{problem}; see: {terminal.program()} models{terminal.aim(options)}"
            ) from None
        raise
    if options.json:
        print(json.dumps({"text": text, **summary(figures)}))
        return 0
    if not text.endswith("\n"):
        print(flush=True)
    if options.stats or terminal.is_terminal(sys.stderr):
        terminal.console(stderr=True).print(figures.line(), style="dim")
    return 0


def summary(figures: Figures) -> dict[str, Any]:
    """The figures, JSON-able."""
    return {
        "finish_reason": figures.finish_reason,
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "ttft_s": figures.ttft_s,
        "tokens_per_s": figures.tokens_per_s,
    }


def read_prompt(given: str) -> str:
    """The prompt, from stdin for `-`."""
    if given == "-":
        given = sys.stdin.read(PROMPT_BYTES_MAX + 1)
        if len(given) > PROMPT_BYTES_MAX:
            raise UsageProblem(f"the prompt on stdin is longer than {PROMPT_BYTES_MAX >> 20} MiB")
    if not given:
        raise UsageProblem("the prompt is empty")
    return given


def request_of(options: argparse.Namespace, prompt: str) -> tuple[str, dict[str, Any]]:
    """Endpoint and body of the request."""
    body: dict[str, Any] = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for name in ("temperature", "top_p", "seed"):
        if getattr(options, name) is not None:
            body[name] = getattr(options, name)
    if options.chat:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", body | {"prompt": prompt}


def generate(
    client: DaemonClient,
    path: str,
    body: Mapping[str, Any],
    figures: Figures,
    clock_s: Callable[[], float] = time.perf_counter,
) -> Iterator[str]:
    """Yield the text of a streamed completion, and keep `figures` while it comes. Raises ShoalError."""
    start_s = clock_s()
    chunks = 0
    for event in client.events(path, body):
        usage = event.get("usage")
        if isinstance(usage, dict):
            figures.prompt_tokens = usage.get("prompt_tokens")
            figures.completion_tokens = usage.get("completion_tokens") or chunks
        piece, finish = _piece(event)
        figures.finish_reason = finish or figures.finish_reason
        if piece:
            chunks += 1
            figures.completion_tokens = max(figures.completion_tokens, chunks)
            figures.last_s = clock_s() - start_s
            figures.ttft_s = figures.last_s if figures.ttft_s is None else figures.ttft_s
            yield piece


def _piece(event: Mapping[str, Any]) -> tuple[str, str | None]:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", None
    choice = choices[0]
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    finish = choice.get("finish_reason")
    return text if isinstance(text, str) else "", finish if isinstance(finish, str) else None
