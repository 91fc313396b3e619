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
from scheduler.seating import seat_of
from scheduler.shapes import Assignment, Links, NodeShape, Plan, memory_needed
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
            case ModelDropped(model):
                state.models.pop(model, None)
                state.plans.pop(model, None)
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
        nodes = sorted(
            left_over(list(state.nodes.values()), state.plans, state.models, model), key=lambda n: n.id
        )
        if old is not None:
            seats = [seat_of(wanted.shape, node, 1, wanted.policy) for node in nodes]
            mender = Mender(
                wanted.shape, seats, {}, {node.id: fetch_factor(node) for node in nodes if node.tags}
            )
            kept = still_valid(wanted.shape, old, mender, state.nodes)
            mended = mender.mend(kept, wanted.copies) if kept else None
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

    def _make(self, model: str, nodes: Sequence[NodeShape]) -> Plan:
        wanted = self._state.models[model]
        return make_plan(
            model,
            wanted.shape,
            nodes,
            self._links,
            copies=wanted.copies,
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
        """Weigh each standing plan against one from nothing, where the mesh is small enough for that."""
        state, out = self._state, list[Instruction]()
        if len(state.nodes) > SECOND_THOUGHTS_NODES_MAX:
            return out
        for model in self._mine():
            old = state.plans.get(model)
            if old is None or now_s - state.weighed_s.get(model, now_s) < SECOND_THOUGHTS_S:
                continue
            state.weighed_s[model] = now_s
            nodes = left_over(list(state.nodes.values()), state.plans, state.models, model)
            try:
                plan = self._make(model, nodes)
            except Shortage:
                continue
            out.extend(self._publish(model, plan.assignments, now_s))
        return out

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
