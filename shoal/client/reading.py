"""From bytes of a server-sent event stream to its documents. Sans I/O, bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shoal.errors import DaemonGarbled

LINE_BYTES_MAX = 4 << 20


class Events:
    """Cuts a stream of bytes into the documents of its `data:` lines; comments are dropped.

    `done` is true once `[DONE]` came.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def push(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The documents that are whole now. Raises DaemonGarbled."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise DaemonGarbled(f"the node sent a line of more than {LINE_BYTES_MAX >> 20} MiB")
        for line in lines:
            if self.done or not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                self.done = True
                continue
            yield document_of(content)


def document_of(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises DaemonGarbled."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise DaemonGarbled(f"the node's answer is not JSON: {data[:80]!r}") from None
    if not isinstance(document, dict):
        raise DaemonGarbled(f"the node's answer is not a JSON object: {data[:80]!r}")
    return document
