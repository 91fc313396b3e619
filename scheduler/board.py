"""What a planner knows of its mesh, and the questions it asks of that: who has room for what, and where spans would go.

It changes nothing but what it is told; which questions to ask and what to make of the answers is for `online` and
`balance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scheduler.corrections import calibrated
from scheduler.judge import Judge, SideBySide
from scheduler.mend import Mender
from scheduler.pins import pinned_spans, plan_around, still_pinned
from scheduler.pipeline import Seat
from scheduler.placement import make_plan, still_valid
from scheduler.policy import fetch_factor
from scheduler.seating import hops_between, seat_of
from scheduler.shapes import Assignment, Links, NodeShape, Plan, coverage
from scheduler.sharing import Wanted, left_over

Spans = Sequence[Assignment]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model's hosts, by host: spans whose weights are on its disk, open sessions, whether it serves
    by now, and its measured times for this model (seconds a layer of decode, and a token and layer of prefill)."""

    held: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    sessions: Mapping[str, int] = field(default_factory=dict)
    ready: frozenset[str] = frozenset()
    decode_s: Mapping[str, float] = field(default_factory=dict)
    prefill_s: Mapping[str, float] = field(default_factory=dict)


NOTHING = Facts()


@dataclass(slots=True)
class Board:
    """Members, models, plans. `plans` cover every layer; of a model that cannot be covered `broken` keeps what stands,
    for the day its hosts come back. `copies` are those to have now, by model."""

    links: Links
    nodes: dict[str, NodeShape] = field(default_factory=dict)
    models: dict[str, Wanted] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    broken: dict[str, Plan] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    def held_to(self, model: str) -> Plan | None:
        """The model's plan, whole or broken."""
        return self.plans.get(model) or self.broken.get(model)

    def spans(self, model: str) -> Spans:
        """What its plan places."""
        plan = self.held_to(model)
        return () if plan is None else plan.assignments

    def have(self, model: str) -> int:
        """Copies of its rarest layer on live nodes, as planned."""
        live = [a for a in self.spans(model) if a.node in self.nodes]
        return min(coverage(live, self.models[model].shape.layers))

    def free(self, model: str, instead: Mapping[str, Spans] | None = None) -> list[NodeShape]:
        """The hosts as this model finds them: with the memory that others leave and the times measured for it.

        `instead` are spans to reckon with for some models in place of those planned.
        """
        plans = self.broken | self.plans
        for other, spans in (instead or {}).items():
            plans[other] = Plan(other, 0, "", tuple(spans))
        nodes = sorted(self.nodes.values(), key=lambda node: node.id)
        facts = self.facts.get(model, NOTHING)
        left = left_over(nodes, plans, self.models, model)
        return calibrated(left, self.models[model].shape, facts.decode_s, facts.prefill_s)

    def seats(self, model: str, nodes: Sequence[NodeShape]) -> dict[str, Seat]:
        """The nodes' figures for a model, by name."""
        wanted = self.models[model]
        return {node.id: seat_of(wanted.shape, node, 1, wanted.policy) for node in nodes}

    def mender(self, model: str, nodes: Sequence[NodeShape]) -> Mender:
        """Additions for a model over these nodes."""
        factors = {node.id: fetch_factor(node) for node in nodes if node.tags}
        held = self.facts.get(model, NOTHING).held
        return Mender(self.models[model].shape, list(self.seats(model, nodes).values()), held, factors)

    def place(self, model: str, nodes: Sequence[NodeShape], old: Spans, copies: int) -> Spans:
        """The spans that the model should have: those it has with the fewest additions, new ones only where additions
        cannot do. Raises Shortage."""
        wanted, facts = self.models[model], self.facts.get(model, NOTHING)
        layers = wanted.shape.layers
        pinned = pinned_spans(nodes, layers, wanted.policy)
        if pinned:
            stands = still_pinned(old, pinned, self.nodes) and min(coverage(list(old), layers)) > 0
            return old if stands else plan_around(
                model, wanted.shape, nodes, pinned, facts.ready, self.links,
                copies=copies, keep=old, policy=wanted.policy, sessions=facts.sessions,
            )  # fmt: skip
        mender = self.mender(model, nodes)
        kept = still_valid(wanted.shape, Plan(model, 0, "", tuple(old)), mender, self.nodes)
        mended = mender.mend(kept, copies) if kept else None
        return mended if mended is not None else self.weigh(model, nodes, old, copies)

    def weigh(self, model: str, nodes: Sequence[NodeShape], old: Spans, copies: int) -> Spans:
        """The spans it has, mended, or better ones where the move pays. Raises Shortage."""
        wanted, facts = self.models[model], self.facts.get(model, NOTHING)
        return make_plan(
            model, wanted.shape, nodes, self.links,
            copies=copies, previous=Plan(model, 0, "", tuple(old)) if old else None, epoch=0, planner="",
            held=facts.held, sessions=facts.sessions, policy=wanted.policy,
        ).assignments  # fmt: skip

    def chains(self, model: str, spans: Spans, instead: Mapping[str, Spans]) -> list[SideBySide]:
        """The chains that the spans of a model can run side by side, with those of others as `instead` says."""
        shape, nodes = self.models[model].shape, self.free(model, instead)
        seats = [_unpinned(self.models[model], node) for node in nodes]
        hop = hops_between(shape, [node.id for node in nodes], self.links)
        return Judge(seats, shape.layers, hop, max(1, len(spans))).chains(spans)

    def is_pinned(self) -> bool:
        """Whether any owner fixed a span."""
        return any(node.pinned is not None for node in self.nodes.values())


def _unpinned(wanted: Wanted, node: NodeShape) -> Seat:
    return seat_of(wanted.shape, replace(node, pinned=None), 1, wanted.policy)
