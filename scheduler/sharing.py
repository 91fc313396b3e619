"""What is wanted of a model, and the memory that other models leave it.

Demand is any number that says how much a model is wanted, the same one for all. A model that is no longer wanted is
dropped by whoever added it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler.policy import ANYONE, Policy
from scheduler.shapes import Assignment, ModelShape, NodeShape, Plan, memory_needed


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
