"""Streams over real daemons that are killed and stopped under them: four stages, two copies of each layer."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import threading
import time
import urllib.request

import pytest

PROMPT = "def read_file(path):\n"
STEPS = 64
SEEDED = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
NODE_MEMORY = "6MiB"


@pytest.fixture(scope="module")
def eight(tmp_path_factory, tools):
    """A gateway that hosts nothing before eight nodes, each able to hold a quarter of the model; two copies wanted."""
    directory = tmp_path_factory.mktemp("eight")
    nodes = [
        tools.Node(directory, f"n{number}", "--memory", NODE_MEMORY, "--layers", f"{2 * at}:{2 * at + 2}")
        for number, at in enumerate((*range(4), *range(4)))
    ]
    mesh = tools.Mesh(tools.Node(directory, "gateway", "--no-serve"), *nodes)
    try:
        mesh.nodes[0].add(copies=2)
        mesh.until(lambda view: view["models"] and view["models"][0]["copies_min"] >= 2)
        yield mesh
    finally:
        mesh.end()


@pytest.fixture(scope="module")
def expected(alone, tools):
    return {how: tools.complete(alone.api, PROMPT, max_tokens=STEPS, **more) for how, more in HOWS.items()}


HOWS = {"greedy": {}, "seeded": SEEDED}


def chain_of(mesh):
    return [stage["node"] for stage in mesh.nodes[0].view()["requests"][0]["chain"]]


def lose(mesh, tools, victim, step, how, **more):
    """The text of a stream whose stage number `victim` is hit at token `step`, and its longest pause in seconds."""
    texts, pauses, last_s = [], [], time.monotonic()
    with tools.stream(mesh.nodes[0].api, PROMPT, max_tokens=STEPS, **more) as chunks:
        for number, chunk in enumerate(chunks):
            assert "error" not in chunk, chunk
            now_s = time.monotonic()
            pauses.append(now_s - last_s)
            last_s = now_s
            texts.append(chunk["choices"][0]["text"])
            if number == step:
                mesh.of(chain_of(mesh)[victim]).signal(how)
    return "".join(texts), max(pauses[1:])


@pytest.mark.slow  # nine daemons: the same over a network in memory is tests/node/test_failover.py
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("victim", "kind"), [(0, "greedy"), (2, "seeded")])
def test_a_stream_goes_on_when_a_stage_is_killed_or_stopped(eight, tools, expected, how, victim, kind):
    eight.heal()
    text, _ = lose(eight, tools, victim, 9, how, **HOWS[kind])
    assert text == expected[kind]
    with urllib.request.urlopen(f"{eight.nodes[0].api}/metrics", timeout=30) as answer:
        told = answer.read().decode()
    assert "shoal_failovers_total{" in told
    assert "shoal_failover_stall_seconds_count{" in told


@pytest.mark.slow
def test_an_answer_in_one_piece_outlives_a_stage_too(eight, tools, expected):
    eight.heal()
    found = []
    api = eight.nodes[0].api
    asking = threading.Thread(target=lambda: found.append(tools.complete(api, PROMPT, max_tokens=STEPS)))
    asking.start()
    tools.until(lambda: [r for r in eight.nodes[0].view()["requests"] if r["tokens"] > 4], "some tokens", 20)
    eight.of(chain_of(eight)[1]).signal(signal.SIGKILL)
    asking.join(60)
    assert found == [expected["greedy"]]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", range(4))
def test_at_every_step_the_text_is_the_same(eight, tools, expected, how, victim, capsys):
    """`SHOAL_TEST_STEPS=FROM:TO` takes some of the steps only."""
    first, last = (int(part) for part in os.environ.get("SHOAL_TEST_STEPS", f"0:{STEPS - 1}").split(":"))
    stalls = []
    kinds = itertools.cycle(HOWS)
    for step in range(first, last):
        kind = next(kinds)
        eight.heal()
        text, stall_s = lose(eight, tools, victim, step, how, **HOWS[kind])
        assert text == expected[kind], (step, kind)
        stalls.append(stall_s)
    with capsys.disabled():
        median_s, worst_s = statistics.median(stalls), max(stalls)
        print(
            f"\n{how.name} of stage {victim}: {len(stalls)} stalls, median {median_s:.3f} s, worst {worst_s:.3f} s"
        )
