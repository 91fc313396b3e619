"""Phase 1 as each node runs it: who plans, when, and which plan holds. A pure core around `scheduler`.

For every model the live nodes rank themselves by rendezvous hash; the first one plans and publishes, all adopt by
epoch. A plan of anyone else is followed only by those whose own plan has lost its planner (or who have none), so that
no other member can move what the first one placed; where views differed for a while the first one issues its plan anew.
Nodes whose owner pinned a span (`--layers`) are taken as they are and the rest is planned around them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from node.adverts import ModelAdvert, PlanAdvert
from node.atlas import Atlas
from scheduler import (
    Assignment,
    Links,
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
        for gone in (set(self.plans) | set(self.shortages)) - known:
            self.plans.pop(gone, None)
            self.shortages.pop(gone, None)
        out: list[Publish] = []
        members = set(atlas.nodes) | {self._me}
        taken: dict[str, int] = {}
        first = {
            model.manifest_id: planner_rank(model.manifest_id, members)[0] for model in atlas.models.values()
        }
        for model in atlas.models.values():
            self._adopt(model, atlas, members, first[model.manifest_id])
        for model in sorted(atlas.models.values(), key=partial(self._precedence, atlas)):
            if may_plan and first[model.manifest_id] == self._me:
                out.extend(self._plan(model, atlas, members, taken))
            for assignment in self._assignments(model.manifest_id):
                used = memory_needed(model.shape(), assignment.start, assignment.end)
                taken[assignment.node] = taken.get(assignment.node, 0) + used
        return out

    def _precedence(self, atlas: Atlas, model: ModelAdvert) -> tuple[bool, int, int, str]:
        """Who gets memory first: what is placed already, then what more members offer, then the older."""
        unplaced = not self._assignments(model.manifest_id)
        return unplaced, -atlas.offers.get(model.manifest_id, 0), model.created_s, model.manifest_id

    def span_of(self, manifest_id: str, node: str) -> tuple[int, int] | None:
        """What `node` shall host of a model under the plan we hold to."""
        for assignment in self._assignments(manifest_id):
            if assignment.node == node:
                return assignment.start, assignment.end
        return None

    def _assignments(self, manifest_id: str) -> Sequence[Assignment]:
        plan = self.plans.get(manifest_id)
        return () if plan is None else plan.assignments

    def _adopt(self, model: ModelAdvert, atlas: Atlas, members: set[str], first: str) -> None:
        manifest_id = model.manifest_id
        held = self.plans.get(manifest_id)
        if held is not None and not is_whole(held, model.layers):
            del self.plans[manifest_id]
        for signer, advert in sorted(
            atlas.plans.get(manifest_id, []), key=lambda item: (item[1].epoch, item[0])
        ):
            offered = advert.plan(manifest_id, signer)
            current = self.plans.get(manifest_id)
            orphan = current is None or current.planner not in members
            if (
                is_whole(offered, model.layers)
                and (signer == first or orphan)
                and adopt(current, offered, members)
            ):
                self.plans[manifest_id] = current = offered
            if current is not None and (current.planner, current.epoch) == (signer, advert.epoch):
                self.shortages[manifest_id] = advert.shortage

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
        seen = [advert.epoch for _, advert in atlas.plans.get(manifest_id, [])]
        newest = max([*seen, current.epoch if current else 0])
        if reason is None and (current is None or current.epoch == newest):
            return self._settle(manifest_id, "", newest)
        if reason is None and current is not None:
            # Someone else published a newer plan meanwhile: ours again, above it, so that all hold to one.
            return self._issue(replace(current, epoch=newest + 1, planner=self._me))
        hosts = atlas.live_hosts(manifest_id)
        held = {peer: [(host.start, host.end)] for peer, host in hosts.items()}
        ready = {peer for peer, host in hosts.items() if host.state == "ready"}
        try:
            plan = plan_around(
                manifest_id, shape, nodes, pinned, ready, atlas.links(),
                copies=model.copies, previous=current, epoch=newest + 1, planner=self._me, held=held,
            )  # fmt: skip
        except Shortage as short:
            return self._settle(manifest_id, str(short), newest)
        settled = current is not None and current.planner in members and current.epoch == newest
        if settled and current is not None and plan.assignments == current.assignments:
            return self._settle(manifest_id, "", newest)
        return self._issue(plan)

    def _issue(self, plan: Plan, shortage: str = "") -> list[Publish]:
        self.plans[plan.model] = plan
        self.shortages[plan.model] = shortage
        return [Publish(plan.model, replace(PlanAdvert.of(plan), shortage=shortage))]

    def _settle(self, manifest_id: str, shortage: str, newest: int) -> list[Publish]:
        """Nothing to move: say so when the shortage is news."""
        if self.shortages.get(manifest_id, "") == shortage:
            return []
        current = self.plans.get(manifest_id) or Plan(manifest_id, newest, self._me, ())
        if current.planner != self._me or current.epoch < newest:
            current = replace(current, epoch=newest + 1, planner=self._me)
        return self._issue(current, shortage)


def is_whole(plan: Plan, layers: int) -> bool:
    """Whether a plan is one that an honest planner publishes: every layer has a host, or nothing is placed yet."""
    if any(not 0 <= a.start < a.end <= layers for a in plan.assignments):
        return False
    return not plan.assignments or min(plan.coverage(layers)) > 0


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
    ready: Collection[str],
    links: Links,
    *,
    copies: int,
    previous: Plan | None,
    epoch: int,
    planner: str,
    held: Mapping[str, Sequence[tuple[int, int]]],
) -> Plan:
    """A plan that keeps the pinned spans and places the layers they leave short. Raises Shortage.

    Where others serve already, a pinned node that is not in `ready` yet relieves nobody: it may never be.
    """
    if not pinned:
        return make_plan(
            manifest_id, shape, nodes, links,
            copies=copies, previous=previous, epoch=epoch, planner=planner, held=held,
        )  # fmt: skip
    keep = () if previous is None else previous.assignments
    relied_on = [a for a in pinned if a.node in ready] if any(a not in pinned for a in keep) else pinned
    try:
        rest = _fill(manifest_id, shape, nodes, relied_on, keep, links, copies)
    except Shortage:
        rest = _fill(manifest_id, shape, nodes, pinned, keep, links, copies)
    spans = sorted([*pinned, *rest], key=lambda a: (a.start, a.end, a.node))
    return Plan(model=manifest_id, epoch=epoch, planner=planner, assignments=tuple(spans))


def _fill(
    manifest_id: str,
    shape: ModelShape,
    nodes: Sequence[NodeShape],
    fixed: Sequence[Assignment],
    keep: Sequence[Assignment],
    links: Links,
    copies: int,
) -> list[Assignment]:
    """Spans on `nodes` for the layers that `fixed` leaves short, moving those of `keep` as little as may be."""
    room = {node.id: node for node in nodes}
    found: list[Assignment] = []
    for start, end, lacking in uncovered(fixed, shape.layers, copies):
        part = replace(
            shape,
            layers=end - start,
            embed_bytes=shape.embed_bytes if start == 0 else 0,
            head_bytes=(shape.head_bytes or shape.embed_bytes) if end == shape.layers else 0,
            tied=shape.tied and start == 0 and end == shape.layers,
        )
        inside = [a for a in keep if a.node in room and start <= a.start and a.end <= end]
        before = tuple(Assignment(a.node, a.start - start, a.end - start) for a in inside)
        plan = make_plan(
            manifest_id, part, list(room.values()), links,
            copies=lacking, previous=Plan(manifest_id, 0, "", before) if before else None, epoch=1, planner="",
        )  # fmt: skip
        for assignment in plan.assignments:
            room.pop(assignment.node, None)
            found.append(Assignment(assignment.node, assignment.start + start, assignment.end + start))
    return found
