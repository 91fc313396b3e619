"""`shoal bench serve` against the node's own HTTP side."""

from __future__ import annotations

import json

import trio

from node.errors import StageLost
from shoal.cli import main

EOS = 256


def endless(request):
    return [65] * request.max_tokens


async def run(*arguments: str) -> int:
    return await trio.to_thread.run_sync(main, ["bench", "serve", "--json", *arguments])


async def test_the_figures_of_many_clients(make_gateway, serving, capsys) -> None:
    gateway = make_gateway(endless)
    async with serving(gateway) as site:
        wanted = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "20", "--max-tokens", "5")
        assert await run("--api", site.url, *wanted) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["requests"], found["failures"], found["tokens"]) == ("bytes", 6, 0, 30)
    assert found["ttft_ms"]["p50"] > 0
    assert {len(request.prompt) for request in gateway.requests} == {20}


async def test_a_trace_is_cut_to_the_context(make_gateway, serving, capsys, tmp_path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps({"timestamp": 5, "input_length": 500, "output_length": 8, "hash_ids": [1]}))
    gateway = make_gateway(endless)
    async with serving(gateway) as site:
        assert await run("--api", site.url, "--trace", str(trace)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cut_to_context"], found["tokens"]) == (1, 8)
    assert len(gateway.requests[0].prompt) == 120


async def test_failures_are_counted_and_end_with_status_1(make_gateway, serving, capsys) -> None:
    gateway = make_gateway(StageLostAlways())
    async with serving(gateway) as site:
        assert await run("--api", site.url, "--requests", "2") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failures"] == sum(found["failed_by"].values()) == 2


class StageLostAlways:
    def __call__(self, request):
        return [StageLost("node", "it died")]


async def test_a_model_that_is_not_served_is_named(make_gateway, serving, capsys) -> None:
    async with serving(make_gateway(endless)) as site:
        assert await run("--api", site.url, "--model", "org/absent") == 1
    assert "org/absent" in capsys.readouterr().err
