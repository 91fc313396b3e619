"""Meshes of real `shoal up` processes on loopback, and the few requests the tests make to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NODE_MEMORY = "6MiB"
WAIT_S = 90.0
POLL_S = 0.03
ROOT = Path(__file__).resolve().parents[2]


def pause() -> None:
    """Leave the processor to the daemons for a moment; every use is a poll with a deadline."""
    threading.Event().wait(POLL_S)


def until(condition: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    """Poll until `condition()` is true, and return it; an HTTP or connection error counts as not yet."""
    end_s = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError):
            found = condition()
            if found:
                return found
        if time.monotonic() > end_s:
            pytest.fail(f"not within {wait_s:g} s: {what}")
        pause()


def shoal(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "shoal", *map(str, arguments)]


def environment(directory: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    return kept | {
        "XDG_CONFIG_HOME": str(directory),
        "XDG_DATA_HOME": str(directory),
        "PYTHONPATH": str(ROOT),
        "SHOAL_MEND_WAIT": "3",
    }


class Node:
    """One daemon: its process, its directory, its log. It may be started again with the same directory."""

    def __init__(self, directory: Path, name: str, *flags: object) -> None:
        self.name, self.flags = name, flags
        self.program, self.environment = ["-m", "shoal"], dict[str, str]()
        self.directory = directory
        self.data_dir = directory / name
        self.log_path = directory / f"{name}.log"
        self.child: subprocess.Popen[bytes] | None = None
        self.api = self.peer = ""
        self._log_from = 0

    def start(self, *more: object) -> Node:
        flags = [*self.flags, *more]
        if "--model" not in flags:
            flags += ["--model", "none"]
        command = [sys.executable, *self.program, "up", "--data-dir", str(self.data_dir), "--name", self.name]
        command += [
            "--api",
            "127.0.0.1:0",
            "--listen",
            "/ip4/127.0.0.1/tcp/0",
            "--threads",
            "1",
            "--log-level",
            "info",
            *map(str, flags),
        ]
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.child = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=environment(self.directory) | self.environment, cwd=self.directory,
            )  # fmt: skip
        return self

    def ready(self, wait_s: float = WAIT_S) -> Node:
        """Wait for the line `ready api=... peer=...`."""
        line = until(self._ready_line, f"{self.name} ready; its log: {self.log()[-2000:]}", wait_s)
        self.api, self.peer = (word.partition("=")[2] for word in line.split()[1:3])
        return self

    def _ready_line(self) -> str | None:
        assert self.running(), f"{self.name} ended: {self.log()[-3000:]}"
        return next((line for line in self.log().splitlines() if line.startswith("ready api=")), None)

    def log(self) -> str:
        """What it wrote since its last start."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_from)
            return file.read().decode(errors="replace")

    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def signal(self, number: int) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    def wait(self, wait_s: float) -> int:
        assert self.child is not None
        return self.child.wait(timeout=wait_s)

    def end(self) -> None:
        """At once, whatever state it is in."""
        if self.running():
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    def view(self) -> dict[str, Any]:
        return get(self.api + "/mesh")

    def memory_bytes(self) -> int:
        """Resident."""
        import psutil

        return psutil.Process(self.child.pid).memory_info().rss

    def invite(self) -> str:
        return post(self.api + "/shoal/invite", {"ttl_s": 3600.0})[1]["invite"]

    def add(self, directory: object = "embedded", name: str = "embedded", copies: int = 1) -> dict[str, Any]:
        """Order a model in; the last progress line that was not `done`."""
        last: dict[str, Any] = {}
        for line in lines(
            self.api + "/shoal/models", {"directory": str(directory), "name": name, "copies": copies}
        ):
            last = last if line.get("done") else line
        return last


class Mesh:
    """Daemons that have met."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)
        nodes[0].start().ready()
        invite = nodes[0].invite() if len(nodes) > 1 else ""
        for node in nodes[1:]:
            node.start("--join", invite)
        for node in nodes[1:]:
            node.ready()
        self.met()

    @property
    def apis(self) -> list[str]:
        return [node.api for node in self.nodes]

    def met(self) -> None:
        """Every node knows and is connected to every other."""
        peers = {node.peer for node in self.nodes}
        for node in self.nodes:
            until(
                lambda node=node: peers == {n["peer"] for n in node.view()["nodes"] if n["connected"]},
                f"{node.name} has not met all",
            )

    def of(self, peer: str) -> Node:
        return next(node for node in self.nodes if node.peer == peer)

    def until(
        self, condition: Callable[[dict[str, Any]], Any], index: int = 0, wait_s: float = WAIT_S
    ) -> Any:
        """Poll a node's view until `condition` holds; the view."""
        last: dict[str, Any] = {}

        def check() -> Any:
            nonlocal last
            last = self.nodes[index].view()
            return condition(last)

        try:
            until(check, "the view", wait_s)
        except pytest.fail.Exception:
            pytest.fail(f"not within {wait_s} s: {json.dumps(last, indent=1)[:6000]}")
        return last

    def spans(self, index: int = 0) -> dict[str, tuple[int, int]]:
        """Ready span of each peer."""
        return {
            node["peer"]: (span["start"], span["end"])
            for node in self.nodes[index].view()["nodes"]
            for span in node["spans"]
            if span["state"] == "ready"
        }

    def heal(self) -> None:
        """Whoever was stopped or killed is back from its own memory, and all is served, in every view."""
        for node in self.nodes:
            if node.running():
                node.signal(signal.SIGCONT)
            else:
                node.end()
                node.start()
        for node in self.nodes:
            node.ready()
        self.met()
        for index in range(len(self.nodes)):
            self.until(lambda view: view["models"] and all(m["ready"] for m in view["models"]), index)
            self.until(lambda view: not any(n["suspect"] for n in view["nodes"]), index)

    def end(self) -> None:
        for node in self.nodes:
            node.end()


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def post(url: str, body: Any, timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
    """(status, document), whatever the status. A body of bytes is sent as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def lines(url: str, body: dict[str, Any], timeout_s: float = 90) -> Iterator[dict[str, Any]]:
    """An NDJSON answer, one document a line; a refusal is one document with `error`."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            for line in answer:
                yield json.loads(line)
    except urllib.error.HTTPError as refused:
        with refused:
            yield json.load(refused)


def _body(prompt: str, more: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "embedded", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    return body | more


def ask(api: str, prompt: str, **more: Any) -> tuple[int, dict[str, Any]]:
    """Status and document of a completion."""
    return post(f"{api}/v1/completions", _body(prompt, more))


def complete(api: str, prompt: str, **more: Any) -> str:
    """Text of `max_tokens` tokens, greedy unless told otherwise."""
    status, document = ask(api, prompt, **more)
    assert status == 200, document
    return document["choices"][0]["text"]


@contextlib.contextmanager
def stream(api: str, prompt: str, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a streamed completion; leaving the block closes the connection."""
    body = json.dumps(_body(prompt, more | {"stream": True})).encode()
    request = urllib.request.Request(f"{api}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield _chunks(answer)


def _chunks(answer: Any) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    """Four capped nodes that together, and only together, serve the embedded model."""
    directory = tmp_path_factory.mktemp("four")
    mesh = Mesh(*(Node(directory, f"node-{i}", "--memory", NODE_MEMORY) for i in range(1, 5)))
    try:
        assert mesh.nodes[0].add()["state"] == "ready"
        yield mesh
    finally:
        mesh.end()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """One node that serves the embedded model by itself, ready when it says so."""
    node = Node(tmp_path_factory.mktemp("alone"), "alone", "--model", "embedded").start()
    try:
        yield node.ready()
    finally:
        node.end()


@pytest.fixture(scope="session")
def tools():
    """The helpers of this file, for tests that cannot import it."""
    return SimpleNamespace(
        Mesh=Mesh, Node=Node, ask=ask, complete=complete, environment=environment, get=get, lines=lines, post=post,
        shoal=shoal, stream=stream, until=until,
    )  # fmt: skip
