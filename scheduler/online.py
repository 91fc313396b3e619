"""The planner of a mesh as a state machine: members, models and figures change, plans come out.

`MeshPlanner.handle(event, now_s)` returns instructions. Joins, leaves and drift are met by the smallest move at
once; a move that pays is looked for at leisure, on `Tick`. It runs on every member alike; only the one that ranks
first for a model plans it. No clock, no chance, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from scheduler.errors import LocalFault, Shortage
from scheduler.mend import Mender
from scheduler.placement import SECOND_THOUGHTS_NODES_MAX, make_plan, still_valid
from scheduler.planner import adopt, planner_rank
from scheduler.policy import fetch_factor
from scheduler.relief import relieve, trim
from scheduler.seating import seat_of
from scheduler.shapes import Assignment, Links, NodeShape, Plan, coverage, memory_needed
from scheduler.sharing import Wanted, left_over

DRIFT_LEAST = 0.2
"""Measured times that moved by less than this fraction since they were last planned with are no news."""
SECOND_THOUGHTS_S = 60.0
"""How often a standing plan is weighed against a new one."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A member is here, or its figures changed."""

    node: NodeShape


@dataclass(frozen=True, slots=True)
class Left:
    """A member is gone."""

    node: str


@dataclass(frozen=True, slots=True)
class ModelAdded:
    """A model is wanted, or wanted differently."""

    model: str
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class ModelDropped:
    """A model is wanted no longer."""

    model: str


@dataclass(frozen=True, slots=True)
class PlanSeen:
    """A plan of some member arrived."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Joined | Left | ModelAdded | ModelDropped | PlanSeen | Tick


@dataclass(frozen=True, slots=True)
class Publish:
    """Sign and publish this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class ReportShortage:
    """The model cannot be placed; `shortage` says what is missing."""

    model: str
    shortage: Shortage


Instruction = Publish | ReportShortage


@dataclass(slots=True)
class _State:
    nodes: dict[str, NodeShape] = field(default_factory=dict)
    models: dict[str, Wanted] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    short: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)
    weighed_s: dict[str, float] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    copies_seen: dict[str, int] = field(default_factory=dict)


class MeshPlanner:
    """One member's planner. `me` plans only the models for which it ranks first among the members it knows."""

    def __init__(self, me: str, links: Links) -> None:
        self._me = me
        self._links = links
        self._state = _State()

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans this member holds to, by model."""
        return dict(self._state.plans)

    @property
    def nodes(self) -> dict[str, NodeShape]:
        """The members, with the figures that plans are made of."""
        return dict(self._state.nodes)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in what happened; what to do about it."""
        state = self._state
        match event:
            case Joined(node):
                old = state.nodes.get(node.id)
                if old is not None and not _drifted(old, node):
                    return []
                state.nodes[node.id] = node
            case Left(name):
                if state.nodes.pop(name, None) is None:
                    return []
            case ModelAdded(model, wanted):
                state.models[model] = wanted
                state.copies[model] = wanted.copies
            case ModelDropped(model):
                state.models.pop(model, None)
                state.plans.pop(model, None)
                state.copies.pop(model, None)
                state.short.discard(model)
            case PlanSeen(plan):
                return self._seen(plan)
            case Tick():
                return self._second_thoughts(now_s)
        return self._mend_all(now_s)

    def _mend_all(self, now_s: float) -> list[Instruction]:
        """Mend every model that is mine; where one lost its plan, those without one try the memory it left."""
        state = self._state
        out = [i for model in self._mine() for i in self._mend(model, now_s)]
        if any(isinstance(i, ReportShortage) for i in out):
            waiting = [m for m in self._mine() if m not in state.plans]
            out.extend(i for model in waiting for i in self._mend(model, now_s))
        return out

    def _mine(self) -> list[str]:
        members = {*self._state.nodes, self._me}
        order = sorted(self._state.models, key=lambda m: (-self._state.models[m].demand, m))
        return [m for m in order if self._first(m, members)]

    def _first(self, model: str, members: Iterable[str]) -> bool:
        return planner_rank(model, members)[0] == self._me

    def _seen(self, plan: Plan) -> list[Instruction]:
        state = self._state
        state.epochs[plan.model] = max(plan.epoch, state.epochs.get(plan.model, 0))
        if plan.model in state.models and adopt(state.plans.get(plan.model), plan, {*state.nodes, self._me}):
            state.plans[plan.model] = plan
        return []

    def _mend(self, model: str, now_s: float) -> list[Instruction]:
        """Keep what stands, add what is short; a new plan only where additions cannot do."""
        state, wanted = self._state, self._state.models[model]
        old = state.plans.get(model)
        nodes = self._free(model)
        if old is not None:
            mender = self._mender(model, nodes)
            kept = still_valid(wanted.shape, old, mender, state.nodes)
            mended = mender.mend(kept, state.copies[model]) if kept else None
            if mended is not None:
                return self._publish(model, mended, now_s)
        try:
            plan = self._make(model, nodes)
        except Shortage as short:
            state.plans.pop(model, None)
            news = model not in state.short
            state.short.add(model)
            return [ReportShortage(model, short)] if news else []
        return self._publish(model, plan.assignments, now_s)

    def _free(self, model: str) -> list[NodeShape]:
        """The members with the memory that other models leave, by name."""
        state = self._state
        nodes = left_over(list(state.nodes.values()), state.plans, state.models, model)
        return sorted(nodes, key=lambda node: node.id)

    def _mender(self, model: str, nodes: Sequence[NodeShape]) -> Mender:
        wanted = self._state.models[model]
        seats = [seat_of(wanted.shape, node, 1, wanted.policy) for node in nodes]
        return Mender(wanted.shape, seats, {}, {node.id: fetch_factor(node) for node in nodes if node.tags})

    def _make(self, model: str, nodes: Sequence[NodeShape]) -> Plan:
        wanted = self._state.models[model]
        return make_plan(
            model,
            wanted.shape,
            nodes,
            self._links,
            copies=self._state.copies[model],
            previous=self._state.plans.get(model),
            epoch=0,
            planner=self._me,
            policy=wanted.policy,
        )

    def _publish(self, model: str, assignments: Iterable[Assignment], now_s: float) -> list[Instruction]:
        state = self._state
        spans = tuple(sorted(assignments, key=lambda a: (a.start, a.end, a.node)))
        old = state.plans.get(model)
        state.short.discard(model)
        if old is not None and old.assignments == spans and old.planner in {*state.nodes, self._me}:
            return []
        epoch = 1 + max(state.epochs.get(model, 0), old.epoch if old else 0)
        plan = Plan(model, epoch, self._me, spans)
        state.plans[model], state.epochs[model] = plan, epoch
        state.weighed_s.setdefault(model, now_s)
        return [Publish(plan)]

    def _second_thoughts(self, now_s: float) -> list[Instruction]:
        """Once a SECOND_THOUGHTS_S for each model that is mine: copies by demand, and a better plan if one pays."""
        state, out = self._state, list[Instruction]()
        for model in self._mine():
            if model in state.plans and now_s - state.weighed_s.get(model, now_s) >= SECOND_THOUGHTS_S:
                state.weighed_s[model] = now_s
                out.extend(self._publish(model, self._reconsidered(model), now_s))
        if any(m not in state.plans for m in self._mine()):
            out.extend(self._mend_all(now_s))
        return out

    def _reconsidered(self, model: str) -> Sequence[Assignment]:
        """The model's spans as they should be now that there is time to think."""
        state, wanted = self._state, self._state.models[model]
        layers = wanted.shape.layers
        nodes = self._free(model)
        seats = {n.id: seat_of(wanted.shape, n, 1, wanted.policy) for n in nodes}
        old: Sequence[Assignment] = state.plans[model].assignments
        self._follow_demand(model)
        have = min(coverage(list(old), layers))
        if have > state.copies[model]:
            return trim(old, state.copies[model], seats, layers)
        new = self._grown(model, nodes, old)
        if state.copies[model] > wanted.copies and min(coverage(list(new), layers)) <= have:
            # Part of a copy beyond those wanted is not worth the memory that others may need.
            state.copies[model] = max(wanted.copies, have)
            new = self._grown(model, nodes, old)
        return new if len(nodes) <= SECOND_THOUGHTS_NODES_MAX else relieve(new, seats, layers)

    def _grown(
        self, model: str, nodes: Sequence[NodeShape], old: Sequence[Assignment]
    ) -> Sequence[Assignment]:
        if len(nodes) > SECOND_THOUGHTS_NODES_MAX:
            return self._mender(model, nodes).mend(old, self._state.copies[model]) or old
        try:
            return self._make(model, nodes).assignments
        except Shortage:
            return old

    def _follow_demand(self, model: str) -> None:
        """Set the copies of a model: one more while it has most demand for each copy (or those before it are stuck),
        the least wanted while some model has no place at all."""
        state = self._state
        wanted = state.models[model]
        if any(m not in state.plans for m in state.models):
            state.copies[model] = wanted.copies
            return
        have = {m: min(p.coverage(state.models[m].shape.layers)) for m, p in state.plans.items()}
        stuck = {m for m in have if state.copies_seen.get(m) == have[m]}
        rivals = [m for m in have if m != model and m not in stuck and have[m] < state.models[m].copies_max]
        need = {m: state.models[m].demand / max(1, have[m]) for m in have}
        state.copies_seen = have
        if have[model] < wanted.copies_max and all(need[model] >= need[m] for m in rivals):
            state.copies[model] = max(wanted.copies, have[model] + 1)

    def validate(self) -> None:
        """Raise LocalFault unless memory holds and every layer of every plan that is mine is covered."""
        state = self._state
        used: dict[str, int] = {}
        for model, plan in state.plans.items():
            shape = state.models[model].shape
            names = [a.node for a in plan.assignments]
            if len(names) != len(set(names)):
                raise LocalFault(f"{model}: a node has two spans")
            for a in plan.assignments:
                used[a.node] = used.get(a.node, 0) + memory_needed(shape, a.start, a.end)
            if model in self._mine():
                gone = [n for n in names if n not in state.nodes]
                if gone or min(plan.coverage(shape.layers)) < 1:
                    raise LocalFault(f"{model}: the plan has holes (gone: {gone})")
        for name, size in used.items():
            if name in state.nodes and size > state.nodes[name].memory_bytes and self._all_mine():
                raise LocalFault(f"{name} is given {size} bytes of {state.nodes[name].memory_bytes}")

    def _all_mine(self) -> bool:
        return set(self._mine()) >= set(self._state.plans)


def _drifted(old: NodeShape, new: NodeShape) -> bool:
    """Whether the figures moved enough to plan with them."""
    if replace(new, decode_s_per_layer=None, prefill_s_per_token_per_layer=None) != replace(
        old, decode_s_per_layer=None, prefill_s_per_token_per_layer=None
    ):
        return True
    return _moved(old.decode_s_per_layer, new.decode_s_per_layer) or _moved(
        old.prefill_s_per_token_per_layer, new.prefill_s_per_token_per_layer
    )


def _moved(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > DRIFT_LEAST * old
