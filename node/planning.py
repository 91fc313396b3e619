"""Phase 1 as each node runs it: the mesh view in, plans to hold to and to publish out. A thin core over `scheduler`.

All decisions are `scheduler.MeshPlanner`'s: who plans, which plan holds, what moves. Here the view becomes its events:
nodes and their devices with tags, regions and how likely they are to stay, models with what is asked of them, hosts
with their measured times, and the plans that others published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from node.adverts import HostAdvert, ModelAdvert, PlanAdvert
from node.atlas import Atlas, device_shapes
from node.demand import Demand
from node.presence import Presence
from scheduler import Assignment, Facts, Link, Links, MeshPlanner, NodeShape, Plan, Wanted
from scheduler.online import (
    Event,
    Joined,
    Left,
    ModelAdded,
    ModelDropped,
    Observed,
    PlanSeen,
    Prospect,
    ReportShortage,
    Tick,
)

REBALANCE_S = 60.0
SPANS_KEPT = 3
"""So many spans that a host once held are still thought to be on its disk."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Instruction: publish this plan for a model under our own signature."""

    manifest_id: str
    advert: PlanAdvert


@dataclass(slots=True)
class _Told:
    """What the planner was told last."""

    nodes: dict[str, NodeShape] = field(default_factory=dict)
    models: dict[str, Wanted] = field(default_factory=dict)
    held: dict[str, dict[str, list[tuple[int, int]]]] = field(default_factory=dict)


class Planning:
    """The plans this node holds to. `handle(atlas)` adopts what others published and says what to publish.

    `fences` are by model the epoch and planner of the newest plan held to in an earlier life, `remembered` its spans.
    """

    def __init__(
        self,
        me: str,
        *,
        rebalance_s: float = REBALANCE_S,
        fences: Mapping[str, tuple[int, str]] | None = None,
        remembered: Mapping[str, Sequence[Assignment]] | None = None,
    ) -> None:
        self._me = me
        self._links: Links = lambda _a, _b: Link(0.0, 1e12)
        self._planner = MeshPlanner(
            me, self._link, second_thoughts_s=rebalance_s, fences=fences, remembered=remembered
        )
        self._demand = Demand(rebalance_s)
        self._presence = Presence()
        self._told = _Told()
        self.plans: dict[str, Plan] = {}
        self.shortages: dict[str, str] = {}

    @property
    def fences(self) -> dict[str, tuple[int, str]]:
        """What a next life must not go back behind."""
        return self._planner.fences

    @property
    def first(self) -> str:
        """Who plans, as far as this node knows."""
        return self._planner.first

    def handle(self, atlas: Atlas, *, may_plan: bool, now_s: float = 0.0) -> list[Publish]:
        """Adopt, then plan where it is our turn. `may_plan` is False until our view is that of the mesh."""
        self._links = atlas.links()
        said = self._planner.handle_all(self._events(atlas, now_s), now_s, may_plan=may_plan)
        self.plans = self._planner.held
        out = []
        for instruction in said:
            short = str(instruction.shortage) if isinstance(instruction, ReportShortage) else ""
            manifest_id = instruction.plan.model
            self.shortages[manifest_id] = short
            out.append(Publish(manifest_id, replace(PlanAdvert.of(instruction.plan), shortage=short)))
        self._note_shortages(atlas)
        return out

    def span_of(self, manifest_id: str, host: str) -> tuple[int, int] | None:
        """What `host` (a node, or a further device of one) shall hold of a model under the plan we hold to."""
        plan = self.plans.get(manifest_id)
        return None if plan is None else plan.span(host)

    def preview(self, model: ModelAdvert, copies: int) -> Prospect:
        """What would go where if the model were wanted with so many copies. Raises Shortage."""
        return self._planner.preview(model.manifest_id, replace(self._wanted(model, 0), copies=copies))

    def shape(self, host: str) -> NodeShape | None:
        """The figures that a host is planned with."""
        return self._planner.nodes.get(host)

    def _link(self, a: str, b: str) -> Link:
        return self._links(a, b)

    def _events(self, atlas: Atlas, now_s: float) -> list[Event]:
        self._presence.note([*atlas.nodes, self._me], now_s)
        events: list[Event] = [*self._node_events(atlas), *self._model_events(atlas)]
        self._demand.keep_only(self._told.models)
        for model in atlas.models.values():
            hosts = atlas.live_hosts(model.manifest_id)
            self._demand.note(model.manifest_id, model.layers, model.concurrency, hosts.values(), now_s)
            most = self._demand.copies_max(model.manifest_id, model.copies)
            facts = replace(facts_of(hosts), held=self._on_disk(model.manifest_id, hosts))
            events.append(Observed(model.manifest_id, facts, self._demand.of(model.manifest_id), most))
            for signer, advert in sorted(
                atlas.plans.get(model.manifest_id, []), key=lambda item: (item[1].epoch, item[0])
            ):
                events.append(PlanSeen(advert.plan(model.manifest_id, signer)))
        return [*events, Tick()]

    def _on_disk(self, manifest_id: str, hosts: Mapping[str, HostAdvert]) -> dict[str, list[tuple[int, int]]]:
        """Spans by host whose weights should be on its disk: what it holds, and what it held not long ago."""
        held = self._told.held.setdefault(manifest_id, {})
        for name, host in hosts.items():
            span, before = (host.start, host.end), held.get(name, [])
            if host.state in ("loading", "ready") and before[:1] != [span]:
                held[name] = [span, *(old for old in before if old != span)][:SPANS_KEPT]
        return {name: held[name] for name in held if name in self._told.nodes}

    def _node_events(self, atlas: Atlas) -> list[Event]:
        told, shapes = self._told.nodes, dict[str, NodeShape]()
        for peer, node in atlas.nodes.items():
            reliability = self._presence.reliability(peer)
            shapes |= {s.id: replace(s, reliability=reliability) for s in device_shapes(peer, node)}
        gone: list[Event] = [Left(name) for name in sorted(told) if name not in shapes]
        self._told.nodes = shapes
        return gone + [Joined(shape) for name, shape in sorted(shapes.items()) if told.get(name) != shape]

    def _model_events(self, atlas: Atlas) -> list[Event]:
        told = self._told.models
        models = {
            m.manifest_id: self._wanted(m, atlas.offers.get(m.manifest_id, 0)) for m in atlas.models.values()
        }
        gone: list[Event] = [ModelDropped(name) for name in sorted(told) if name not in models]
        self._told.models = models
        for name in [name for name in self._told.held if name not in models]:
            del self._told.held[name]
        return gone + [ModelAdded(name, w) for name, w in sorted(models.items()) if told.get(name) != w]

    def _wanted(self, model: ModelAdvert, offers: int) -> Wanted:
        """Of those that wait for a place the one that more members offer comes first, then the older."""
        return Wanted(
            shape=model.shape(),
            demand=self._demand.of(model.manifest_id),
            copies=model.copies,
            copies_max=self._demand.copies_max(model.manifest_id, model.copies),
            policy=model.policy(),
            order=(-offers, model.created_s),
        )

    def _note_shortages(self, atlas: Atlas) -> None:
        """The words of whoever made the plans we hold to."""
        known = {model.manifest_id for model in atlas.models.values()}
        for gone in set(self.shortages) - known:
            del self.shortages[gone]
        for manifest_id, plan in self.plans.items():
            for signer, advert in atlas.plans.get(manifest_id, []):
                if signer != self._me and (signer, advert.epoch) == (plan.planner, plan.epoch):
                    self.shortages[manifest_id] = advert.shortage


def facts_of(hosts: Mapping[str, HostAdvert]) -> Facts:
    """What the planner wants to know of a model's hosts."""
    return Facts(
        held={name: [(h.start, h.end)] for name, h in hosts.items()},
        sessions={name: h.sessions for name, h in hosts.items() if h.sessions},
        ready=frozenset(name for name, h in hosts.items() if h.state == "ready"),
        decode_s={n: h.plan_s_per_layer for n, h in hosts.items() if h.plan_s_per_layer > 0},
        prefill_s={
            n: h.prefill_s_per_token_per_layer
            for n, h in hosts.items()
            if h.prefill_s_per_token_per_layer > 0
        },
    )
