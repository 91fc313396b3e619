"""Requests that are answered by one document: whom to ask, and what the document says. Sans I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.client.answers import Model
from shoal.client.gateways import Gateways, nobody
from shoal.client.reading import document_of
from shoal.daemon_client import refusal
from shoal.errors import DaemonGarbled, DaemonSilent, ResourceLimit

PAUSE_S = 0.25


class Simple:
    """One such request over several gateways, within `timeout_s` seconds of a monotonic clock. All may be repeated."""

    def __init__(self, gateways: Gateways, now_s: float, timeout_s: float) -> None:
        self._gateways = gateways
        self._end_s = now_s + timeout_s
        self._timeout_s = timeout_s
        self._avoid: frozenset[str] = frozenset()
        self._address = ""

    def call(self, now_s: float) -> tuple[str, float]:
        """Whom to ask, and the seconds that are left. Raises DaemonSilent."""
        if now_s >= self._end_s:
            raise DaemonSilent(f"no answer within {self._timeout_s:g} s")
        self._address = self._gateways.choose(now_s, self._avoid)
        return self._address, self._end_s - now_s

    def broke(self, reason: str, now_s: float) -> float:
        """It could not be reached: seconds to wait. Raises DaemonAbsent once all were tried."""
        self._gateways.failed(self._address, now_s)
        self._avoid |= {self._address}
        if self._avoid.issuperset(self._gateways.addresses):
            raise nobody(self._gateways, reason)
        return 0.0

    def answered(
        self, status: int, body: bytes, retry_after: str | None, now_s: float
    ) -> tuple[dict[str, Any] | None, float]:
        """The document; or None and the seconds to wait. Raises ShoalError."""
        if status < 400:
            self._gateways.worked(self._address)
            return document_of(body), 0.0
        try:
            document = document_of(body)
        except DaemonGarbled:
            document = {}
        problem = refusal(status, document, retry_after)
        if isinstance(problem, ResourceLimit) and now_s + problem.retry_after_s < self._end_s:
            return None, max(PAUSE_S, problem.retry_after_s)
        raise problem


def embed_simple(model: str, texts: str | Sequence[str], pooling: str | None) -> dict[str, Any]:
    """The body of an embeddings request."""
    body: dict[str, Any] = {"model": model, "input": texts if isinstance(texts, str) else list(texts)}
    return body | {"pooling": pooling} if pooling else body


def rows_of(document: dict[str, Any]) -> list[list[float]]:
    """The vectors of an embeddings answer, in the order of the texts. Raises DaemonGarbled."""
    try:
        rows = sorted(document["data"], key=lambda row: int(row["index"]))
        return [[float(value) for value in row["embedding"]] for row in rows]
    except (KeyError, TypeError, ValueError):
        raise DaemonGarbled("the node's answer holds no embeddings") from None


def models_of(document: dict[str, Any]) -> list[Model]:
    """The models of `/v1/models`. Raises DaemonGarbled."""
    try:
        return [
            Model(
                name=str(one["id"]),
                ready=bool(one.get("ready", True)),
                detail=str(one.get("detail", "")),
                context_tokens=int(one.get("context_tokens", 0)),
                parent=one.get("parent"),
            )
            for one in document["data"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DaemonGarbled("the node's answer is no list of models") from None
