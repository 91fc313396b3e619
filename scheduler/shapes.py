"""What a model, a node, a link and a plan look like to the scheduler, and the memory a span takes.

Plain frozen values. Units stand last in every name; spans are half-open [start, end). Nothing here
decides anything, and nothing here knows how the figures were measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.errors import InputError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes. Bytes are those in memory, after quantisation.

    `layer_bytes` is one layer with all its experts; a mixture of experts also gives `experts`, `experts_per_token`
    and `expert_bytes` (one expert of one layer), so that decode is charged only for the experts it reads.
    `context_tokens` times `concurrency` tokens of KV cache are kept for every layer hosted.
    """

    layers: int
    layer_bytes: int
    embed_bytes: int
    head_bytes: int
    tied: bool
    layer_flops_per_token: float
    hidden_bytes: int
    kv_bytes_per_token_per_layer: int
    context_tokens: int
    concurrency: int = 1
    working_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        for field, value, least in (
            ("layers", self.layers, 1),
            ("layer_bytes", self.layer_bytes, 1),
            ("embed_bytes", self.embed_bytes, 0),
            ("head_bytes", self.head_bytes, 0),
            ("hidden_bytes", self.hidden_bytes, 0),
            ("kv_bytes_per_token_per_layer", self.kv_bytes_per_token_per_layer, 0),
            ("context_tokens", self.context_tokens, 0),
            ("concurrency", self.concurrency, 0),
            ("working_bytes", self.working_bytes, 0),
            ("experts", self.experts, 0),
            ("experts_per_token", self.experts_per_token, 0),
            ("expert_bytes", self.expert_bytes, 0),
        ):
            if value < least:
                raise InputError(field, value, f"at least {least}")
        if self.experts_per_token > self.experts:
            raise InputError("experts_per_token", self.experts_per_token, f"at most experts, {self.experts}")
        if self.experts * self.expert_bytes > self.layer_bytes:
            raise InputError("expert_bytes", self.expert_bytes, "at most layer_bytes over experts")

    @property
    def head_weight_bytes(self) -> int:
        """The output projection as the last stage holds it; a tied model may state it only as the embedding."""
        return self.head_bytes or (self.embed_bytes if self.tied else 0)

    @property
    def kv_bytes_per_layer(self) -> int:
        """Cache that one hosted layer sets aside."""
        return self.kv_bytes_per_token_per_layer * self.context_tokens * self.concurrency

    def weight_bytes(self, start: int, end: int) -> int:
        """Weights of [start, end): layers, embedding where it begins, head where it ends, tied ones once."""
        total = (end - start) * self.layer_bytes
        if start == 0 and end == self.layers and self.tied:
            return total + max(self.embed_bytes, self.head_weight_bytes)
        if start == 0:
            total += self.embed_bytes
        if end == self.layers:
            total += self.head_weight_bytes
        return total


def memory_needed(model: ModelShape, start: int, end: int) -> int:
    """Bytes that hosting [start, end) takes: weights, KV cache for the wanted context, working space."""
    if not 0 <= start < end <= model.layers:
        raise InputError("span", (start, end), f"0 <= start < end <= {model.layers}")
    kept = (end - start) * model.kv_bytes_per_layer
    return model.weight_bytes(start, end) + kept + model.working_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or the CPU) inside a node."""

    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NodeShape:
    """A node as phase 1 sees it.

    Measured times win over the roofline where they are given. `devices` splits the node's memory: a layer lies on
    one device, never across two. Tags that the default policy knows: `trusted`, `metered`, `owner-active`. A node whose
    owner `pinned` a span hosts that and nothing else, of every model.
    """

    id: str
    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float
    decode_s_per_layer: float | None = None
    prefill_s_per_token_per_layer: float | None = None
    region: str = ""
    tags: frozenset[str] = frozenset()
    reliability: float = 1.0
    devices: tuple[Device, ...] = ()
    pinned: tuple[int, int] | None = None


def device_id(node: str, number: int) -> str:
    """The name under which a node's device hosts spans of its own: the first one goes by the node's name."""
    return node if number == 0 else f"{node}#{number}"


def node_of(name: str) -> str:
    """The node that a host's name belongs to, whichever of its devices that is."""
    return name.partition("#")[0]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two nodes."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """Time for a message of that size."""
        return self.latency_s + (size_bytes / self.bytes_per_s if self.bytes_per_s > 0 else 0.0)


Links = Callable[[str, str], Link]


@dataclass(frozen=True, slots=True, order=True)
class Assignment:
    """`node` shall host layers [start, end)."""

    node: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shall host what of one model. A node has at most one span; spans may overlap and repeat."""

    model: str
    epoch: int
    planner: str
    assignments: tuple[Assignment, ...]

    def span(self, node: str) -> tuple[int, int] | None:
        """The span of `node`, or None."""
        return next(((a.start, a.end) for a in self.assignments if a.node == node), None)

    def coverage(self, layers: int) -> list[int]:
        """How many nodes host each layer, [layers]."""
        return coverage(self.assignments, layers)


def coverage(assignments: tuple[Assignment, ...] | list[Assignment], layers: int) -> list[int]:
    """How many of `assignments` host each layer, [layers]."""
    steps = [0] * (layers + 1)
    for a in assignments:
        steps[max(0, min(a.start, layers))] += 1
        steps[max(0, min(a.end, layers))] -= 1
    counts, running = [], 0
    for step in steps[:layers]:
        running += step
        counts.append(running)
    return counts
