"""What a node says about itself and its models in the mesh: the values inside dht's signed records.

`node` (one a node): what it is and where. `model` (one a model and host): shape and manifest. `adapter` (one an adapter
and host): manifest and base. `host` (one a model and device): which span it holds and how busy it is. `plan` (one a
model and planner): who shall hold what. `links`: round trips and rates as measured. `run` (one a run and member): how
training fares there. Bytes from a peer become a frozen dataclass whose every figure is within bounds that an honest
node keeps, or nothing; texts lose what a terminal would act on. Nothing here decides anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from node.config import DTYPES, KV_QUANTS, NAME_PATTERN, QUANTS, TAG_PATTERN, TAGS_MAX
from p2p import RemoteFault, pack_value, unpack_value
from scheduler import Assignment, ModelShape, Plan, Policy, device_id

T = TypeVar("T")

NODE, MODEL, ADAPTER, HOST, PLAN, LINKS, RUN = "node", "model", "adapter", "host", "plan", "links", "run"
RunState = Literal["starting", "training", "stuck", "resting", "done", "failed"]
SpanState = Literal["fetching", "loading", "ready", "failed"]
LAYERS_MAX = 1024
CONTEXT_TOKENS_MAX = 1 << 24
COUNT_MAX = 1 << 60
RATE_MAX = 1e24
SECONDS_MAX = 86_400.0
EPOCH_MAX = 1 << 53
SPANS_MAX = 4096
LINKS_MAX = 4096
ADDRS_MAX = 32
TEXT_CHARS_MAX = 500
DEVICES_MAX = 64
CLASSES_MAX = 8
CLASSES_MAX = 8
PREFIX_BYTES_MAX = 1024
URL = re.compile(r"https?://[\x21-\x7e]{1,240}")
MANIFEST_ID = re.compile(r"[0-9a-f]{64}")
HOST_ID = re.compile(r"[0-9A-Za-z]{1,128}(#[1-9][0-9]?)?")


@dataclass(frozen=True, slots=True)
class DeviceAdvert:
    """One of several devices of a node: memory lent to models, operations and bytes read a second."""

    device: str
    memory_bytes: int
    flops_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NodeAdvert:
    """A node's identity card. `pinned` is the span its owner fixed by hand (`--layers`), for every model.

    `life` is drawn at each start: what a node said of its spans before it crashed does not count once it is back.
    `devices` is empty where there is but one. `tags` are the owner's own words about the node (see scheduler.policy);
    `region` is where it stands, so that links which nobody measured can be guessed.
    """

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
    life: str = ""
    region: str = ""
    tags: tuple[str, ...] = ()
    devices: tuple[DeviceAdvert, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelAdvert:
    """A model of the mesh. The dtype and quantisation, of weights and of the cache, hold for every host, so that all
    copies compute alike.

    `require`, `ends_require` and `avoid` are tags that its hosts must have, those of the first and last layer must
    have, and none may have.
    """

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
    working_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_bytes: int = 0
    require: tuple[str, ...] = ()
    ends_require: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    kv_quant: str = "none"

    def policy(self) -> Policy:
        """Which tags its hosts must have."""
        return Policy(frozenset(self.require), frozenset(self.ends_require), frozenset(self.avoid))

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
            working_bytes=self.working_bytes,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            expert_bytes=self.expert_bytes,
        )


@dataclass(frozen=True, slots=True)
class AdapterAdvert:
    """A LoRA adapter over the model whose manifest is `base`: the hosts of that serve it, too. `size_bytes` is its
    file's."""

    name: str
    manifest_id: str
    created_s: int
    base: str
    size_bytes: int = 0


Offer = ModelAdvert | AdapterAdvert
"""What members offer by name, and whoever added it may drop."""


@dataclass(frozen=True, slots=True)
class HostAdvert:
    """A span [start, end) of one model on one device of a node, and how it fares.

    `decode_s_per_layer` (a step of single tokens; `s_per_layer` is the same) and `prefill_s_per_token_per_layer` are as
    seen just now, for chains; `plan_s_per_layer` is what decode takes in the long run, for plans. All are 0 until
    measured. `busy` is the share of the time that the device spent on this span of late. `queue_by_class_s` is the work
    of prompts waiting, by priority, the most urgent first. Of the room in use background sessions would give
    `kv_tokens_yielding` back. `prefixes` are marks of prompts in its cache, one after another.
    """

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
    life: str = ""
    decode_s_per_layer: float = 0.0
    prefill_s_per_token_per_layer: float = 0.0
    busy: float = 0.0
    queue_by_class_s: tuple[float, ...] = ()
    kv_tokens_yielding: int = 0
    prefixes: bytes = b""
    plan_s_per_layer: float = 0.0


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
    """Round trips in seconds that this node measured, and bytes a second that came in large transfers, by peer."""

    rtt_s: dict[str, float]
    bytes_per_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunAdvert:
    """What one member says of a training run, whose files `manifest_id` names. Of a `generation`, begun by `founder`,
    all members hold the same state; a new one begins where too few of the last are left. `epoch` counts outer steps and
    `tokens` what all trained, both since the run was created; `claim` is the member's lane of the data. `loss` in nats
    a token, negative where it is not known yet. `computing` is the share of the time spent on inner steps."""

    name: str
    manifest_id: str
    state: RunState
    generation: int
    founder: str
    epoch: int
    tokens: float
    claim: int
    members: int = 0
    loss: float = -1.0
    val_loss: float = -1.0
    tokens_per_s: float = 0.0
    computing: float = 0.0
    rounds: int = 0
    rounds_whole: int = 0
    detail: str = ""

    @property
    def order(self) -> tuple[int, str]:
        """Of two generations that both go on, the lower one counts."""
        return self.generation, self.founder


def host_name(manifest_id: str, device: int) -> str:
    """The name of the record about a model's span on one of the node's devices."""
    return device_id(manifest_id, device)


def host_of(record_name: str, signer: str) -> tuple[str, str] | None:
    """(manifest id, host as plans name it) of a `host` record, or None where the name is no such name."""
    manifest_id, mark, number = record_name.partition("#")
    if not mark:
        return manifest_id, signer
    if not number.isdecimal() or not number.isascii() or not 0 < int(number[:9]) < DEVICES_MAX:
        return None
    return manifest_id, device_id(signer, int(number[:9]))


def read(kind: type[T], value: bytes) -> T | None:
    """The advert in a record's value, or None where a peer published something else, or nonsense, under that kind."""
    try:
        advert: Any = unpack_value(kind, value)
    except RemoteFault:
        return None
    cleaned: T | None = _CLEANERS[kind](advert)
    return cleaned


def read_offer(kind: str, value: bytes) -> Offer | None:
    """The model or adapter in the value of a record of that kind, or None."""
    return read(AdapterAdvert, value) if kind == ADAPTER else read(ModelAdvert, value)


def offer_kind(offer: Offer) -> str:
    """The kind of records that tell of it."""
    return ADAPTER if isinstance(offer, AdapterAdvert) else MODEL


def write(advert: object) -> bytes:
    """An advert as a record's value."""
    return pack_value(advert)


def plain(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """A peer's text as one printable line: no escape sequences for whoever reads it in a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:chars_max])


def _all_within(pairs: tuple[tuple[float, float, float], ...]) -> bool:
    """Whether every (value, low, high) is in order; false for NaN."""
    return all(low <= value <= high for value, low, high in pairs)


def _tags(*groups: tuple[str, ...]) -> bool:
    return all(len(tags) <= TAGS_MAX and all(TAG_PATTERN.fullmatch(tag) for tag in tags) for tags in groups)


def _span(start: int, end: int) -> bool:
    return 0 <= start < end <= LAYERS_MAX


def _clean_node(advert: NodeAdvert) -> NodeAdvert | None:
    pinned = advert.pinned
    if pinned is not None and not (len(pinned) == 2 and 0 <= pinned[0] < pinned[1] <= 99_999):
        return None
    sane = _all_within(
        (
            (len(advert.addrs), 0, ADDRS_MAX),
            (advert.memory_bytes, 0, COUNT_MAX),
            (advert.flops_per_s, 0.0, RATE_MAX),
            (advert.read_bytes_per_s, 0.0, RATE_MAX),
            (len(advert.devices), 0, DEVICES_MAX),
            *((d.memory_bytes, 0, COUNT_MAX) for d in advert.devices),
            *((d.flops_per_s, 0.0, RATE_MAX) for d in advert.devices),
            *((d.read_bytes_per_s, 0.0, RATE_MAX) for d in advert.devices),
        )
    )
    if not sane or not _tags(advert.tags):
        return None
    return replace(
        advert,
        name=plain(advert.name, 63),
        version=plain(advert.version, 32),
        device=plain(advert.device, 32),
        region=plain(advert.region, 63),
        devices=tuple(replace(d, device=plain(d.device, 32)) for d in advert.devices),
        addrs=tuple(a for a in advert.addrs if len(a) <= 256 and a.isascii() and a.isprintable()),
        api=advert.api if advert.api is not None and URL.fullmatch(advert.api) else None,
    )


def _clean_model(advert: ModelAdvert) -> ModelAdvert | None:
    named = NAME_PATTERN.fullmatch(advert.name) and MANIFEST_ID.fullmatch(advert.manifest_id)
    if (
        not named
        or advert.dtype not in DTYPES[1:]
        or advert.quant not in QUANTS
        or advert.kv_quant not in KV_QUANTS
    ):
        return None
    sane = _all_within(
        (
            (advert.created_s, 0, 1 << 40),
            (advert.copies, 1, 64),
            (advert.concurrency, 1, 4096),
            (advert.context_tokens, 1, CONTEXT_TOKENS_MAX),
            (advert.layers, 1, LAYERS_MAX),
            (advert.layer_bytes, 1, 1 << 50),
            (advert.embed_bytes, 0, 1 << 50),
            (advert.head_bytes, 0, 1 << 50),
            (advert.layer_flops_per_token, 0.0, RATE_MAX),
            (advert.hidden_bytes, 1, 1 << 30),
            (advert.kv_bytes_per_token_per_layer, 0, 1 << 40),
            (advert.working_bytes, 0, 1 << 50),
            (advert.experts, 0, 1 << 20),
            (advert.experts_per_token, 0, advert.experts),
            (advert.expert_bytes, 0, 1 << 50),
            (advert.experts * advert.expert_bytes, 0, advert.layer_bytes),
        )
    )
    return advert if sane and _tags(advert.require, advert.ends_require, advert.avoid) else None


def _clean_adapter(advert: AdapterAdvert) -> AdapterAdvert | None:
    named = NAME_PATTERN.fullmatch(advert.name) and MANIFEST_ID.fullmatch(advert.manifest_id)
    if not named or not MANIFEST_ID.fullmatch(advert.base) or advert.base == advert.manifest_id:
        return None
    return advert if _all_within(((advert.created_s, 0, 1 << 40), (advert.size_bytes, 0, 1 << 50))) else None


def _clean_host(advert: HostAdvert) -> HostAdvert | None:
    counts = (
        advert.bytes_fetched,
        advert.bytes_wanted,
        advert.sessions,
        advert.kv_tokens_free,
        advert.kv_tokens_yielding,
    )
    sane = _span(advert.start, advert.end) and _all_within(
        (
            *((count, 0, COUNT_MAX) for count in counts),
            (advert.epoch, 0, EPOCH_MAX),
            (advert.progress, 0.0, 1.0),
            (advert.s_per_layer, 0.0, SECONDS_MAX),
            (advert.queue_s, 0.0, SECONDS_MAX),
            (advert.tokens_per_s, 0.0, RATE_MAX),
            (advert.decode_s_per_layer, 0.0, SECONDS_MAX),
            (advert.prefill_s_per_token_per_layer, 0.0, SECONDS_MAX),
            (advert.busy, 0.0, 1.0),
            (advert.plan_s_per_layer, 0.0, SECONDS_MAX),
            (len(advert.queue_by_class_s), 0, CLASSES_MAX),
            *((seconds, 0.0, SECONDS_MAX) for seconds in advert.queue_by_class_s),
            (len(advert.prefixes), 0, PREFIX_BYTES_MAX),
        )
    )
    return replace(advert, detail=plain(advert.detail)) if sane else None


def _clean_plan(advert: PlanAdvert) -> PlanAdvert | None:
    nodes = [span.node for span in advert.spans]
    sane = _all_within(((advert.epoch, 0, EPOCH_MAX), (len(nodes), 0, SPANS_MAX)))
    if not sane or len(set(nodes)) != len(nodes):
        return None
    if not all(_span(span.start, span.end) and HOST_ID.fullmatch(span.node) for span in advert.spans):
        return None
    return replace(advert, shortage=plain(advert.shortage))


def _clean_run(advert: RunAdvert) -> RunAdvert | None:
    named = NAME_PATTERN.fullmatch(advert.name) and MANIFEST_ID.fullmatch(advert.manifest_id)
    if not named or not HOST_ID.fullmatch(advert.founder):
        return None
    sane = _all_within(
        (
            *((count, 0, EPOCH_MAX) for count in (advert.generation, advert.epoch, advert.claim)),
            *((count, 0, EPOCH_MAX) for count in (advert.members, advert.rounds, advert.rounds_whole)),
            *((rate, 0.0, RATE_MAX) for rate in (advert.tokens, advert.tokens_per_s)),
            *((loss, -1.0, RATE_MAX) for loss in (advert.loss, advert.val_loss)),
            (advert.computing, 0.0, 1.0),
        )
    )
    return replace(advert, detail=plain(advert.detail)) if sane else None


def _clean_links(advert: LinksAdvert) -> LinksAdvert | None:
    if max(len(advert.rtt_s), len(advert.bytes_per_s)) > LINKS_MAX:
        return None
    return LinksAdvert(
        {peer: rtt for peer, rtt in advert.rtt_s.items() if 0.0 <= rtt <= 60.0},
        {peer: rate for peer, rate in advert.bytes_per_s.items() if 1.0 <= rate <= 1e15},
    )


_CLEANERS: dict[Any, Callable[[Any], Any]] = {
    NodeAdvert: _clean_node,
    ModelAdvert: _clean_model,
    AdapterAdvert: _clean_adapter,
    HostAdvert: _clean_host,
    PlanAdvert: _clean_plan,
    LinksAdvert: _clean_links,
    RunAdvert: _clean_run,
}
