"""Talking to a daemon over HTTP: finding it, asking, and reading its streams (ndjson and server-sent events).

It uses the standard library's client because that imports in a fifth of the time of the larger ones, and
the command line is judged by how quickly it answers. It knows the daemon's addresses and error shape, not
what the answers mean.
"""

from __future__ import annotations

import http.client
import json
import os
import tomllib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.errors import (
    CommandFailed,
    DaemonAbsent,
    DaemonGarbled,
    DaemonRefused,
    DaemonSilent,
    ResourceLimit,
    ShoalError,
    UsageProblem,
)

BODY_BYTES_MAX = 64 << 20
LINE_BYTES_MAX = 4 << 20
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class DaemonAddress:
    """Where a running daemon can be asked, as it wrote into its data directory."""

    pid: int
    api: str
    peer: str


def data_dir(flag: str | None, env: Mapping[str, str] | None = None) -> Path:
    """The data directory that `shoal up` would use for the same flag and environment.

    It repeats the order of `node.config` (flag, SHOAL_DATA_DIR, the configuration file, the platform's
    place), because
    importing the daemon for it would cost every command a second; a test holds the two together.
    """
    env = os.environ if env is None else env
    if flag or env.get("SHOAL_DATA_DIR"):
        return Path(flag or env["SHOAL_DATA_DIR"]).expanduser()
    config = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else Path.home() / ".config"
    try:
        chosen = tomllib.loads((config / "shoal" / "config.toml").read_text(encoding="utf-8")).get("data_dir")
    except (OSError, ValueError):
        chosen = None
    if isinstance(chosen, str) and chosen:
        return Path(chosen).expanduser()
    if env.get("XDG_DATA_HOME"):
        return Path(env["XDG_DATA_HOME"]) / "shoal"
    if os.name == "nt" and env.get("LOCALAPPDATA"):
        return Path(env["LOCALAPPDATA"]) / "shoal"
    return Path.home() / ".local" / "share" / "shoal"


def read_address(directory: Path) -> DaemonAddress | None:
    """What the daemon on `directory` left in `daemon.json`, or None. It may have died since."""
    try:
        document = json.loads((directory / "daemon.json").read_bytes())
        return DaemonAddress(int(document["pid"]), str(document["api"]), str(document["peer"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def connect(api: str | None, flag: str | None) -> DaemonClient:
    """A client for `api` where given, else for the daemon on the data directory. Raises DaemonAbsent."""
    if api is not None:
        return DaemonClient(api)
    directory = data_dir(flag)
    address = read_address(directory)
    if address is None:
        raise DaemonAbsent(f"no daemon is running on {directory}; start one with: shoal up")
    return DaemonClient(address.api, where=f"the daemon of {directory} (process {address.pid})")


class DaemonClient:
    """Blocking requests to one daemon, one connection each. Every method raises only ShoalError."""

    def __init__(self, api: str, *, where: str = "", answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        parts = urlsplit(api if "://" in api else f"http://{api}")
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            self._port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not self._port:
            raise UsageProblem(
                f"api is '{api}', which is not HOST:PORT or a URL such as http://127.0.0.1:8080"
            )
        self._secure = parts.scheme == "https"
        # A daemon that listens everywhere is asked over loopback.
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname, parts.hostname)
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.api = f"{parts.scheme}://{shown}:{self._port}"
        self._where = where or f"a daemon at {self.api}"
        self._answer_timeout_s = answer_timeout_s

    def get(self, path: str) -> dict[str, Any]:
        """GET a JSON object."""
        with self._request("GET", path, None, self._answer_timeout_s) as response:
            return _object(self._read(response))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST a JSON object, read one."""
        with self._request("POST", path, body, self._answer_timeout_s) as response:
            return _object(self._read(response))

    def ndjson(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """POST, then yield one object a line as they come. Closing the iterator closes the connection."""
        with self._request("POST", path, body, STREAM_TIMEOUT_S) as response:
            for line in self._lines(response):
                if line:
                    yield _object(line)

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST, then yield the objects of a server-sent event stream until its `[DONE]`."""
        with self._request("POST", path, body, STREAM_TIMEOUT_S) as response:
            for line in self._lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                document = _object(data)
                if "error" in document:
                    raise refusal(200, document, None)
                yield document
            raise DaemonSilent(f"{self._where} ended the stream before it was done")

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        link = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            with self._plain_errors(connecting=True):
                link.connect()
            with self._plain_errors():
                link.sock.settimeout(timeout_s)
                payload = None if body is None else json.dumps(body).encode()
                link.request(method, path, payload, _headers(payload))
                response = link.getresponse()
                if response.status >= 400:
                    raise self._failure(response, path)
            yield response
        finally:
            link.close()

    @contextmanager
    def _plain_errors(self, *, connecting: bool = False) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise DaemonSilent(f"{self._where} does not answer") from None
        except (OSError, http.client.HTTPException) as problem:
            if connecting:
                hint = "is it running? start one with: shoal up"
                raise DaemonAbsent(f"{self._where} cannot be reached ({_reason(problem)}); {hint}") from None
            raise DaemonSilent(f"{self._where} stopped answering ({_reason(problem)})") from None

    def _failure(self, response: http.client.HTTPResponse, path: str) -> ShoalError:
        body = response.read(LINE_BYTES_MAX)
        try:
            document = _object(body)
        except DaemonGarbled:
            document = {}
        if response.status in (404, 405) and "error" not in document:
            return DaemonGarbled(
                f"what answers at {self.api} does not know {path}: not a Shoal daemon, or an older one"
            )
        return refusal(response.status, document, response.getheader("Retry-After"))

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        with self._plain_errors():
            body = response.read(BODY_BYTES_MAX + 1)
        if len(body) > BODY_BYTES_MAX:
            raise DaemonGarbled(f"{self._where} answered with more than {BODY_BYTES_MAX >> 20} MiB")
        return body

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while True:
            with self._plain_errors():
                line = response.readline(LINE_BYTES_MAX)
            if not line:
                return
            if len(line) >= LINE_BYTES_MAX:
                raise DaemonGarbled(f"{self._where} sent a line of more than {LINE_BYTES_MAX >> 20} MiB")
            yield line.strip()


def _headers(payload: bytes | None) -> dict[str, str]:
    headers = {"Accept": "application/json"}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    if os.environ.get("SHOAL_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['SHOAL_API_KEY']}"
    return headers


def _reason(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    return str(problem) or type(problem).__name__


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise DaemonGarbled(f"the daemon's answer is not JSON: {data[:80]!r}") from None
    if not isinstance(document, dict):
        raise DaemonGarbled(f"the daemon's answer is not a JSON object: {data[:80]!r}")
    return document


def refusal(status: int, document: Mapping[str, Any], retry_after: str | None) -> ShoalError:
    """The error that an answer with this status and OpenAI-shaped document stands for."""
    error = document.get("error")
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return DaemonRefused(f"the daemon answered with HTTP status {status}", status)
    message = str(error.get("message") or f"the daemon answered with HTTP status {status}")
    if status in (429, 503) and retry_after is not None:
        try:
            return ResourceLimit(f"{message} (try again in {float(retry_after):g} s)", float(retry_after))
        except ValueError:
            return ResourceLimit(message)
    return DaemonRefused(message, status, str(error.get("code") or ""))


def one_event(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """A progress event as it is, unless it reports a failure, which is raised as CommandFailed."""
    error = event.get("error")
    if error is None:
        return event
    message = error.get("message") if isinstance(error, dict) else error
    raise CommandFailed(str(message))
