"""`shoal bench serve`: how fast a mesh that runs answers many clients at once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from shoal import terminal
from shoal.client import AsyncClient
from shoal.errors import CommandFailed, ShoalError
from shoal.load import Planned, Seen, figures, traced, uniform


def serve(options: argparse.Namespace) -> int:
    """Run it and print the figures."""
    found = trio.run(_measure, options)
    if options.json:
        print(json.dumps(found))
        return 0 if not found["failures"] else 1
    rows = [(name, _shown(value)) for name, value in found.items()]
    terminal.table(("figure", "seen"), rows, right=("seen",))
    if found["failures"]:
        raise CommandFailed(f"{found['failures']} of {found['requests']} requests failed")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items()) or "none"
    return str(value)


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    gateways = [options.api] if options.api else []
    async with AsyncClient(*gateways, silence_s=60.0) as client:
        models = {model.name: model for model in await client.models()}
        name = options.model or next((one for one, model in models.items() if model.ready), "")
        if name not in models or not models[name].ready:
            raise CommandFailed(
                f"the mesh does not serve {name or 'any model'} now; see: {terminal.program()} models"
            )
        context, cut = models[name].context_tokens, 0
        if options.trace:
            planned, cut = traced(Path(options.trace), options.requests, context, options.speed, options.seed)
        else:
            prompt = min(options.prompt_tokens, context - options.max_tokens)
            planned = uniform(options.requests, max(1, prompt), options.max_tokens, options.seed)
        began_s = time.monotonic()
        seen = await _play(client, name, planned, options.concurrency)
        told = {"model": name, "concurrency": options.concurrency}
        if options.trace:
            told |= {"trace": options.trace, "speed": options.speed, "cut_to_context": cut}
        return told | figures(seen, time.monotonic() - began_s)


async def _play(client: AsyncClient, model: str, planned: Sequence[Planned], concurrency: int) -> list[Seen]:
    """Send all; never more than `concurrency` at once, and none before its time."""
    seen: list[Seen] = []
    waiting = iter(planned)
    start_s = trio.current_time()

    async def one_client() -> None:
        for request in waiting:
            if request.at_s is not None:
                await trio.sleep_until(start_s + request.at_s)
            seen.append(await _one(client, model, request))

    async with trio.open_nursery() as nursery:
        for _ in range(min(concurrency, len(planned))):
            nursery.start_soon(one_client)
    return seen


async def _one(client: AsyncClient, model: str, request: Planned) -> Seen:
    began_s = time.monotonic()
    try:
        answer = await client.complete(
            model, request.prompt, max_tokens=request.new_tokens, temperature=0, ignore_eos=True
        )
    except ShoalError as problem:
        return Seen(None, time.monotonic() - began_s, 0, str(problem))
    return Seen(answer.ttft_s, answer.total_s, answer.completion_tokens)
