"""A mesh of real daemons: layers spread, text flows, faults are told, everything is given back."""

from __future__ import annotations

import os
import signal
import time

import pytest

PROMPTS = ["def read_file(path):\n", "import os\n\nclass Thread:\n    def __init__(self", "for", "    return " * 60]


def test_the_layers_spread_over_all_nodes_and_none_holds_the_model(four):
    spans = four.spans()
    assert len(spans) == 4
    assert sorted(layer for start, end in spans.values() for layer in range(start, end)) == list(range(8))


def test_each_node_pulls_only_the_bytes_of_its_own_layers(four):
    nodes = {node["peer"]: node["spans"][0] for node in four.view()["nodes"]}
    total = sum(span["bytes_wanted"] for span in nodes.values())
    for peer, span in nodes.items():
        if four.index_of(peer) != 0:
            assert 0 < span["bytes_wanted"] < total / 2
            held = sum(f.stat().st_blocks * 512 for f in blobs_of(four, peer) if f.suffix == ".safetensors")
            assert held <= span["bytes_wanted"] + 256 * 1024


def blobs_of(mesh, peer):
    from pathlib import Path

    return list((Path(mesh.testnet.nodes[mesh.index_of(peer)].data_dir) / "blobs").rglob("*"))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_of_four_processes_is_that_of_one(four, alone, requests, prompt):
    expected = requests.complete(alone.apis[0], prompt)
    assert expected
    assert [requests.complete(api, prompt) for api in four.apis] == [expected] * 4


def test_seeded_sampling_of_four_processes_is_that_of_one(four, alone, requests):
    wish = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7}
    expected = requests.complete(alone.apis[0], PROMPTS[0], **wish)
    assert requests.complete(four.apis[2], PROMPTS[0], **wish) == expected
    assert requests.complete(four.apis[1], PROMPTS[0], **(wish | {"seed": 8})) != expected


def test_a_node_without_the_first_layer_streams_the_same_text(four, requests):
    spans = four.spans()
    gateway = next(four.index_of(peer) for peer, (start, _) in spans.items() if start != 0)
    with requests.stream(four.apis[gateway], PROMPTS[0]) as chunks:
        pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert len(pieces) > 10
    assert "".join(pieces) == requests.complete(four.apis[gateway], PROMPTS[0])


def test_many_requests_at_once_all_get_their_own_text(four, requests):
    from concurrent.futures import ThreadPoolExecutor

    expected = {prompt: requests.complete(four.apis[0], prompt) for prompt in PROMPTS}
    jobs = [(four.apis[i % 4], PROMPTS[i % len(PROMPTS)]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda job: requests.complete(*job), jobs))
    assert texts == [expected[prompt] for _, prompt in jobs]


def test_a_client_that_leaves_frees_its_room_on_every_stage(four, requests):
    def rooms(view):
        return {n["peer"]: n["spans"][0]["kv_tokens_free"] for n in view["nodes"]}

    quiet = four.until(lambda view: all(s["sessions"] == 0 for n in view["nodes"] for s in n["spans"]))
    with requests.stream(four.apis[3], PROMPTS[0], max_tokens=900) as chunks:
        next(chunks)
        four.until(lambda view: all(n["spans"][0]["sessions"] == 1 for n in view["nodes"]), wait_s=10)
    four.until(lambda view: all(n["spans"][0]["sessions"] == 0 for n in view["nodes"]), wait_s=10)
    four.until(lambda view: rooms(view) == rooms(quiet), wait_s=10)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "model_not_found"),
        ({"model": "embedded", "prompt": "x " * 4000, "max_tokens": 5}, 400, "context_length_exceeded"),
        ({"model": "embedded", "prompt": 7}, 400, None),
        ({"model": "embedded", "prompt": "x", "temperature": "hot"}, 400, None),
    ],
)
def test_what_cannot_be_answered_is_refused_in_the_openai_shape(four, requests, body, status, code):
    got, document = requests.post(f"{four.apis[1]}/v1/completions", body)
    assert got == status
    assert set(document["error"]) >= {"message", "type", "param", "code"}
    assert code is None or document["error"]["code"] == code


@pytest.fixture
def doubled(tmp_path, requests):
    """Four nodes with two copies of each layer."""
    with requests.mesh_of(tmp_path, 4, 16 << 20) as mesh:
        mesh.add(copies=2)
        mesh.until(lambda view: view["models"][0]["copies_min"] >= 2)
        yield mesh


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_vanishes_mid_request_is_told_within_five_seconds_and_the_next_works(doubled, requests, how):
    expected = requests.complete(doubled.apis[0], PROMPTS[0])
    with requests.stream(doubled.apis[0], PROMPTS[0], max_tokens=1000) as chunks:
        next(chunks)
        chain = doubled.until(lambda view: bool(view["requests"]))["requests"][0]["chain"]
        victim = next(doubled.index_of(s["node"]) for s in chain if doubled.index_of(s["node"]) != 0)
        os.kill(doubled.testnet.nodes[victim].pid, how)
        began_s = time.monotonic()
        try:
            last = {}
            for chunk in chunks:
                last = chunk
            assert time.monotonic() - began_s < 5.0
            assert "error" in last, last
            assert last["error"]["message"]
        finally:
            if how == signal.SIGSTOP:
                os.kill(doubled.testnet.nodes[victim].pid, signal.SIGCONT)
    assert requests.complete(doubled.apis[0], PROMPTS[0]) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_clean_stop_leaves_every_view_within_three_seconds(tmp_path, requests, number):
    with requests.mesh_of(tmp_path, 2, None) as mesh:
        mesh.add()
        leaving = mesh.testnet.nodes[1]
        began_s = time.monotonic()
        os.kill(leaving.pid, number)
        child = mesh.testnet._children[leaving.name]
        assert child.wait(timeout=3.0) == 0
        while any(node["peer"] == leaving.peer for node in mesh.view()["nodes"]):
            assert time.monotonic() - began_s < 3.0
        log = open(leaving.log).read()
        assert "Traceback" not in log
        assert "leaving now" not in log
        child.returncode = None
        mesh.testnet.nodes = mesh.testnet.nodes[:1]
        mesh.testnet._children.pop(leaving.name)
