"""Plans around spans that owners fixed by hand: those stay as they are, the layers they leave short are placed.

It cuts the model into the runs that lack copies and has `placement` plan each as a model of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from scheduler.errors import Shortage
from scheduler.placement import make_plan
from scheduler.policy import ANYONE, Policy
from scheduler.shapes import Assignment, Links, ModelShape, NodeShape, Plan


def pinned_spans(nodes: Sequence[NodeShape], layers: int, policy: Policy = ANYONE) -> tuple[Assignment, ...]:
    """Spans fixed by owners, cut to the model; none where the policy does not allow it."""
    found = []
    for node in sorted(nodes, key=lambda node: node.id):
        if node.pinned is not None:
            start, end = node.pinned[0], min(node.pinned[1], layers)
            ends = start == 0 or end == layers
            if 0 <= start < end and (policy.allows_ends(node) if ends else policy.allows(node)):
                found.append(Assignment(node.id, start, end))
    return tuple(found)


def uncovered(fixed: Sequence[Assignment], layers: int, copies: int) -> list[tuple[int, int, int]]:
    """Runs (start, end, lacking) of layers that `fixed` covers `lacking` times fewer than `copies`."""
    lacking = [max(0, copies - sum(a.start <= layer < a.end for a in fixed)) for layer in range(layers)]
    runs: list[tuple[int, int, int]] = []
    for layer, lack in enumerate(lacking):
        if lack and runs and runs[-1][1:] == (layer, lack):
            runs[-1] = (runs[-1][0], layer + 1, lack)
        elif lack:
            runs.append((layer, layer + 1, lack))
    return runs


def still_pinned(plan: Sequence[Assignment], pinned: Sequence[Assignment], live: Collection[str]) -> bool:
    """Whether the plan has every pinned span and no node that is gone."""
    held = {(a.node, a.start, a.end) for a in plan}
    return {(a.node, a.start, a.end) for a in pinned} <= held and all(a.node in live for a in plan)


def plan_around(
    model_id: str,
    model: ModelShape,
    nodes: Sequence[NodeShape],
    pinned: Sequence[Assignment],
    ready: Collection[str],
    links: Links,
    *,
    copies: int,
    keep: Sequence[Assignment],
    policy: Policy = ANYONE,
    sessions: Mapping[str, int] | None = None,
) -> list[Assignment]:
    """Spans that keep the pinned ones and place the layers they leave short. Raises Shortage.

    Where others serve already, a pinned node that is not in `ready` yet relieves nobody: it may never be.
    """

    def filled(fixed: Sequence[Assignment]) -> list[Assignment]:
        return _fill(model_id, model, nodes, fixed, keep, links, copies, policy, sessions or {})

    relied_on = [a for a in pinned if a.node in ready] if any(a not in pinned for a in keep) else pinned
    try:
        rest = filled(relied_on)
    except Shortage:
        rest = filled(pinned)
    return sorted([*pinned, *rest], key=lambda a: (a.start, a.end, a.node))


def _fill(
    model_id: str,
    model: ModelShape,
    nodes: Sequence[NodeShape],
    fixed: Sequence[Assignment],
    keep: Sequence[Assignment],
    links: Links,
    copies: int,
    policy: Policy,
    sessions: Mapping[str, int],
) -> list[Assignment]:
    """Spans on `nodes` for the layers that `fixed` leaves short, moving those of `keep` as little as may be."""
    room = {node.id: node for node in nodes if node.pinned is None}
    found: list[Assignment] = []
    for start, end, lacking in uncovered(fixed, model.layers, copies):
        part = replace(
            model,
            layers=end - start,
            embed_bytes=model.embed_bytes if start == 0 else 0,
            head_bytes=model.head_weight_bytes if end == model.layers else 0,
            tied=model.tied and start == 0 and end == model.layers,
        )
        # Whatever lies inside the model sees no tokens.
        asked = policy if start == 0 or end == model.layers else replace(policy, ends_require=frozenset())
        inside = [a for a in keep if a.node in room and start <= a.start and a.end <= end]
        before = tuple(Assignment(a.node, a.start - start, a.end - start) for a in inside)
        plan = make_plan(
            model_id, part, list(room.values()), links,
            copies=lacking, previous=Plan(model_id, 0, "", before) if before else None, epoch=1, planner="",
            policy=asked, sessions=sessions,
        )  # fmt: skip
        for assignment in plan.assignments:
            room.pop(assignment.node, None)
            found.append(Assignment(assignment.node, assignment.start + start, assignment.end + start))
    return found
