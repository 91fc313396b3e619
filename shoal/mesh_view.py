"""The daemon's `/mesh` document as frozen dataclasses, and the questions that commands ask of it.

It is tolerant of keys that are missing or new, because a mesh holds nodes of several versions, and strict
about types, because tables and sums are made from the values. It fetches nothing. Spans are half-open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.errors import DaemonGarbled

T = TypeVar("T")
LAYERS_MAX = 100_000
HEALTH_WORDS = {
    "slow": "slow, avoided",
    "out": "failed of late, avoided",
    "probation": "on probation",
}


@dataclass(frozen=True, slots=True)
class SpanView:
    """Layers [start, end) of a model on a node. `progress` is 0 to 1; `state` ready, failed or on its way."""

    model: str
    start: int
    end: int
    state: str = "loading"
    progress: float = 0.0
    bytes_fetched: int = 0
    sessions: int = 0
    tokens_per_s: float = 0.0
    detail: str = ""

    @property
    def ready(self) -> bool:
        return self.state == "ready"


@dataclass(frozen=True, slots=True)
class NodeView:
    """One computer as the asked node sees it. `api` is None where it cannot be reached from here. `health` is what its
    gateway thinks of the work it saw there: good, slow, out or probation; "" where it saw none."""

    peer: str
    name: str
    api: str | None
    memory_bytes: int
    is_self: bool
    connected: bool
    suspect: bool
    rtt_ms: float | None
    version: str
    spans: tuple[SpanView, ...]
    health: str = ""

    def span_of(self, model: str) -> SpanView | None:
        """This node's span of `model`, or None."""
        return next((span for span in self.spans if span.model == model), None)


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model of the mesh. `detail` says in plain words why it is not ready, `shortage` what it has no room for."""

    name: str
    layers: int
    context_tokens: int
    ready: bool
    copies_min: int
    copies_wanted: int
    detail: str
    shortage: str = ""


@dataclass(frozen=True, slots=True)
class MeshView:
    """The whole mesh from one node's own copy."""

    mesh: str
    self_peer: str
    nodes: tuple[NodeView, ...]
    models: tuple[ModelView, ...]

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> MeshView:
        """Read a `/mesh` document. Raises DaemonGarbled."""
        return cls(
            mesh=_get(document, "mesh", str, ""),
            self_peer=_get(document, "self", str, ""),
            nodes=tuple(_node(item) for item in _items(document, "nodes")),
            models=tuple(_model(item) for item in _items(document, "models")),
        )

    def model(self, name: str) -> ModelView | None:
        """The model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def copies(self, name: str) -> list[int]:
        """How many nodes have each layer of the model ready; empty when the model is unknown."""
        model = self.model(name)
        counts = [0] * (model.layers if model else 0)
        for node in self.nodes:
            span = node.span_of(name)
            if span is not None and span.ready:
                for layer in range(max(0, span.start), min(span.end, len(counts))):
                    counts[layer] += 1
        return counts

    def served(self, name: str, copies: int = 1) -> bool:
        """Whether every layer is ready on at least `copies` nodes."""
        counts = self.copies(name)
        return bool(counts) and min(counts) >= copies

    def lacking(self, name: str, copies: int = 1) -> str:
        """In plain words which layers of the model are not served by `copies` nodes; empty when none is."""
        model = self.model(name)
        if model is None:
            return f"no node knows a model named '{name}'"
        runs = _runs(self.copies(name), copies)
        if not runs:
            return ""
        wanted = "by any node" if copies == 1 else f"{copies} times"
        named = ", ".join(layer_range(start, end) for start, end in runs)
        reason = f" ({model.detail})" if model.detail else ""
        return f"layers {named} of {model.layers} of '{name}' are not served {wanted}{reason}"

    def progress(self, name: str, copies: int = 1) -> float:
        """How much of `copies` times all layers is in place, 0 to 1."""
        model = self.model(name)
        if model is None or model.layers == 0:
            return 0.0
        done = 0.0
        for node in self.nodes:
            span = node.span_of(name)
            if span is not None and span.state != "failed":
                done += (span.end - span.start) * (1.0 if span.ready else min(max(span.progress, 0.0), 0.99))
        return min(done / (model.layers * max(copies, 1)), 1.0)


def layer_range(start: int, end: int) -> str:
    """The span [start, end) as people write it, the last layer included: `4-7`."""
    return str(start) if end - start == 1 else f"{start}-{end - 1}"


def layer_words(start: int, end: int) -> str:
    """`layer 7` or `layers 4-7`."""
    return f"layer{'s' if end - start > 1 else ''} {layer_range(start, end)}"


def node_state(node: NodeView) -> str:
    """One word or two on how a node fares."""
    if node.suspect:
        return "lost?"
    if not node.is_self and not node.connected:
        return "unreachable"
    failed = [span for span in node.spans if span.state == "failed"]
    if not node.peer:
        return "starting"
    if failed:
        return f"failed: {failed[0].model}"
    going = [span for span in node.spans if not span.ready]
    if going:
        return f"{going[0].state} {100 * sum(span.progress for span in going) / len(going):.0f} %"
    if node.health in HEALTH_WORDS and node.spans:
        return HEALTH_WORDS[node.health]
    return "serving" if node.spans else "idle"


def short_peer(peer: str) -> str:
    """The end of a peer id, which is the part that differs."""
    return peer if len(peer) <= 10 else f"…{peer[-8:]}"


def printable(text: str) -> str:
    """`text` without control characters: other people's computers must not steer this terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _runs(counts: list[int], wanted: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for layer, count in enumerate(counts):
        if count >= wanted:
            continue
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


def _garbled(key: str, value: object) -> DaemonGarbled:
    return DaemonGarbled(f"the daemon's view of the mesh is not understood: '{key}' is {value!r:.80}")


def _get(document: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    value = document.get(key)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _garbled(key, value)
    if isinstance(value, str):
        return kind(printable(value))  # type: ignore[call-arg]
    return value


def _items(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _garbled(key, value)
    return value


def _span(item: Mapping[str, Any]) -> SpanView:
    span = SpanView(
        model=_get(item, "model", str, ""),
        start=_get(item, "start", int, 0),
        end=_get(item, "end", int, 0),
        state=_get(item, "state", str, "loading"),
        progress=_get(item, "progress", float, 0.0),
        bytes_fetched=_get(item, "bytes_fetched", int, 0),
        sessions=_get(item, "sessions", int, 0),
        tokens_per_s=_get(item, "tokens_per_s", float, 0.0),
        detail=_get(item, "detail", str, ""),
    )
    if not 0 <= span.start <= span.end <= LAYERS_MAX:
        raise _garbled("spans", f"{span.start}:{span.end}")
    return span


def _node(item: Mapping[str, Any]) -> NodeView:
    rtt_ms = item.get("rtt_ms")
    api, health = item.get("api"), item.get("health")
    return NodeView(
        peer=_get(item, "peer", str, ""),
        name=_get(item, "name", str, ""),
        api=api if isinstance(api, str) else None,
        memory_bytes=_get(item, "memory_bytes", int, 0),
        is_self=_get(item, "self", bool, False),
        connected=_get(item, "connected", bool, False),
        suspect=_get(item, "suspect", bool, False),
        rtt_ms=None if rtt_ms is None else _get(item, "rtt_ms", float, 0.0),
        version=_get(item, "version", str, ""),
        spans=tuple(_span(span) for span in _items(item, "spans")),
        health=_get(health, "state", str, "") if isinstance(health, dict) else "",
    )


def _model(item: Mapping[str, Any]) -> ModelView:
    model = ModelView(
        name=_get(item, "name", str, ""),
        layers=_get(item, "layers", int, 0),
        context_tokens=_get(item, "context_tokens", int, 0),
        ready=_get(item, "ready", bool, False),
        copies_min=_get(item, "copies_min", int, 0),
        copies_wanted=_get(item, "copies_wanted", int, 1),
        detail=_get(item, "detail", str, ""),
        shortage=_get(item, "shortage", str, ""),
    )
    if not 0 <= model.layers <= LAYERS_MAX:
        raise _garbled("layers", model.layers)
    return model
