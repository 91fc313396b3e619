"""Phase 1 as each node runs it: who plans, when, and which plan holds. A pure core around `scheduler`.

For every model the live nodes rank themselves by rendezvous hash; the first one plans and publishes, all adopt by
epoch. Nodes whose owner pinned a span (`--layers`) are taken as they are and the rest is planned around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from node.adverts import ModelAdvert, PlanAdvert
from node.atlas import Atlas
from scheduler import (
    Assignment,
    ModelShape,
    NodeShape,
    Plan,
    Shortage,
    adopt,
    make_plan,
    memory_needed,
    needs_replan,
    planner_rank,
)


@dataclass(frozen=True, slots=True)
class Publish:
    """Instruction: publish this plan for a model under our own signature."""

    manifest_id: str
    advert: PlanAdvert


class Planning:
    """The plans this node holds to. `handle(atlas)` adopts what others published and says what to publish."""

    def __init__(self, me: str) -> None:
        self._me = me
        self.plans: dict[str, Plan] = {}
        self.shortages: dict[str, str] = {}

    def handle(self, atlas: Atlas, *, may_plan: bool) -> list[Publish]:
        """Adopt, then plan where it is our turn. `may_plan` is False until our view is that of the mesh."""
        known = {model.manifest_id for model in atlas.models.values()}
        for gone in set(self.plans) - known:
            del self.plans[gone]
        out: list[Publish] = []
        members = set(atlas.nodes) | {self._me}
        taken: dict[str, int] = {}
        for model in sorted(atlas.models.values(), key=lambda m: (m.created_s, m.manifest_id)):
            self._adopt(model, atlas, members)
            if may_plan and planner_rank(model.manifest_id, members)[0] == self._me:
                out.extend(self._plan(model, atlas, members, taken))
            for assignment in self._assignments(model.manifest_id):
                used = memory_needed(model.shape(), assignment.start, assignment.end)
                taken[assignment.node] = taken.get(assignment.node, 0) + used
        return out

    def span_of(self, manifest_id: str, node: str) -> tuple[int, int] | None:
        """What `node` shall host of a model under the plan we hold to."""
        for assignment in self._assignments(manifest_id):
            if assignment.node == node:
                return assignment.start, assignment.end
        return None

    def _assignments(self, manifest_id: str) -> Sequence[Assignment]:
        plan = self.plans.get(manifest_id)
        return () if plan is None else plan.assignments

    def _adopt(self, model: ModelAdvert, atlas: Atlas, members: set[str]) -> None:
        for signer, advert in sorted(
            atlas.plans.get(model.manifest_id, []), key=lambda item: (item[1].epoch, item[0])
        ):
            offered = advert.plan(model.manifest_id, signer)
            if any(not 0 <= a.start < a.end <= model.layers for a in offered.assignments):
                continue
            if adopt(self.plans.get(model.manifest_id), offered, members):
                self.plans[model.manifest_id] = offered
            current = self.plans.get(model.manifest_id)
            if current is not None and current.planner == signer:
                self.shortages[model.manifest_id] = advert.shortage

    def _plan(
        self, model: ModelAdvert, atlas: Atlas, members: set[str], taken: Mapping[str, int]
    ) -> list[Publish]:
        manifest_id, shape = model.manifest_id, model.shape()
        current = self.plans.get(manifest_id)
        nodes = free_nodes(atlas, taken)
        pinned = pinned_spans(atlas, model.layers)
        reason = plan_reason(current, shape, nodes, pinned, copies=model.copies)
        if current is not None and current.planner not in members:
            reason = reason or "its planner is gone"
        if reason is None:
            return self._settle(manifest_id, "")
        seen = [advert.epoch for _, advert in atlas.plans.get(manifest_id, [])]
        epoch = 1 + max([*seen, current.epoch if current else 0])
        held = {peer: [(host.start, host.end)] for peer, host in atlas.live_hosts(manifest_id).items()}
        try:
            plan = plan_around(
                manifest_id, shape, nodes, pinned, atlas,
                copies=model.copies, previous=current, epoch=epoch, planner=self._me, held=held,
            )  # fmt: skip
        except Shortage as short:
            return self._settle(manifest_id, str(short))
        if current is not None and current.planner in members and plan.assignments == current.assignments:
            return self._settle(manifest_id, "")
        self.plans[manifest_id] = plan
        self.shortages[manifest_id] = ""
        return [Publish(manifest_id, PlanAdvert.of(plan))]

    def _settle(self, manifest_id: str, shortage: str) -> list[Publish]:
        """Nothing to move: say so when the shortage is news."""
        if self.shortages.get(manifest_id, "") == shortage:
            return []
        self.shortages[manifest_id] = shortage
        current = self.plans.get(manifest_id)
        if current is not None and current.planner != self._me:
            current = replace(current, epoch=current.epoch + 1, planner=self._me)
            self.plans[manifest_id] = current
        advert = PlanAdvert(0, ()) if current is None else PlanAdvert.of(current)
        return [Publish(manifest_id, replace(advert, shortage=shortage))]


def free_nodes(atlas: Atlas, taken: Mapping[str, int]) -> list[NodeShape]:
    """Serving, unpinned nodes with the memory that other models leave them."""
    return [
        NodeShape(
            id=peer,
            memory_bytes=max(0, node.memory_bytes - taken.get(peer, 0)),
            flops_per_s=node.flops_per_s,
            read_bytes_per_s=node.read_bytes_per_s,
        )
        for peer, node in sorted(atlas.nodes.items())
        if node.serves and node.pinned is None
    ]


def pinned_spans(atlas: Atlas, layers: int) -> tuple[Assignment, ...]:
    """Spans fixed by their owners, cut to the model."""
    found = []
    for peer, node in sorted(atlas.nodes.items()):
        if node.serves and node.pinned is not None and len(node.pinned) == 2:
            start, end = node.pinned[0], min(node.pinned[1], layers)
            if 0 <= start < end:
                found.append(Assignment(peer, start, end))
    return tuple(found)


def uncovered(pinned: Sequence[Assignment], layers: int, copies: int) -> list[tuple[int, int]]:
    """Runs of layers that the pinned spans cover fewer than `copies` times."""
    short = [sum(a.start <= layer < a.end for a in pinned) < copies for layer in range(layers)]
    runs: list[tuple[int, int]] = []
    for layer, is_short in enumerate(short):
        if is_short and runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        elif is_short:
            runs.append((layer, layer + 1))
    return runs


def plan_reason(
    plan: Plan | None,
    shape: ModelShape,
    nodes: Sequence[NodeShape],
    pinned: Sequence[Assignment],
    *,
    copies: int,
) -> str | None:
    """Why a new plan is due, or None."""
    if not pinned:
        return needs_replan(plan, shape, nodes, copies=copies)
    if plan is None:
        return "there is no plan yet"
    held = {(a.node, a.start, a.end) for a in plan.assignments}
    if not {(a.node, a.start, a.end) for a in pinned} <= held:
        return "a pinned node came or changed"
    live = {node.id for node in nodes} | {a.node for a in pinned}
    if any(a.node not in live for a in plan.assignments):
        return "a node of the plan is gone"
    return None


def plan_around(
    manifest_id: str,
    shape: ModelShape,
    nodes: Sequence[NodeShape],
    pinned: Sequence[Assignment],
    atlas: Atlas,
    *,
    copies: int,
    previous: Plan | None,
    epoch: int,
    planner: str,
    held: Mapping[str, Sequence[tuple[int, int]]],
) -> Plan:
    """A plan that keeps the pinned spans and places the layers they leave short. Raises Shortage."""
    links = atlas.links()
    if not pinned:
        return make_plan(
            manifest_id, shape, nodes, links,
            copies=copies, previous=previous, epoch=epoch, planner=planner, held=held,
        )  # fmt: skip
    assignments = list(pinned)
    room = {node.id: node for node in nodes}
    for start, end in uncovered(pinned, shape.layers, copies):
        part = replace(
            shape,
            layers=end - start,
            embed_bytes=shape.embed_bytes if start == 0 else 0,
            head_bytes=(shape.head_bytes or shape.embed_bytes) if end == shape.layers else 0,
            tied=shape.tied and start == 0 and end == shape.layers,
        )
        plan = make_plan(
            manifest_id,
            part,
            list(room.values()),
            links,
            copies=1,
            previous=None,
            epoch=epoch,
            planner=planner,
        )
        for assignment in plan.assignments:
            room.pop(assignment.node, None)
            assignments.append(Assignment(assignment.node, assignment.start + start, assignment.end + start))
    return Plan(model=manifest_id, epoch=epoch, planner=planner, assignments=tuple(assignments))
