"""A daemon that follows the HTTP contract and computes nothing: for testing whatever talks to daemons.

It starts in a few hundredths of a second, in a thread (`FakeDaemon`) or as a process that takes the flags
of `shoal up` (`python -m testnet.fake_daemon up ...`). Several make one mesh: members tell the founder,
whose address is the invite. A model that is added becomes ready after it was looked at a few times, so that
no test needs a clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LAYERS = 8
LAYER_BYTES = 600_000
LOOKS_UNTIL_READY = 3
TEXT = "the sea is salt because rivers carry it there and only water leaves"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is no news; the standard library would print it on stderr, where the
        command under test prints. Anything else is a fault of this fake and is told."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeDaemon:
    """One fake node, serving in a thread while the `with` block lasts. The attributes may be changed by tests."""

    def __init__(self, name: str = "node-1", api: str = "127.0.0.1:0", memory_bytes: int = 4 << 20) -> None:
        host, _, port = api.rpartition(":")
        self.server = _Server((host, int(port)), _handler(self))
        self.server.daemon_threads = True
        self.api = f"http://{host}:{self.server.server_port}"
        self.name = name
        self.peer = f"12D3KooWFake{name}{self.server.server_port}"
        self.founder = ""
        self.nodes = [self.card(memory_bytes)]
        self.models: list[dict[str, Any]] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []  # every request: path and body
        self.answers: dict[str, tuple[int, Any]] = {}  # path -> (status, JSON) instead of the usual answer
        self.text = TEXT
        self.shortage = ""
        self.hold = threading.Event()  # set: a stream stops after its first piece, until the client leaves
        self.stopped = threading.Event()

    def __enter__(self) -> FakeDaemon:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def card(self, memory_bytes: int) -> dict[str, Any]:
        """This node as the founder lists it."""
        return {
            "peer": self.peer,
            "name": self.name,
            "api": self.api,
            "memory_bytes": memory_bytes,
            "spans": [],
        }

    def announce(self, data_dir: Path) -> None:
        """Leave the address where the command line looks for it."""
        data_dir.mkdir(parents=True, exist_ok=True)
        document = {"pid": os.getpid(), "api": self.api, "peer": self.peer}
        (data_dir / "daemon.json").write_text(json.dumps(document), encoding="utf-8")

    def join(self, invite: str) -> None:
        """Tell the founder of this node."""
        self.founder = "http://" + invite.removeprefix("shoal1-fake-")
        _post(self.founder + "/fake/hello", self.nodes[0])

    def add(self, name: str, copies: int) -> None:
        """Place a model evenly over the nodes."""
        self.models.append({"name": name, "layers": LAYERS, "copies_wanted": copies, "looks": 0})
        groups = max(1, len(self.nodes) // copies)
        for index, node in enumerate(self.nodes[: groups * copies]):
            group = index % groups
            start, end = group * LAYERS // groups, (group + 1) * LAYERS // groups
            node["spans"].append({"model": name, "start": start, "end": end})

    def mesh(self, *, me: str) -> dict[str, Any]:
        """The `/mesh` document as the node `me` sees it; each look brings models nearer to ready."""
        if self.founder:
            return _get(f"{self.founder}/fake/mesh/{me}")
        for model in self.models:
            model["looks"] += 1
        progress = {model["name"]: min(model["looks"] / LOOKS_UNTIL_READY, 1.0) for model in self.models}
        return {
            "mesh": "fa4e",
            "self": me,
            "nodes": [self._node(node, me, progress) for node in self.nodes],
            "models": [self._model(model, progress[model["name"]] == 1.0) for model in self.models],
        }

    def _node(self, node: dict[str, Any], me: str, progress: dict[str, float]) -> dict[str, Any]:
        spans = []
        for span in node["spans"]:
            done = progress[span["model"]]
            fetched = 0 if node is self.nodes[0] else int((span["end"] - span["start"]) * LAYER_BYTES * done)
            state = "ready" if done == 1.0 else "loading"
            spans.append({**span, "state": state, "progress": done, "bytes_fetched": fetched})
        here = node["peer"] == me
        return {**node, "self": here, "connected": True, "rtt_ms": None if here else 0.4, "spans": spans}

    def _model(self, model: dict[str, Any], ready: bool) -> dict[str, Any]:
        return {
            "name": model["name"],
            "layers": LAYERS,
            "context_tokens": 512,
            "ready": ready,
            "copies_min": model["copies_wanted"] if ready else 0,
            "copies_wanted": model["copies_wanted"],
            "detail": "" if ready else "nodes are loading",
            "shortage": self.shortage,
        }


class _Handler(BaseHTTPRequestHandler):
    """The contract, answered from `daemon`, which each FakeDaemon fills in by a subclass of its own."""

    daemon: FakeDaemon
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.daemon.seen.append((self.path, {}))
        if self._canned():
            return
        if self.path == "/mesh":
            self.reply(200, self.daemon.mesh(me=self.daemon.peer))
        elif self.path.startswith("/fake/mesh/"):
            self.reply(200, self.daemon.mesh(me=self.path.rpartition("/")[2]))
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.daemon.seen.append((self.path, body))
        if self._canned():
            return
        actions = {
            "/shoal/invite": self.invite,
            "/shoal/models": self.models,
            "/shoal/join": self.join,
            "/shoal/stop": self.stop,
            "/fake/hello": self.hello,
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.completions,
        }
        if self.path in actions:
            actions[self.path](body)
        else:
            self.reply(404, {"detail": "Not Found"})

    def _canned(self) -> bool:
        canned = self.daemon.answers.get(self.path)
        if canned is not None:
            self.reply(*canned)
        return canned is not None

    def reply(self, status: int, document: Any) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: list[str]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for line in [*lines, ""]:
                data = line.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                if self.daemon.hold.is_set() and "text" in line:
                    self.connection.recv(1)

    def invite(self, body: dict[str, Any]) -> None:
        self.reply(200, {"invite": "shoal1-fake-" + self.daemon.api.removeprefix("http://")})

    def join(self, body: dict[str, Any]) -> None:
        if not body["invite"].startswith("shoal1-"):
            self.reply(400, {"error": {"message": "the invite does not start with shoal1-"}})
            return
        self.daemon.join(body["invite"])
        self.reply(200, {"joined": True})

    def hello(self, body: dict[str, Any]) -> None:
        self.daemon.nodes.append(body)
        self.reply(200, {})

    def stop(self, body: dict[str, Any]) -> None:
        self.reply(200, {})
        self.daemon.stopped.set()

    def models(self, body: dict[str, Any]) -> None:
        total = LAYERS * LAYER_BYTES
        events: list[dict[str, Any]] = [
            {"state": "hashing", "done": done * total // 4, "total": total} for done in range(5)
        ]
        events += [{"state": "published", "model": body["name"]}, {"state": "ready"}, {"done": True}]
        self.daemon.add(body["name"], body["copies"])
        self.stream([json.dumps(event) + "\n" for event in events])

    def completions(self, body: dict[str, Any]) -> None:
        words = [word + " " for word in self.daemon.text.split()][: body["max_tokens"]]
        events: list[dict[str, Any]] = [{"choices": [self.choice(word)]} for word in words]
        events.append({"choices": [{**self.choice(""), "finish_reason": "length"}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(words)}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self.stream([": keepalive\n\n", *lines, "data: [DONE]\n\n"])

    def choice(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if "chat" in self.path else {"text": text}


def _handler(daemon: FakeDaemon) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"daemon": daemon})


def _post(url: str, document: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as response:
        document: dict[str, Any] = json.load(response)
    return document


def main(arguments: list[str]) -> int:
    """`up` with the flags of `shoal up`; SIGTERM ends it. `--name` with "fails" in it ends at once, as a bad start."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command")
    for name in (
        "data-dir",
        "name",
        "api",
        "join",
        "memory",
        "config",
        "listen",
        "threads",
        "model",
        "log-level",
    ):
        parser.add_argument(f"--{name}")
    options = parser.parse_args(arguments)
    fault = os.environ.get("FAKE_FAULT", "")
    if fault == f"{options.name}:exit":
        print("shoal: the disk is full", file=sys.stderr)
        return 1
    if fault == f"{options.name}:deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: daemon.stopped.set())
    with FakeDaemon(options.name, options.api, int(options.memory or 4 << 20)) as daemon:
        if options.join:
            daemon.join(options.join)
        daemon.announce(Path(options.data_dir))
        if fault != f"{options.name}:silent":
            print(f"ready api={daemon.api} peer={daemon.peer}", flush=True)
        daemon.stopped.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
