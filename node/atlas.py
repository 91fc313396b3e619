"""This node's reading of the mesh view: nodes, models, hosts, plans and links as typed values.

Pure: it reads dht records and a set of suspects (peers whose connection broke and that have not come back) and answers
questions. It sends nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dht import Record, View
from node import adverts
from node.adverts import HostAdvert, LinksAdvert, ModelAdvert, NodeAdvert, PlanAdvert
from scheduler import Hosted, Link, Links

T = TypeVar("T")
LINK_DEFAULT_S = 0.005
LINK_DEFAULT_BYTES_PER_S = 12.5e6
S_PER_LAYER_DEFAULT = 1e-3
S_PER_LAYER_LEAST = 1e-7
MODELS_PER_SIGNER_MAX = 16
MODELS_MAX = 64
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

    @property
    def nodes(self) -> dict[str, NodeAdvert]:
        """Live nodes by peer id."""
        return {peer: node for peer, node in self.nodes_known.items() if peer not in self.suspects}

    def model_named(self, name: str) -> ModelAdvert | None:
        """The model of that name, or whose manifest id it is."""
        return self.models.get(name) or next((m for m in self.models.values() if m.manifest_id == name), None)

    def live_hosts(self, manifest_id: str) -> dict[str, HostAdvert]:
        """Hosts of a model that are neither gone nor suspect."""
        return {p: h for p, h in self.hosts.get(manifest_id, {}).items() if p in self.nodes}

    def copies(self, model: ModelAdvert) -> list[int]:
        """How many ready live hosts each layer has, [layers]."""
        counts = [0] * model.layers
        for host in self.live_hosts(model.manifest_id).values():
            if host.state == "ready":
                for layer in range(max(0, host.start), min(host.end, model.layers)):
                    counts[layer] += 1
        return counts

    def hosted(self, model: ModelAdvert, exclude: Collection[str] = ()) -> list[Hosted]:
        """Ready spans as phase 2 wants them."""
        return [
            Hosted(
                node=peer,
                start=host.start,
                end=min(host.end, model.layers),
                s_per_layer=max(host.s_per_layer or S_PER_LAYER_DEFAULT, S_PER_LAYER_LEAST),
                queue_s=host.queue_s,
                kv_tokens_free=host.kv_tokens_free,
            )
            for peer, host in sorted(self.live_hosts(model.manifest_id).items())
            if host.state == "ready" and 0 <= host.start < min(host.end, model.layers) and peer not in exclude
        ]

    def links(self) -> Links:
        """Latency one way and bandwidth between two nodes, from what either end measured."""

        def link(a: str, b: str) -> Link:
            if a == b:
                return Link(0.0, 1e12)
            rtt_s = self.rtt_s.get((a, b), self.rtt_s.get((b, a)))
            return Link(LINK_DEFAULT_S if rtt_s is None else rtt_s / 2, LINK_DEFAULT_BYTES_PER_S)

        return link


def _typed(view: View, now_s: float, kind: str, cls: type[T]) -> list[tuple[Record, T]]:
    pairs = [(record, adverts.read(cls, record.value)) for record in view.records(kind, now_s)]
    return [(record, advert) for record, advert in pairs if advert is not None]


def _models(pairs: Iterable[tuple[Record, ModelAdvert]]) -> tuple[dict[str, ModelAdvert], dict[str, int]]:
    """Models by name, and how many offer each. Whoever hosts a model offers it, so that of several claims to a name the
    one that most members stand behind holds; ties go to the older one, then by manifest id."""
    voters: dict[ModelAdvert, int] = {}
    said: dict[str, int] = {}
    for record, model in pairs:
        said[record.signer] = said.get(record.signer, 0) + 1
        if record.name == model.name and said[record.signer] <= MODELS_PER_SIGNER_MAX:
            voters[model] = voters.get(model, 0) + 1
    models: dict[str, ModelAdvert] = {}
    ids: set[str] = set()
    for model in sorted(voters, key=lambda m: (-voters[m], m.created_s, m.manifest_id, repr(m))):
        if model.name not in models and model.manifest_id not in ids and len(ids) < MODELS_MAX:
            models[model.name] = model
            ids.add(model.manifest_id)
    return models, {model.manifest_id: voters[model] for model in models.values()}


def read_atlas(view: View, now_s: float, suspects: Collection[str] = ()) -> Atlas:
    """Read the whole view once. `now_s` is the mesh's time, not this computer's."""
    models, offers = _models(_typed(view, now_s, adverts.MODEL, ModelAdvert))
    plans: dict[str, list[tuple[str, PlanAdvert]]] = {}
    for record, plan in _typed(view, now_s, adverts.PLAN, PlanAdvert):
        if plan.epoch <= now_s * 1000 + EPOCH_AHEAD_MS:
            plans.setdefault(record.name, []).append((record.signer, plan))
    rtts: dict[tuple[str, str], float] = {}
    for record, links in _typed(view, now_s, adverts.LINKS, LinksAdvert):
        if record.name:
            continue
        rtts.update({(record.signer, peer): rtt for peer, rtt in links.rtt_s.items()})
    nodes: dict[str, NodeAdvert] = {}
    for record, node in _typed(view, now_s, adverts.NODE, NodeAdvert):
        if record.name:
            continue
        own = tuple(addr for addr in node.addrs if addr.endswith(f"/p2p/{record.signer}"))
        nodes[str(record.signer)] = replace(node, addrs=own)
    hosts: dict[str, dict[str, HostAdvert]] = {}
    for record, host in _typed(view, now_s, adverts.HOST, HostAdvert):
        card = nodes.get(record.signer)
        if card is None or card.life == host.life:
            hosts.setdefault(record.name, {})[record.signer] = host
    return Atlas(nodes, frozenset(suspects), models, hosts, plans, rtts, offers)
