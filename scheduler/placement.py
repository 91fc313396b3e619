"""Phase 1: a plan for one model over the nodes of a mesh, from nothing or by the smallest move from the last plan.

Every layer is covered once before any is covered twice; full copies come before partial ones. It asks `links` for
distances and never measures; who plans is `planner`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scheduler.judge import Judge
from scheduler.mend import Held, Mender, fetch_bytes
from scheduler.pipeline import Seat
from scheduler.policy import ANYONE, Policy, fetch_factor
from scheduler.pool import Pool, Prefer
from scheduler.search import best_effort_group, group_seats
from scheduler.seating import hops_between, seat_of, shortage
from scheduler.shapes import Assignment, Links, ModelShape, NodeShape, Plan, coverage

HYSTERESIS = 0.25
"""A plan that moves what works must score better by this fraction, as in Petals' rebalance rule."""
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
    sessions: Mapping[str, int] | None = None,
    policy: Policy = ANYONE,
    prefer: Prefer = "balanced",
) -> Plan:
    """A plan in which every layer has `copies` hosts where memory allows, and one at least.

    `held` are spans whose weights a node has on disk already: they cost nothing to fetch. `sessions` are those open by
    node: moving their host disturbs them. `policy` says which tags hosts must have, `prefer` what
    the replicas of a plan from nothing are good for. Nodes may come in any order. Raises
    Shortage when the layers cannot all be placed once.
    """
    ordered = sorted({node.id: node for node in nodes}.values(), key=lambda node: node.id)
    copies = max(1, min(copies, len(ordered)))
    seats = [seat_of(model, node, 1, policy) for node in ordered]
    hop = hops_between(model, [node.id for node in ordered], links)
    mender = Mender(model, seats, held or {}, {node.id: fetch_factor(node) for node in ordered if node.tags})
    kept = still_valid(model, previous, mender, {node.id for node in ordered})
    # Where nothing stands, weights on disks are still something to go on from.
    from_disks = not kept and any((held or {}).values())
    chosen = mender.mend(kept, copies) if kept or from_disks else None
    if chosen is None or len(ordered) <= SECOND_THOUGHTS_NODES_MAX:
        fresh = plan_afresh(model, seats, hop, mender, copies, _where(previous, held or {}), prefer)
        if fresh is None and chosen is None:
            raise shortage(model, [node for node in ordered if policy.allows(node)], seats, policy)
        if fresh is not None:
            judge = Judge(seats, model.layers, hop, copies)
            cost = move_cost(model, kept, fresh, held or {}, sessions or {})
            if from_disks and chosen is not None:
                cost = max(0.0, cost - move_cost(model, kept, chosen, held or {}, sessions or {}))
            if chosen is None or _worth_it(judge, model.layers, copies, chosen, fresh, cost):
                chosen = fresh
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
    places: Mapping[str, float] | None = None,
    prefer: Prefer = "balanced",
) -> list[Assignment] | None:
    """Assignments from nothing: the best replicas, then partial copies of what is still short. None: no room.

    Where hops are alike the middle stages of a replica are put in the order of `places`, so that weights which
    are there already can stay.
    """
    pool = Pool(seats, model.layers, hop)
    found: list[Assignment] = []
    replicas = group_seats(pool, prefer, replicas_max=copies).replicas() or best_effort_group(pool)
    for replica in replicas:
        stages = [(seats[i].node, count) for i, count in zip(replica.seats, replica.counts, strict=True)]
        if places and not callable(hop):
            stages[1:-1] = sorted(stages[1:-1], key=lambda stage: places.get(stage[0], model.layers))
        found.extend(_stages(stages))
    if not found:
        return None
    return mender.mend(found, copies)


def _stages(stages: Sequence[tuple[str, int]]) -> list[Assignment]:
    found, start = [], 0
    for name, count in stages:
        found.append(Assignment(name, start, start + count))
        start += count
    return found


def _worth_it(
    judge: Judge, layers: int, copies: int, mended: list[Assignment], fresh: list[Assignment], cost: float
) -> bool:
    """Whether `fresh` gives layers the copies that `mended` cannot, or is better by more than the move costs."""
    lacking, fresh_lacking = _lacking(mended, layers, copies), _lacking(fresh, layers, copies)
    if fresh_lacking > lacking or (lacking and not fresh_lacking):
        return fresh_lacking < lacking
    return judge.score(fresh) > (1 + HYSTERESIS * (1 + cost)) * judge.score(mended)


def move_cost(
    model: ModelShape,
    old: Sequence[Assignment],
    new: Sequence[Assignment],
    held: Held,
    sessions: Mapping[str, int],
) -> float:
    """What a move costs: the share of the model fetched again, plus the share of open sessions disturbed."""
    before = {a.node: (a.start, a.end) for a in old}
    after = {a.node: (a.start, a.end) for a in new}
    fetched = sum(fetch_bytes(model, before.get(n), span, held.get(n, ())) for n, span in after.items())
    disturbed = sum(sessions.get(n, 0) for n, span in before.items() if after.get(n) != span)
    return fetched / model.weight_bytes(0, model.layers) + disturbed / max(1, sum(sessions.values()))


def _where(previous: Plan | None, held: Held) -> dict[str, float]:
    """Where in the model each node's weights lie now: the middle of its span, or of what it holds."""
    places = {node: sum(a + b for a, b in spans) / (2 * len(spans)) for node, spans in held.items() if spans}
    if previous is not None:
        places.update({a.node: (a.start + a.end) / 2 for a in previous.assignments})
    return places


def _lacking(assignments: Sequence[Assignment], layers: int, copies: int) -> int:
    return sum(max(0, copies - count) for count in coverage(list(assignments), layers))


def needs_replan(
    plan: Plan | None,
    model: ModelShape,
    nodes: Sequence[NodeShape],
    *,
    copies: int,
    policy: Policy = ANYONE,
) -> str | None:
    """Why a new plan is due, or None. Cheap enough for every tick; asks only for what `make_plan` would change."""
    if plan is None:
        return "there is no plan yet"
    live = {node.id: node for node in nodes}
    for a in plan.assignments:
        if a.node not in live:
            return f"{a.node} of the plan is gone"
    ordered = [live[name] for name in sorted(live)]
    seats = [seat_of(model, node, 1, policy) for node in ordered]
    mender = Mender(model, seats, {})
    for a in plan.assignments:
        if not (0 <= a.start < a.end <= model.layers and mender.fits(a.node, a.start, a.end)):
            return f"{a.node} has no longer the memory (or the tags) for layers {a.start}-{a.end - 1}"
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
