"""One request and its answer over one HTTP/1.1 connection: sans I/O, on h11.

Both clients put a socket around it. They need of HTTP only this much, and leaving a stream in its middle must close
just this connection, at once and on any event loop: that is what ends the work in the mesh.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import h11

from shoal.errors import DaemonGarbled

CONNECT_S = 5.0
READ_BYTES = 64 << 10
BODY_BYTES_MAX = 64 << 20


class Broken(Exception):
    """The connection could not be made, or ended early. The text says how."""


def key_headers(api_key: str | None) -> dict[str, str]:
    """The header that shows the key: the given one, else SHOAL_API_KEY's."""
    key = api_key or os.environ.get("SHOAL_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Wire:
    """The request's bytes out, the answer's bytes in. `status` is None until the answer's head came."""

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> None:
        parts = urlsplit(url)
        self.host, self.secure = str(parts.hostname), parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        self.status: int | None = None
        self.retry_after: str | None = None
        self.ended = False
        self._http = h11.Connection(h11.CLIENT)
        payload = b"" if body is None else json.dumps(body).encode()
        fields = [
            ("Host", parts.netloc),
            ("Accept", "application/json, text/event-stream"),
            ("Connection", "close"),
        ]
        if body is not None:
            fields += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
        request = h11.Request(method=method, target=parts.path or "/", headers=[*fields, *headers.items()])
        sent = [
            self._http.send(request),
            self._http.send(h11.Data(payload)),
            self._http.send(h11.EndOfMessage()),
        ]
        self.opening = b"".join(part for part in sent if part)

    def push(self, data: bytes) -> list[bytes]:
        """Bytes from the socket (none at its end); returns those of the body. Raises Broken."""
        found: list[bytes] = []
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Response):
                    self.status = event.status_code
                    self.retry_after = _retry_after(event)
                elif isinstance(event, h11.Data):
                    found.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self.ended = True
                    return found
                elif event is h11.NEED_DATA:
                    return found
                elif isinstance(event, h11.ConnectionClosed):
                    raise Broken("it closed the connection")
        except h11.RemoteProtocolError as problem:
            raise Broken(
                "it closed the connection" if not data else f"it speaks no HTTP: {problem}"
            ) from None


def _retry_after(head: h11.Response) -> str | None:
    return next((value.decode("latin-1") for name, value in head.headers if name == b"retry-after"), None)


def bounded(parts: list[bytes], data: list[bytes]) -> None:
    """Add to a body that is read as a whole. Raises DaemonGarbled."""
    parts += data
    if sum(map(len, parts)) > BODY_BYTES_MAX:
        raise DaemonGarbled(f"the node answered with more than {BODY_BYTES_MAX >> 20} MiB")
