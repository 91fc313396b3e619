"""`shoal plan`: the file in, the scheduler's answer out, one line for every bad file; the same over a mesh."""

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


SPANS = [
    {"node": "P1", "name": "attic", "start": 0, "end": 5, "memory_bytes": 5 << 30, "fetch_bytes": 0, "serves": True},
    {"node": "P2#1", "name": "desk", "start": 5, "end": 8, "memory_bytes": 3 << 30, "fetch_bytes": 3 << 30,
     "serves": False},
]  # fmt: skip
FOUND = {
    "model": "m", "spans": SPANS, "moved": ["other"], "shortage": None, "planning_s": 0.01,
    "replicas": [{"stages": [{"node": s["node"], "start": s["start"], "end": s["end"]} for s in SPANS],
                  "ms_per_token": 41.3, "tokens_per_s": 30.0}],
}  # fmt: skip
SHORT = {
    "detail": "needs 9.0 GiB for weights and cache, the mesh offers 7.0 GiB: 2.0 GiB short",
    "needed_bytes": 9 << 30, "available_bytes": 7 << 30, "missing_bytes": 2 << 30, "layers_short": 2,
}  # fmt: skip


def test_a_model_of_the_mesh_is_planned_by_the_daemon(shoal, daemon):
    daemon.answers["/shoal/plan"] = (200, FOUND)
    outcome = shoal("plan", "m", "--copies", "2")
    assert daemon.seen == [("/shoal/plan", {"model": "m", "copies": 2})]
    header, *rows = outcome.out.splitlines()
    assert header.split() == ["NODE", "LAYERS", "MEMORY", "NOW"]
    assert rows[0].split()[0:2] == ["attic", "0-4"]
    assert "serves them" in rows[0]
    assert "device 1" in rows[1]
    assert "to fetch" in rows[1]
    assert "41.3 ms a token" in outcome.err
    assert "other" in outcome.err


def test_a_directory_is_told_to_the_daemon_by_its_whole_path(shoal, daemon, model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    daemon.answers["/shoal/plan"] = (200, FOUND)
    outcome = shoal("plan", model_dir.name, "--json")
    assert daemon.seen == [("/shoal/plan", {"model": str(model_dir), "copies": None})]
    assert json.loads(outcome.out) == FOUND


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_does_not_fit_is_a_failure_that_says_what_is_missing(shoal, daemon, flags):
    daemon.answers["/shoal/plan"] = (200, FOUND | {"spans": [], "replicas": [], "shortage": SHORT})
    outcome = shoal("plan", "m", *flags)
    assert outcome.status == 1
    assert "2.0 GiB short" in outcome.err
    assert not flags or json.loads(outcome.out)["shortage"] == SHORT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a model"),
        (["m", "--input", "x.json"], "either a model"),
        (["m", "--prefer", "latency"], "--prefer"),
        (["--input", "x.json", "--copies", "2"], "--copies"),
    ],
)
def test_flags_that_do_not_go_together_are_wrong_usage(shoal, arguments, words):
    outcome = shoal("plan", *arguments)
    assert outcome.status == 2
    assert words in outcome.err


def test_tags_are_shown_and_changed(shoal, daemon):
    daemon.answers["/shoal/tags"] = (200, {"tags": ["metered", "trusted"]})
    assert shoal("tags", "--add", "metered", "--remove", "owner-active").out == "metered trusted\n"
    assert daemon.seen == [("/shoal/tags", {"add": ["metered"], "remove": ["owner-active"]})]
    daemon.answers["/shoal/tags"] = (200, {"tags": []})
    assert shoal("tags").out == "no tags\n"
