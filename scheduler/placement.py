"""Phase 1: a plan for one model over the nodes of a mesh, from nothing or by the smallest move from the last plan.

Every layer is covered once before any is covered twice; full copies come before partial ones. It asks `links` for
distances and never measures; who plans is `planner`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scheduler.judge import Judge
from scheduler.mend import Held, Mender
from scheduler.pipeline import Seat
from scheduler.pool import Pool
from scheduler.search import best_effort_group, group_seats
from scheduler.seating import hops_between, seat_of, shortage
from scheduler.shapes import Assignment, Links, ModelShape, NodeShape, Plan, coverage

HYSTERESIS = 0.25
"""A plan that moves what works must score better by this fraction, as in Petals' rebalance rule."""
COPIES_MAX = 64
SECOND_THOUGHTS_NODES_MAX = 64
"""Up to so many nodes, each plan is weighed against one made from nothing; beyond, only a plan that cannot be
mended is made anew (`Planner` improves large meshes by degrees)."""


def make_plan(
    model_id: str,
    model: ModelShape,
    nodes: Sequence[NodeShape],
    links: Links,
    *,
    copies: int = 1,
    previous: Plan | None = None,
    epoch: int,
    planner: str,
    held: Held | None = None,
) -> Plan:
    """A plan in which every layer has `copies` hosts where memory allows, and one at least.

    `held` are spans whose weights a node has on disk already: they cost nothing to fetch. Nodes may come in any
    order. Raises Shortage when the layers cannot all be placed once.
    """
    copies = max(1, min(copies, COPIES_MAX))
    ordered = sorted({node.id: node for node in nodes}.values(), key=lambda node: node.id)
    seats = [seat_of(model, node) for node in ordered]
    hop = hops_between(model, [node.id for node in ordered], links)
    mender = Mender(model, ordered, seats, held or {})
    kept = still_valid(model, previous, mender, {node.id for node in ordered})
    chosen = mender.mend(kept, copies) if kept else None
    if chosen is None or len(ordered) <= SECOND_THOUGHTS_NODES_MAX:
        fresh = plan_afresh(model, seats, hop, mender, copies)
        if fresh is None and chosen is None:
            raise shortage(model, ordered, seats)
        if fresh is not None:
            judge = Judge(seats, model.layers, hop, copies)
            chosen = fresh if chosen is None else _better(judge, model.layers, copies, chosen, fresh)
    spans = sorted(chosen or (), key=lambda a: (a.start, a.end, a.node))
    return Plan(model_id, epoch, planner, tuple(spans))


def still_valid(
    model: ModelShape, previous: Plan | None, mender: Mender, live: Mapping[str, object] | set[str]
) -> list[Assignment]:
    """The assignments of `previous` that still stand: the node is here and has the memory."""
    if previous is None:
        return []
    return [
        a
        for a in previous.assignments
        if a.node in live and 0 <= a.start < a.end <= model.layers and mender.fits(a.node, a.start, a.end)
    ]


def plan_afresh(
    model: ModelShape,
    seats: Sequence[Seat],
    hop: float | Callable[[int, int], float],
    mender: Mender,
    copies: int,
) -> list[Assignment] | None:
    """Assignments from nothing: the best replicas, then partial copies of what is still short. None: no room."""
    pool = Pool(seats, model.layers, hop)
    found: list[Assignment] = []
    replicas = group_seats(pool, "balanced", replicas_max=copies).replicas() or best_effort_group(pool)
    for replica in replicas:
        found.extend(_stages([seats[i].node for i in replica.seats], replica.counts))
    if not found:
        return None
    return mender.mend(found, copies)


def _stages(names: Sequence[str], counts: Sequence[int]) -> list[Assignment]:
    stages, start = [], 0
    for name, count in zip(names, counts, strict=True):
        stages.append(Assignment(name, start, start + count))
        start += count
    return stages


def _better(
    judge: Judge, layers: int, copies: int, mended: list[Assignment], fresh: list[Assignment]
) -> list[Assignment]:
    """The mended plan, unless the fresh one gives layers their copies that it cannot, or is much better."""
    lacking, fresh_lacking = _lacking(mended, layers, copies), _lacking(fresh, layers, copies)
    if lacking and not fresh_lacking:
        return fresh
    if fresh_lacking > lacking:
        return mended
    return fresh if judge.score(fresh) > (1 + HYSTERESIS) * judge.score(mended) else mended


def _lacking(assignments: Sequence[Assignment], layers: int, copies: int) -> int:
    return sum(max(0, copies - count) for count in coverage(list(assignments), layers))


def needs_replan(
    plan: Plan | None, model: ModelShape, nodes: Sequence[NodeShape], *, copies: int
) -> str | None:
    """Why a new plan is due, or None. Cheap enough for every tick; asks only for what `make_plan` would change."""
    if plan is None:
        return "there is no plan yet"
    live = {node.id: node for node in nodes}
    for a in plan.assignments:
        if a.node not in live:
            return f"{a.node} of the plan is gone"
    ordered = [live[name] for name in sorted(live)]
    seats = [seat_of(model, node) for node in ordered]
    mender = Mender(model, ordered, seats, {})
    for a in plan.assignments:
        if not (0 <= a.start < a.end <= model.layers and mender.fits(a.node, a.start, a.end)):
            return f"{a.node} has no longer the memory for layers {a.start}-{a.end - 1}"
    counts = coverage(plan.assignments, model.layers)
    if min(counts) < 1:
        return f"layer {counts.index(0)} has no host"
    if min(counts) < copies:
        mended = mender.mend(plan.assignments, copies)
        if mended is not None and _lacking(mended, model.layers, copies) < sum(
            max(0, copies - count) for count in counts
        ):
            return f"layer {counts.index(min(counts))} has {min(counts)} of {copies} copies, and there is room for more"
    return None
