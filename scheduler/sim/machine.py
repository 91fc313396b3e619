"""One simulated node: its span, its cache room, its prompts in line, and how long a visit of one token takes.

Prompts are served first come first served, in slices between decode steps. Decode is not stepped token by token:
with tokens arriving at a rate, batches form by themselves, and their size and the time in the node follow from the
same roofline as scheduler.cost. It decides nothing and sees no other node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler import cost
from scheduler.shapes import ModelShape, NodeShape
from scheduler.sim.trace import BLOCK_TOKENS

if TYPE_CHECKING:
    from scheduler.sim.request import Request

RATE_CALM = 0.05
Span = tuple[int, int]


@dataclass(slots=True, eq=False)
class Machine:
    """A node that is, or was, up. `rate` is tokens a second asked of it by decoding requests, weighted once each;
    `promised_s` the work of prompts whose sessions are open here and that have not arrived yet."""

    shape: NodeShape
    model: ModelShape
    line_bytes_per_s: float
    slice_s: float
    up: bool = True
    span: Span | None = None
    target: Span | None = None
    draining: bool = False
    died_s: float = float("inf")
    disk: list[Span] = field(default_factory=list)
    sessions: dict[int, Request] = field(default_factory=dict)
    prefixes: dict[int, None] = field(default_factory=dict)
    kv_free_bytes: int = 0
    set_aside_bytes: int = 0
    free_at_s: float = 0.0
    promised_s: float = 0.0
    rate: float = 0.0
    streams: int = 0
    change: int = 0
    read_s: float = 0.0
    flops_s: float = 0.0
    cache_s: float = 0.0
    prompt_s: float = 0.0
    head_s: float = 0.0

    def __post_init__(self) -> None:
        """The per-layer terms of scheduler.cost, kept apart so that a visit costs no more than a few additions."""
        model, node = self.model, self.shape
        self.read_s = cost.decode_s_per_layer(model, node)
        self.flops_s = model.layer_flops_per_token / node.flops_per_s
        middle = model.context_tokens // 4
        self.cache_s = middle * model.kv_bytes_per_token_per_layer / node.read_bytes_per_s
        self.prompt_s = cost.prefill_s_per_token_per_layer(model, node)
        self.head_s = cost.head_s(model, node)

    @property
    def name(self) -> str:
        """The node's name."""
        return self.shape.id

    @property
    def serving(self) -> bool:
        """Whether it takes new sessions."""
        return self.up and self.span is not None and not self.draining

    def settle(self, span: Span | None) -> None:
        """Host `span` from now on; what is not weights or working space is cache room."""
        self.span = span
        self.draining = False
        self.prefixes.clear()
        if span is None:
            self.kv_free_bytes = 0
            return
        self.kv_free_bytes = (
            self.shape.memory_bytes - self.model.working_bytes - self.model.weight_bytes(*span)
        )
        if span not in self.disk:
            self.disk.append(span)

    def kv_bytes(self, tokens: int, layers: int) -> int:
        """Cache that a session of `tokens` over `layers` layers takes."""
        return tokens * layers * self.model.kv_bytes_per_token_per_layer

    def kv_tokens_free(self) -> int:
        """Room for tokens over the whole span, as a node announces it."""
        if self.span is None:
            return 0
        each = self.model.kv_bytes_per_token_per_layer * (self.span[1] - self.span[0])
        return max(0, self.kv_free_bytes) // max(1, each)

    def cached_tokens(self, blocks: tuple[int, ...]) -> int:
        """Tokens at the beginning of a prompt whose cache is still here."""
        for k, block in enumerate(blocks):
            if block not in self.prefixes:
                return k * BLOCK_TOKENS
        return len(blocks) * BLOCK_TOKENS

    def remember(self, blocks: tuple[int, ...]) -> None:
        """Keep the cache of a prompt's blocks in the room that is free, the least lately used let go first."""
        for block in reversed(blocks):  # a block is of no use without those before it: they are let go last
            self.prefixes.pop(block, None)
            self.prefixes[block] = None
        most = self.kv_tokens_free() // BLOCK_TOKENS
        while len(self.prefixes) > most:
            del self.prefixes[next(iter(self.prefixes))]

    def backlog_s(self, now_s: float) -> float:
        """Prompt work in line and on its way."""
        return max(0.0, self.free_at_s - now_s) + self.promised_s

    def prompt_work_s(self, tokens: int, layers: int) -> float:
        """Seconds that a prompt takes here beside the decode of this moment."""
        return tokens * layers * self.prompt_s / self.prompt_share()

    def visit_s(self, layers: int, last: bool, now_s: float) -> float:
        """Seconds for one token to be served here, waiting included, at the load of this moment.

        With a step of k tokens taking C(k) = max(read + k * cache, k * flops), a step's batch is what arrived
        during the one before: k = rate * (C + slice), between 1 and the number of streams. A token waits half a
        step, as far as the node is busy, and a slice of prompt stands between two steps while prompts are in line.
        """
        read, cache, flops = self.read_s * layers, self.cache_s * layers, self.flops_s * layers
        if last:
            read += self.head_s
        between = self.slice_s if self.free_at_s > now_s else 0.0
        step = max(read + cache, flops)
        most = max(1.0, float(self.streams))
        batch = 1.0
        for _ in range(4):
            batch = min(most, max(1.0, self.rate * (step + between)))
            step = max(read + batch * cache, batch * flops)
        busy = min(1.0, self.rate * (step + between) / batch)
        wait = max(busy * (step + between) / 2, between / 2)
        return step + wait

    def prompt_share(self) -> float:
        """The part of its time that it gives to prompts while some are in line: what decode leaves, and a slice
        a step at least."""
        if self.span is None or self.streams == 0:
            return 1.0
        layers = self.span[1] - self.span[0]
        step = self.read_s * layers + self.streams * self.cache_s * layers
        step = max(step, self.streams * self.flops_s * layers)
        idle = 1.0 - self.rate * step / max(1, self.streams)
        return max(RATE_CALM, idle, self.slice_s / (self.slice_s + step))

    def take_prompt(self, tokens: int, layers: int, now_s: float) -> tuple[float, float]:
        """Put a prompt in line; returns when it starts and how long it takes."""
        seconds = self.prompt_work_s(tokens, layers)
        start_s = max(now_s, self.free_at_s)
        self.free_at_s = start_s + seconds
        return start_s, seconds
