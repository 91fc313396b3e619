"""A node that computes fast and one that decodes fast answer together: one reads the prompt, the other answers."""

from __future__ import annotations

import itertools
import math
import re
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a mesh of daemons that are made slow

PIECE_S, STEP_S = 0.4, 0.1
LONG = "".join(f"value_{number} = {number * 7}\n" for number in range(100))
TOKENS = 40


@pytest.fixture(scope="module")
def unlike(tmp_path_factory, tools):
    """A gateway before one node with slow decode steps and one with slow prompts; each holds the whole model."""
    directory = tmp_path_factory.mktemp("unlike")
    directory.joinpath("shoal").mkdir()
    directory.joinpath("shoal", "config.toml").write_text("rebalance = 3600\n")
    cruncher, reader = (tools.Node(directory, name, "--memory", "20MiB") for name in ("cruncher", "reader"))
    slowed = [str(Path(__file__).with_name("slowed_daemon.py"))]
    for node, times in ((cruncher, (0.0, STEP_S)), (reader, (PIECE_S, 0.0))):
        node.program = slowed
        node.environment = {"PIECE_S": str(times[0]), "STEP_S": str(times[1])}
    mesh = tools.Mesh(tools.Node(directory, "gateway", "--no-serve"), cruncher, reader)
    try:
        assert mesh.nodes[0].add(copies=2)["state"] == "ready"
        mesh.until(lambda view: view["models"][0]["copies_min"] >= 2)
        yield mesh
    finally:
        mesh.end()


def splits(node):
    with urllib.request.urlopen(f"{node.api}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(
        float(v) for v in re.findall(r"^shoal_split_sessions_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    )


def test_a_split_request_is_quicker_than_either_node_and_says_the_same(unlike, alone, tools):
    gateway, cruncher, reader = unlike.nodes
    numbers = itertools.count()

    def took_s():
        prompt = f"# {next(numbers)}\n{LONG}"  # nothing of it is in any cache
        wanted = tools.complete(alone.api, prompt, max_tokens=TOKENS)
        before, began_s = splits(gateway), time.monotonic()
        assert tools.complete(gateway.api, prompt, max_tokens=TOKENS) == wanted
        seconds = time.monotonic() - began_s
        return seconds if splits(gateway) > before else math.inf

    # Whatever either node does alone costs at least this, by what it is held back.
    least_alone_s = min(6 * PIECE_S, TOKENS * STEP_S)
    tools.until(lambda: took_s() < least_alone_s, "a split request that is quicker than any whole one")
    with tools.stream(gateway.api, f"# last\n{LONG}", max_tokens=150) as chunks:
        next(chunks)
        (request,) = tools.until(gateway.view, "the view")["requests"]
        assert [stage["node"] for stage in request["prefill_chain"]] == [cruncher.peer]
        assert [stage["node"] for stage in request["chain"]] == [reader.peer]

    def freed():
        spans = [span for node in gateway.view()["nodes"] for span in node["spans"]]
        return spans and not any(span["sessions"] for span in spans)

    tools.until(freed, "no session is left")
