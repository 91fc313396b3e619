"""Meshes of real processes on loopback, and the few requests the tests make to them."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testnet.launch import LaunchOptions, Testnet

NODE_MEMORY_BYTES = 6 << 20
WAIT_S = 90.0


class Mesh:
    """A running testnet, by its HTTP addresses."""

    def __init__(self, testnet: Testnet) -> None:
        self.testnet = testnet
        self.apis = [node.api for node in testnet.nodes]

    def view(self, index: int = 0) -> dict[str, Any]:
        return get(self.apis[index] + "/mesh")

    def add(self, *, copies: int = 1, name: str = "embedded", directory: str = "embedded") -> None:
        client = self.testnet.client(0)
        for event in client.ndjson("/shoal/models", {"directory": directory, "name": name, "copies": copies}):
            last = event
        assert last.get("state") == "ready", last

    def until(self, condition: Callable[[dict[str, Any]], bool], index: int = 0, wait_s: float = WAIT_S) -> Any:
        """Poll a node's view until `condition` holds; the view."""
        end_s = time.monotonic() + wait_s
        while True:
            view = self.view(index)
            if condition(view):
                return view
            if time.monotonic() > end_s:
                pytest.fail(f"not within {wait_s} s: {json.dumps(view, indent=1)[:4000]}")
            self.testnet.pause(0.02)

    def spans(self, index: int = 0) -> dict[str, tuple[int, int]]:
        """Ready span of each peer."""
        return {
            node["peer"]: (span["start"], span["end"])
            for node in self.view(index)["nodes"]
            for span in node["spans"]
            if span["state"] == "ready"
        }

    def index_of(self, peer: str) -> int:
        return next(i for i, node in enumerate(self.testnet.nodes) if node.peer == peer)


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def post(url: str, body: dict[str, Any], timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
    """(status, document), whatever the status."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def complete(api: str, prompt: str, **more: Any) -> str:
    """Greedy text of `max_tokens` tokens."""
    body = {"model": "embedded", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, **more}
    status, document = post(f"{api}/v1/completions", body)
    assert status == 200, document
    return document["choices"][0]["text"]


@contextlib.contextmanager
def stream(api: str, prompt: str, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a streamed completion; leaving the block closes the connection."""
    body = {"model": "embedded", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    body.update(stream=True, **more)
    url = f"{api}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield _chunks(answer)


def _chunks(answer: Any) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


@contextlib.contextmanager
def mesh_of(directory, nodes: int, memory_bytes: int | None = NODE_MEMORY_BYTES) -> Iterator[Mesh]:
    """`nodes` processes that have met; they end with the block."""
    options = LaunchOptions(directory, nodes=nodes, node_memory_bytes=memory_bytes, timeout_s=WAIT_S)
    with Testnet(options) as testnet:
        testnet.form()
        yield Mesh(testnet)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four capped nodes that together serve the embedded model."""
    with mesh_of(tmp_path_factory.mktemp("four"), 4) as mesh:
        mesh.add()
        yield mesh


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One node that serves the embedded model by itself."""
    with mesh_of(tmp_path_factory.mktemp("alone"), 1, None) as mesh:
        mesh.add()
        yield mesh


@pytest.fixture
def requests():
    """The helpers of this file, for tests that cannot import it."""
    return type("Requests", (), {"get": get, "post": post, "complete": complete, "stream": stream, "mesh_of": mesh_of})
