"""What a simulated mesh is made of, every figure a field. It checks values and decides nothing.

The defaults are a mesh of home machines around a 32-billion-parameter model in eight bits, which none of them
holds alone: unlike devices, four regions, a fifth of them leaving each hour, thirty-two gateways that see loads two
seconds old. There are as many nodes as Azure's chat trace fills: the best scheduler keeps seven to nine of ten
requests in target there, near the point at which DistServe (arXiv 2401.09670) compares.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from scheduler.errors import InputError
from scheduler.shapes import ModelShape

POLICIES = ("shoal", "petals", "petals-fresh", "parallax", "parallax-mending", "random")
GIB = 1 << 30


def default_model(layers: int = 64) -> ModelShape:
    """Layers like those of a dense 32B model in eight bits; a copy holds sixteen conversations of 4,096 tokens."""
    return ModelShape(
        layers=layers,
        layer_bytes=490_000_000,
        embed_bytes=780_000_000,
        head_bytes=780_000_000,
        tied=False,
        layer_flops_per_token=0.98e9,
        hidden_bytes=10_240,
        kv_bytes_per_token_per_layer=4096,
        context_tokens=4096,
        concurrency=16,
        working_bytes=256 << 20,
    )


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the mesh: a trace (Azure CSV or Mooncake JSONL, by its name's end) or a synthetic one.

    `speed` plays a trace that many times faster. Synthetic lengths are lognormal with these medians and sigma.
    """

    trace: str | None = None
    speed: float = 1.0
    requests_per_s: float = 5.5
    prompt_median_tokens: float = 700.0
    answer_median_tokens: float = 130.0
    sigma: float = 0.9
    requests_max: int = 2_000_000


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request must keep to count: first token and time for each further one. Chosen before any run."""

    ttft_s: float = 5.0
    tpot_s: float = 0.25


DEFAULT_MODEL = default_model()


@dataclass(frozen=True, slots=True)
class SimConfig:
    """One run. Times in seconds, sizes in bytes; shares are between 0 and 1.

    `copies` None asks for as many as the mesh's memory holds. With `early_rejection` our gateways refuse what would
    miss its targets. Our planner looks for better plans each `second_thoughts_s`.
    `crash_share` of the leaving nodes vanish without a word, noticed after `detect_s`; the others say so and go at once
    all the same. `return_share` of the joining nodes are old ones that come back with their weights on disk. `diurnal`
    is how far the rates of leaving and joining swing over a day. Links inside a region and between regions have a
    latency and a bandwidth; a node's own line (`line_mbps_least` to `line_mbps_most`) bounds both; `latency_s` gives
    the one-way latencies between all regions as rows, in place of a ring of regions. `view_nodes_max` is
    how many hosts our gateways weigh all of; of more they weigh some for each layer, near ones first, and other ones
    at other gateways. A client that finds no room asks again after `retry_s`, then twice that, up to `retry_s_most`.
    `patience_s` is how long a client waits for its first token, and again for each mending.
    """

    policy: str = "shoal"
    nodes: int = 30
    model: ModelShape = DEFAULT_MODEL
    load: Load = Load()
    targets: Targets = Targets()
    hours: float = 1.0
    drain_s: float = 300.0
    churn_per_hour: float = 0.2
    crash_share: float = 1.0
    return_share: float = 0.5
    diurnal: float = 0.3
    seed: int = 1
    gateways: int = 32
    regions: int = 4
    copies: int | None = None
    early_rejection: bool = True
    detect_s: float = 3.0
    gossip_s: float = 1.0
    view_age_s: float = 2.0
    view_nodes_max: int = 48
    plan_every_s: float = 2.0
    second_thoughts_s: float = 300.0
    adopt_s: float = 1.0
    patience_s: float = 60.0
    retry_s: float = 0.5
    retry_s_most: float = 4.0
    chunk_tokens: int = 512
    slice_s: float = 0.04
    round_tokens: int = 16
    region_latency_s: float = 0.004
    between_latency_s: float = 0.035
    line_mbps_least: float = 100.0
    line_mbps_most: float = 1000.0
    load_read_bytes_per_s: float = 1.0e9
    latency_s: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError("policy", self.policy, "one of " + ", ".join(POLICIES))
        for name in ("nodes", "gateways", "regions", "view_nodes_max", "chunk_tokens", "round_tokens"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "at least 1")
        for name in ("crash_share", "return_share", "diurnal"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, getattr(self, name), "between 0 and 1")
        self._check_latency()
        shares = {"crash_share", "return_share", "diurnal", "churn_per_hour", "detect_s"}
        shares |= {"region_latency_s", "between_latency_s", "drain_s", "view_age_s", "adopt_s", "slice_s"}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, float):
                continue
            least_is_zero = field.name in shares
            if not (value >= 0 if least_is_zero else value > 0) or value == float("inf"):
                raise InputError(field.name, value, "at least 0" if least_is_zero else "above 0")

    def _check_latency(self) -> None:
        rows = self.latency_s
        if rows is None:
            return
        if len(rows) != self.regions or any(len(row) != self.regions for row in rows):
            raise InputError(
                "latency_s", [len(row) for row in rows], f"{self.regions} rows of {self.regions} figures"
            )
        if any(not 0 <= each < float("inf") for row in rows for each in row):
            raise InputError("latency_s", rows, "no figure below 0")
