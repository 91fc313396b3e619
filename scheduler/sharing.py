"""Several models on one mesh: each placed once if it fits, then copies by demand, in the memory the others leave.

Demand is any number that says how much a model is wanted (tokens a second, say). Nothing is evicted here: a model
that is no longer wanted is dropped by whoever added it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scheduler.errors import Shortage
from scheduler.placement import make_plan
from scheduler.policy import ANYONE, Policy
from scheduler.shapes import Assignment, Links, ModelShape, NodeShape, Plan, memory_needed


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model, how much it is wanted, and the copies to have at least and at most where memory allows.

    Of models that have no place yet the one with the least `order` is placed first.
    """

    shape: ModelShape
    demand: float = 1.0
    copies: int = 1
    copies_max: int = 4
    policy: Policy = ANYONE
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shares:
    """A plan for every model that fits, and why the others do not."""

    plans: dict[str, Plan] = field(default_factory=dict)
    shortages: dict[str, Shortage] = field(default_factory=dict)


def share(
    wanted: Mapping[str, Wanted],
    nodes: Sequence[NodeShape],
    links: Links,
    *,
    previous: Mapping[str, Plan] | None = None,
    epoch: int,
    planner: str,
) -> Shares:
    """Plans for all models together. A node may host spans of several, within its memory.

    First each model as it stands, then each once, most wanted first; then its least copies; then further copies,
    one at a time, to the model with the most demand for each copy it has.
    """
    shares = Shares()
    order = sorted(wanted, key=lambda m: (m not in (previous or {}), -wanted[m].demand, m))
    for model_id, plan in (previous or {}).items():
        if model_id in wanted:
            shares.plans[model_id] = plan

    def attempt(model_id: str, copies: int) -> bool:
        """Plan for `copies`; whether the least covered layer gained one."""
        shape = wanted[model_id].shape
        old = shares.plans.get(model_id)
        before = min(old.coverage(shape.layers)) if old else 0
        try:
            plan = make_plan(
                model_id, shape, left_over(nodes, shares.plans, wanted, model_id), links,
                copies=copies, previous=old, epoch=epoch, planner=planner, policy=wanted[model_id].policy,
            )  # fmt: skip
        except Shortage as short:
            shares.plans.pop(model_id, None)
            shares.shortages[model_id] = short
            return False
        shares.plans[model_id] = plan
        return min(plan.coverage(shape.layers)) > before

    for model_id in order:
        attempt(model_id, 1)
    for model_id in sorted(shares.plans, key=lambda m: (-wanted[m].demand, m)):
        if wanted[model_id].copies > 1:
            attempt(model_id, wanted[model_id].copies)
    growing = {m: max(1, wanted[m].copies) for m in shares.plans}
    while growing:
        model_id = max(growing, key=lambda m: (wanted[m].demand / growing[m], m))
        copies = growing[model_id] + 1
        if copies > wanted[model_id].copies_max or not attempt(model_id, copies):
            del growing[model_id]
        else:
            growing[model_id] = copies
    return shares


def left_over(
    nodes: Sequence[NodeShape], plans: Mapping[str, Plan], wanted: Mapping[str, Wanted], without: str
) -> list[NodeShape]:
    """Nodes with the memory that all models but one leave free."""
    taken: dict[str, int] = {}
    for model_id, plan in plans.items():
        if model_id != without and model_id in wanted:
            for a in plan.assignments:
                taken[a.node] = taken.get(a.node, 0) + _size(wanted[model_id].shape, a)
    return [
        replace(node, memory_bytes=max(0, node.memory_bytes - taken[node.id])) if node.id in taken else node
        for node in nodes
    ]


def _size(shape: ModelShape, a: Assignment) -> int:
    return memory_needed(shape, a.start, a.end)
