"""A stand-in for the Hugging Face hub on loopback: the few answers that fetching a model asks for, from directories.

For tests, by HF_ENDPOINT. It keeps what it was asked, may fail, lie or ignore ranges on demand, and knows no users.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34
PIECE_BYTES = 256 << 10


@dataclass
class StandIn:
    """`repos` are directories by name. `asked` holds (file, first byte, end) of what was sent, or (path, 0, 0).

    `spoil(file, data)` changes what goes out; `status(file)` may refuse (0: not); `ranges` False sends whole files.
    """

    repos: Mapping[str, Path]
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    spoil: Callable[[str, bytes], bytes] = lambda file, data: data
    status: Callable[[str], int] = lambda file: 0
    ranges: bool = True
    url: str = ""

    def listing(self, name: str) -> dict[str, Any]:
        """What the hub says of a repository; weights have a SHA-256 as large files have."""
        siblings = []
        for path in sorted(self.repos[name].iterdir()):
            data = path.read_bytes()
            large = path.suffix == ".safetensors"
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append({"rfilename": path.name, "size": len(data)} | ({"lfs": lfs} if large else {}))
        return {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            self.hub.asked.append((path, 0, 0))
            if name in self.hub.repos:
                self._answer(
                    200, json.dumps(self.hub.listing(name)).encode(), {"content-type": "application/json"}
                )
                return
        name, _, rest = path.partition("/resolve/")
        file = rest.partition("/")[2]
        if name in self.hub.repos and (self.hub.repos[name] / file).is_file():
            self._file(file, (self.hub.repos[name] / file).read_bytes())
            return
        self._answer(
            404, b"{}", {"x-error-code": "EntryNotFound" if name in self.hub.repos else "RepoNotFound"}
        )

    def _file(self, file: str, data: bytes) -> None:
        status = self.hub.status(file)
        if status:
            self._answer(status, b"{}", {})
            return
        start, end = 0, len(data)
        wanted = self.headers.get("range", "")
        if wanted.startswith("bytes=") and self.hub.ranges:
            first, _, last = wanted[6:].partition("-")
            start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
        marks = {
            "etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "x-repo-commit": COMMIT,
            "accept-ranges": "bytes",
        }
        if self.command == "GET":
            self.hub.asked.append((file, start, end))
        partial = (start, end) != (0, len(data))
        if partial:
            marks["content-range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._answer(206 if partial else 200, self.hub.spoil(file, data[start:end]), marks)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `asked` instead."""


@contextmanager
def standing_in(repos: Mapping[str, Path]) -> Iterator[StandIn]:
    """A hub at `url` for as long as the block lasts."""
    hub = StandIn(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
