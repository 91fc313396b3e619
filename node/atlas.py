"""This node's reading of the mesh view: nodes, models, hosts, plans and links as typed values.

Pure: it reads dht records and a set of suspects (peers whose connection broke and that have not come back) and answers
questions. It sends nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from dht import Record, View
from node import adverts
from node.adverts import HostAdvert, LinksAdvert, ModelAdvert, NodeAdvert, PlanAdvert
from scheduler import Hosted, Link, Links

T = TypeVar("T")
LINK_DEFAULT_S = 0.005
LINK_DEFAULT_BYTES_PER_S = 12.5e6
S_PER_LAYER_DEFAULT = 1e-3


@dataclass(frozen=True, slots=True)
class Atlas:
    """A snapshot of the mesh at one instant. Suspects are left out of everything but `nodes_known`."""

    nodes_known: dict[str, NodeAdvert]
    suspects: frozenset[str]
    models: dict[str, ModelAdvert]
    hosts: dict[str, dict[str, HostAdvert]]
    plans: dict[str, list[tuple[str, PlanAdvert]]]
    rtt_s: dict[tuple[str, str], float]

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
                s_per_layer=host.s_per_layer or S_PER_LAYER_DEFAULT,
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


def read_atlas(view: View, now_s: float, suspects: Collection[str] = ()) -> Atlas:
    """Read the whole view once. Where two models claim a name, the older one keeps it (ties: by manifest id)."""
    models: dict[str, ModelAdvert] = {}
    for _, model in _typed(view, now_s, adverts.MODEL, ModelAdvert):
        known = models.get(model.name)
        if known is None or (model.created_s, model.manifest_id) < (known.created_s, known.manifest_id):
            models[model.name] = model
    hosts: dict[str, dict[str, HostAdvert]] = {}
    for record, host in _typed(view, now_s, adverts.HOST, HostAdvert):
        hosts.setdefault(record.name, {})[record.signer] = host
    plans: dict[str, list[tuple[str, PlanAdvert]]] = {}
    for record, plan in _typed(view, now_s, adverts.PLAN, PlanAdvert):
        plans.setdefault(record.name, []).append((record.signer, plan))
    rtts: dict[tuple[str, str], float] = {}
    for record, links in _typed(view, now_s, adverts.LINKS, LinksAdvert):
        rtts.update({(record.signer, peer): rtt for peer, rtt in links.rtt_s.items() if 0 <= rtt < 60})
    nodes: dict[str, NodeAdvert] = {
        str(record.signer): node for record, node in _typed(view, now_s, adverts.NODE, NodeAdvert)
    }
    return Atlas(nodes, frozenset(suspects), models, hosts, plans, rtts)
