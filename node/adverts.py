"""What a node says about itself and its models in the mesh: the values inside dht's signed records.

`node` (one a node): what it is and where. `model` (one a model and host): shape and manifest. `host` (one a model and
host): which span it holds and how busy it is. `plan` (one a model and planner): who shall hold what. `links`: measured
round trips. Bytes from a peer become a frozen dataclass or a RemoteFault; nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from p2p import RemoteFault, pack_value, unpack_value
from scheduler import Assignment, ModelShape, Plan

T = TypeVar("T")

NODE, MODEL, HOST, PLAN, LINKS = "node", "model", "host", "plan", "links"
SpanState = Literal["fetching", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class NodeAdvert:
    """A node's identity card. `pinned` is the span its owner fixed by hand (`--layers`), for every model."""

    name: str
    version: str
    addrs: tuple[str, ...]
    api: str | None
    serves: bool
    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float
    device: str
    pinned: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelAdvert:
    """A model of the mesh. The dtype and quantisation hold for every host, so that all copies compute alike."""

    name: str
    manifest_id: str
    created_s: int
    dtype: str
    quant: str
    copies: int
    concurrency: int
    context_tokens: int
    layers: int
    layer_bytes: int
    embed_bytes: int
    head_bytes: int
    tied: bool
    layer_flops_per_token: float
    hidden_bytes: int
    kv_bytes_per_token_per_layer: int

    def shape(self) -> ModelShape:
        """What the scheduler needs to know of it."""
        return ModelShape(
            layers=self.layers,
            layer_bytes=self.layer_bytes,
            embed_bytes=self.embed_bytes,
            head_bytes=self.head_bytes,
            tied=self.tied,
            layer_flops_per_token=self.layer_flops_per_token,
            hidden_bytes=self.hidden_bytes,
            kv_bytes_per_token_per_layer=self.kv_bytes_per_token_per_layer,
            context_tokens=self.context_tokens,
            concurrency=self.concurrency,
        )


@dataclass(frozen=True, slots=True)
class HostAdvert:
    """A span [start, end) of one model on one node, and how it fares."""

    start: int
    end: int
    state: SpanState
    epoch: int
    progress: float = 0.0
    bytes_fetched: int = 0
    bytes_wanted: int = 0
    sessions: int = 0
    kv_tokens_free: int = 0
    s_per_layer: float = 0.0
    queue_s: float = 0.0
    tokens_per_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PlanSpan:
    node: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PlanAdvert:
    """A signed plan; `shortage` says in plain words why there is none."""

    epoch: int
    spans: tuple[PlanSpan, ...]
    shortage: str = ""

    def plan(self, model: str, planner: str) -> Plan:
        spans = tuple(Assignment(span.node, span.start, span.end) for span in self.spans)
        return Plan(model=model, epoch=self.epoch, planner=planner, assignments=spans)

    @classmethod
    def of(cls, plan: Plan) -> PlanAdvert:
        return cls(plan.epoch, tuple(PlanSpan(a.node, a.start, a.end) for a in plan.assignments))


@dataclass(frozen=True, slots=True)
class LinksAdvert:
    """Round trips in seconds that this node measured, by peer."""

    rtt_s: dict[str, float]


def read(kind: type[T], value: bytes) -> T | None:
    """The advert in a record's value, or None where a peer published something else under that kind."""
    try:
        return unpack_value(kind, value)
    except RemoteFault:
        return None


def write(advert: object) -> bytes:
    """An advert as a record's value."""
    return pack_value(advert)
