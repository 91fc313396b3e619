"""`shoal plan --input`: the file in, the scheduler's answer out, and one line for every bad file."""

from __future__ import annotations

import io
import json
import sys

import pytest

MODEL = {
    "layers": 8,
    "layer_bytes": 1 << 30,
    "embed_bytes": 1 << 28,
    "head_bytes": 1 << 28,
    "layer_flops_per_token": 1e9,
    "hidden_bytes": 8192,
    "kv_bytes_per_token_per_layer": 4096,
}


def node(name: str, memory_gib: float) -> dict[str, object]:
    return {"id": name, "tflops": 10, "memory_gib": memory_gib, "bandwidth_gbps": 100, "link_mbps": 100}


def document(*memory_gib: float) -> dict[str, object]:
    nodes = [node(f"n{index}", size) for index, size in enumerate(memory_gib)]
    return {"model": MODEL, "nodes": nodes, "context_tokens": 1024}


@pytest.fixture
def lab(tmp_path):
    def write(content) -> str:
        path = tmp_path / "lab.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def covered(replica) -> list[int]:
    return [layer for stage in replica["stages"] for layer in range(stage["start"], stage["end"])]


def test_json_is_the_contract(shoal, lab):
    outcome = shoal("plan", "--input", lab(document(8, 8, 8)), "--json")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert {"replicas", "unused", "planning_s"} <= set(found)
    for replica in found["replicas"]:
        assert covered(replica) == list(range(8))
        assert replica["ms_per_token"] > 0
        assert replica["tokens_per_s"] > 0


def test_a_person_gets_a_table(shoal, lab):
    outcome = shoal("plan", "--input", lab(document(8, 8, 0.1)))
    header, *rows = outcome.out.splitlines()
    assert header.split() == ["REPLICA", "MS/TOKEN", "TOKENS/S", "NODE", "LAYERS"]
    assert [row.split()[-2:] for row in rows] == [["n0", "0-3"], ["n1", "4-7"]]
    assert "unused: n2" in outcome.err


def test_what_is_preferred_reaches_the_scheduler(shoal, lab):
    file = lab(document(12, 12))
    quick = json.loads(shoal("plan", "--input", file, "--prefer", "latency", "--json").out)
    many = json.loads(shoal("plan", "--input", file, "--prefer", "throughput", "--json").out)
    assert quick["objective"] != many["objective"]


def test_stdin(shoal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(document(8, 8)).encode())))
    assert shoal("plan", "--input", "-").status == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no JSON object"),
        ({}, "nodes is None"),
        ({"model": MODEL | {"layers": -1}, "nodes": []}, "layers"),
        (document(1), "short"),
    ],
)
def test_a_bad_file_is_one_line(shoal, lab, content, words):
    outcome = shoal("plan", "--input", lab(content))
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("shoal: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err


def test_a_missing_file_is_one_line(shoal, tmp_path):
    outcome = shoal("plan", "--input", str(tmp_path / "none"))
    assert (outcome.status, outcome.err) == (
        1,
        f"shoal: {tmp_path}/none cannot be read: no such file or directory\n",
    )
