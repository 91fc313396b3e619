"""This node's reading of the mesh view: nodes, models, hosts, plans and links as typed values.

Pure: it reads dht records and a set of suspects (peers whose connection broke and that have not come back) and answers
questions. It sends nothing and decides nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dht import Record, View
from node import adverts
from node.adverts import (
    AdapterAdvert,
    HostAdvert,
    LinksAdvert,
    ModelAdvert,
    NodeAdvert,
    Offer,
    PlanAdvert,
    host_of,
)
from scheduler import Hosted, Link, Links, NodeShape, device_id, node_of, slowdown

T = TypeVar("T")
O = TypeVar("O", ModelAdvert, AdapterAdvert)
LINK_DEFAULT_S = 0.005
LINK_DEFAULT_BYTES_PER_S = 12.5e6
S_PER_LAYER_DEFAULT = 1e-3
S_PER_LAYER_LEAST = 1e-7
MODELS_PER_SIGNER_MAX = 16
MODELS_MAX = 64
ADAPTERS_PER_SIGNER_MAX = 64
ADAPTERS_MAX = 256
EPOCH_AHEAD_MS = 60_000
"""No plan's epoch is above the mesh's clock in milliseconds (and a minute for clocks that differ), so that whatever a
member claims there is always a greater one left for the next planner."""


@dataclass(frozen=True, slots=True)
class Atlas:
    """A snapshot of the mesh at one instant. Suspects are left out of everything but `nodes_known`."""

    nodes_known: dict[str, NodeAdvert]
    suspects: frozenset[str]
    models: dict[str, ModelAdvert]
    hosts: dict[str, dict[str, HostAdvert]]
    plans: dict[str, list[tuple[str, PlanAdvert]]]
    rtt_s: dict[tuple[str, str], float]
    offers: dict[str, int] = field(default_factory=dict)
    """How many members offer each model of `models`, by manifest id."""
    bytes_per_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """Measured in large transfers, by (from, to)."""
    adapters: dict[str, AdapterAdvert] = field(default_factory=dict)
    """By name; none has a model's name."""

    @property
    def nodes(self) -> dict[str, NodeAdvert]:
        """Live nodes by peer id."""
        return {peer: node for peer, node in self.nodes_known.items() if peer not in self.suspects}

    def model_named(self, name: str) -> ModelAdvert | None:
        """The model of that name, or whose manifest id it is."""
        return self.models.get(name) or next((m for m in self.models.values() if m.manifest_id == name), None)

    def served_as(self, name: str) -> tuple[ModelAdvert, AdapterAdvert | None] | None:
        """What a request for `name` gets: a model, or an adapter (`adapter` or `model:adapter`) and its base."""
        model = self.model_named(name)
        if model is not None:
            return model, None
        bases = {model.manifest_id: model for model in self.models.values()}
        for adapter in self.adapters.values():
            base = bases.get(adapter.base)
            if base is None:
                continue
            if name in (adapter.name, adapter.manifest_id, f"{base.name}:{adapter.name}"):
                return base, adapter
        return None

    def live_hosts(self, manifest_id: str) -> dict[str, HostAdvert]:
        """Hosts of a model that are neither gone nor suspect, by device."""
        live = self.nodes
        return {p: h for p, h in self.hosts.get(manifest_id, {}).items() if node_of(p) in live}

    def copies(self, model: ModelAdvert) -> list[int]:
        """How many ready live hosts each layer has that may serve it, [layers]."""
        counts = [0] * model.layers
        for host in self.hosted(model):
            for layer in range(host.start, host.end):
                counts[layer] += 1
        return counts

    def hosted(self, model: ModelAdvert, exclude: Collection[str] = ()) -> list[Hosted]:
        """Ready spans as phase 2 wants them: those that the model's policy allows, slower where the owner is busy."""
        policy, found = model.policy(), []
        nodes = self.nodes
        for host, advert in sorted(self.live_hosts(model.manifest_id).items()):
            peer, end = node_of(host), min(advert.end, model.layers)
            if advert.state != "ready" or not 0 <= advert.start < end or peer in exclude:
                continue
            shape = device_shapes(peer, nodes[peer])[0]
            start, end = _allowed(
                advert.start, end, model.layers, policy.allows(shape), policy.allows_ends(shape)
            )
            if start >= end:
                continue
            slow = slowdown(shape)
            decode_s = advert.s_per_layer or S_PER_LAYER_DEFAULT
            found.append(
                Hosted(
                    node=peer,
                    start=start,
                    end=end,
                    s_per_layer=slow * max(decode_s, S_PER_LAYER_LEAST),
                    queue_s=advert.queue_s,
                    kv_tokens_free=advert.kv_tokens_free,
                    prefill_s_per_token_per_layer=slow * advert.prefill_s_per_token_per_layer,
                    queue_by_class_s=advert.queue_by_class_s,
                )
            )
        return found

    def links(self) -> Links:
        """Latency one way and bandwidth between two nodes, from what either end measured; what nobody measured is taken
        for the median of what was between their regions."""
        between = _by_regions(self.nodes_known, self.rtt_s)

        def link(a: str, b: str) -> Link:
            a, b = node_of(a), node_of(b)
            if a == b:
                return Link(0.0, 1e12)
            rtt_s = self.rtt_s.get((a, b), self.rtt_s.get((b, a)))
            if rtt_s is None:
                rtt_s = between.get(_regions(self.nodes_known, a, b), 2 * LINK_DEFAULT_S)
            rate = self.bytes_per_s.get((a, b), self.bytes_per_s.get((b, a), LINK_DEFAULT_BYTES_PER_S))
            return Link(rtt_s / 2, rate)

        return link


def device_shapes(peer: str, node: NodeAdvert) -> list[NodeShape]:
    """A node as phase 1 sees it: one host for each of its devices. A node that does not serve has no memory to lend,
    but may plan; a pinned one serves on its first device."""
    pinned = None
    if node.serves and node.pinned is not None and len(node.pinned) == 2:
        pinned = node.pinned[0], node.pinned[1]
    figures = [(d.memory_bytes, d.flops_per_s, d.read_bytes_per_s) for d in node.devices]
    figures = figures or [(node.memory_bytes, node.flops_per_s, node.read_bytes_per_s)]
    return [
        NodeShape(
            id=device_id(peer, k),
            memory_bytes=memory_bytes if node.serves else 0,
            flops_per_s=flops_per_s,
            read_bytes_per_s=read_bytes_per_s,
            region=node.region,
            tags=frozenset(node.tags),
            pinned=pinned,
        )
        for k, (memory_bytes, flops_per_s, read_bytes_per_s) in enumerate(figures[: 1 if pinned else None])
    ]


def _allowed(start: int, end: int, layers: int, any_layer: bool, ends: bool) -> tuple[int, int]:
    """The part of a span that a policy leaves its host: without the first and last layer where those need more."""
    if not any_layer:
        return start, start
    return (start, end) if ends else (max(start, 1), min(end, layers - 1))


def _regions(nodes: dict[str, NodeAdvert], a: str, b: str) -> tuple[str, str]:
    found = sorted(nodes[name].region if name in nodes else "" for name in (a, b))
    return found[0], found[1]


def _by_regions(
    nodes: dict[str, NodeAdvert], rtt_s: dict[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """The median round trip between each two regions (or within one); nodes that name none are no region."""
    seen: dict[tuple[str, str], list[float]] = {}
    if any(node.region for node in nodes.values()):
        for (a, b), rtt in rtt_s.items():
            regions = _regions(nodes, a, b)
            if all(regions):
                seen.setdefault(regions, []).append(rtt)
    return {regions: statistics.median(found) for regions, found in seen.items()}


def _typed(view: View, now_s: float, kind: str, cls: type[T]) -> list[tuple[Record, T]]:
    pairs = [(record, adverts.read(cls, record.value)) for record in view.records(kind, now_s)]
    return [(record, advert) for record, advert in pairs if advert is not None]


def _offered(
    pairs: Iterable[tuple[Record, O]],
    dropped: Callable[[Offer], bool],
    per_signer_max: int,
    count_max: int,
    taken: Collection[str] = (),
) -> tuple[dict[str, O], dict[str, int]]:
    """Models (or adapters) by name, and how many offer each; none whose name is `taken`. Whoever hosts one offers it,
    so that of several claims to a name the one that most members stand behind holds; ties go to the older one, then by
    manifest id."""
    voters: dict[O, int] = {}
    said: dict[str, int] = {}
    for record, offer in pairs:
        said[record.signer] = said.get(record.signer, 0) + 1
        counts = record.name == offer.name and said[record.signer] <= per_signer_max
        if counts and offer.name not in taken and not dropped(offer):
            voters[offer] = voters.get(offer, 0) + 1
    found: dict[str, O] = {}
    ids: set[str] = set()
    for offer in sorted(voters, key=lambda o: (-voters[o], o.created_s, o.manifest_id, repr(o))):
        if offer.name not in found and offer.manifest_id not in ids and len(ids) < count_max:
            found[offer.name] = offer
            ids.add(offer.manifest_id)
    return found, {offer.manifest_id: voters[offer] for offer in found.values()}


def read_atlas(
    view: View,
    now_s: float,
    suspects: Collection[str] = (),
    dropped: Callable[[Offer], bool] = lambda _: False,
) -> Atlas:
    """Read the whole view once, without offers that are `dropped`. `now_s` is the mesh's time, not this computer's."""
    models, offers = _offered(
        _typed(view, now_s, adverts.MODEL, ModelAdvert), dropped, MODELS_PER_SIGNER_MAX, MODELS_MAX
    )
    told = _typed(view, now_s, adverts.ADAPTER, AdapterAdvert)
    adapters, _ = _offered(told, dropped, ADAPTERS_PER_SIGNER_MAX, ADAPTERS_MAX, taken=models)
    plans: dict[str, list[tuple[str, PlanAdvert]]] = {}
    for record, plan in _typed(view, now_s, adverts.PLAN, PlanAdvert):
        if plan.epoch <= now_s * 1000 + EPOCH_AHEAD_MS:
            plans.setdefault(record.name, []).append((record.signer, plan))
    rtts: dict[tuple[str, str], float] = {}
    rates: dict[tuple[str, str], float] = {}
    for record, links in _typed(view, now_s, adverts.LINKS, LinksAdvert):
        if record.name:
            continue
        rtts.update({(record.signer, peer): rtt for peer, rtt in links.rtt_s.items()})
        rates.update({(peer, record.signer): rate for peer, rate in links.bytes_per_s.items()})
    nodes: dict[str, NodeAdvert] = {}
    for record, node in _typed(view, now_s, adverts.NODE, NodeAdvert):
        if record.name:
            continue
        own = tuple(addr for addr in node.addrs if addr.endswith(f"/p2p/{record.signer}"))
        nodes[str(record.signer)] = replace(node, addrs=own)
    hosts: dict[str, dict[str, HostAdvert]] = {}
    for record, host in _typed(view, now_s, adverts.HOST, HostAdvert):
        card = nodes.get(record.signer)
        named = host_of(record.name, record.signer)
        if named is not None and (card is None or card.life == host.life):
            hosts.setdefault(named[0], {})[named[1]] = host
    return Atlas(nodes, frozenset(suspects), models, hosts, plans, rtts, offers, rates, adapters)
