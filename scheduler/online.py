"""The planner of a mesh as a state machine: members, models and figures change, plans come out.

`MeshPlanner.handle(event, now_s)` returns instructions. Joins, leaves and drift are met by the smallest move at
once; moves that pay are looked for at leisure, on `Tick`. It runs on every member alike; only the one that ranks
first plans, and it plans all models, because they share the memory. No clock, no chance, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scheduler.balance import Changes, in_order, make_room, share_out
from scheduler.board import NOTHING, Board, Facts, Spans
from scheduler.errors import LocalFault, Shortage
from scheduler.judge import SideBySide
from scheduler.mend import fetch_bytes
from scheduler.placement import SECOND_THOUGHTS_NODES_MAX
from scheduler.planner import MESH, adopt, planner_rank
from scheduler.relief import relieve
from scheduler.shapes import Assignment, Links, NodeShape, Plan, coverage, memory_needed, node_of
from scheduler.sharing import Wanted

DRIFT_LEAST = 0.2
"""Measured times that moved by less than this fraction since they were last planned with are no news."""
RELIABILITY_DRIFT_LEAST = 0.05
SECOND_THOUGHTS_S = 60.0
"""How often a standing plan is weighed against a new one."""
PROPOSALS = 2
"""So many times in a row a better plan must be found before anything moves: one reading may be a hiccup."""
FENCES_MAX = 4096


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
    """A plan of some member arrived, or is still published."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a model's hosts and, where it was measured, how much the model is wanted."""

    model: str
    facts: Facts
    demand: float | None = None
    copies_max: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Joined | Left | ModelAdded | ModelDropped | PlanSeen | Observed | Tick


@dataclass(frozen=True, slots=True)
class Publish:
    """Sign and publish this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class ReportShortage:
    """The model cannot be placed; `shortage` says what is missing. Publish `plan`, which is what stands of it."""

    model: str
    shortage: Shortage
    plan: Plan


Instruction = Publish | ReportShortage


@dataclass(frozen=True, slots=True)
class Prospect:
    """Where a model would go, the chains that could run there side by side, and the models that would move for it."""

    spans: tuple[Assignment, ...]
    chains: tuple[SideBySide, ...]
    moved: Mapping[str, tuple[Assignment, ...]]


@dataclass(slots=True)
class _State:
    short: dict[str, str] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    fences: dict[str, tuple[int, str]] = field(default_factory=dict)
    rivals: dict[str, Plan] = field(default_factory=dict)
    remembered: dict[str, Spans] = field(default_factory=dict)
    weighed_s: dict[str, float] = field(default_factory=dict)
    answered_s: dict[str, float] = field(default_factory=dict)
    proposals: dict[str, int] = field(default_factory=dict)
    shared_s: float | None = None
    stale: bool = True


class MeshPlanner:
    """One member's planner. `me` plans only while it ranks first among the members it knows."""

    def __init__(
        self,
        me: str,
        links: Links,
        *,
        second_thoughts_s: float = SECOND_THOUGHTS_S,
        fences: Mapping[str, tuple[int, str]] | None = None,
        remembered: Mapping[str, Spans] | None = None,
    ) -> None:
        """From an earlier life: `fences`, so that it does not go back behind them or use an epoch twice, and the spans
        of the plans it held to, for the case that the whole mesh starts again."""
        self._me = me
        self._board = Board(links)
        self._state = _State(fences=dict(fences or {}), remembered=dict(remembered or {}))
        self._state.seen.update({model: epoch for model, (epoch, _) in self._state.fences.items()})
        self._every_s = second_thoughts_s
        self._ranked: tuple[frozenset[str], str] | None = (frozenset({me}), me)

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans this member holds to that cover their models, by model."""
        return dict(self._board.plans)

    @property
    def held(self) -> dict[str, Plan]:
        """All plans this member holds to, also what stands of those that cannot be whole."""
        return self._board.broken | self._board.plans

    @property
    def fences(self) -> dict[str, tuple[int, str]]:
        """By model the epoch and the planner of the newest plan that this member ever held to."""
        return dict(self._state.fences)

    @property
    def nodes(self) -> dict[str, NodeShape]:
        """The hosts, with the figures that plans are made of."""
        return dict(self._board.nodes)

    @property
    def first(self) -> str:
        """Who plans, as far as this member knows."""
        return self._members[1]

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in what happened; what to do about it."""
        return self.handle_all([event], now_s)

    def handle_all(
        self, events: Iterable[Event], now_s: float, *, may_plan: bool = True
    ) -> list[Instruction]:
        """Take in what happened at once; what to do about it. Without `may_plan` plans are only adopted."""
        ticked = False
        for event in events:
            ticked |= isinstance(event, Tick)
            self._state.stale |= self._take(event, now_s)
        if not may_plan or self.first != self._me:
            return []
        out: list[Instruction] = []
        if self._state.stale:
            self._state.stale = False
            out += self._mend_all(now_s)
        if ticked:
            out += self._second_thoughts(now_s)
        return out

    def preview(self, model: str, wanted: Wanted) -> Prospect:
        """What would go where if the model were wanted now, beside all that is placed. Raises Shortage.

        A model that is placed keeps its spans with whatever additions it lacks. Nothing is changed.
        """
        board = self._board
        trial = Board(
            board.links, dict(board.nodes), board.models | {model: wanted}, dict(board.plans), dict(board.broken),
            dict(board.facts), board.copies | {model: wanted.copies},
        )  # fmt: skip
        changes: Changes | None = None
        try:
            spans = trial.place(model, trial.free(model), trial.spans(model), wanted.copies)
        except Shortage:
            changes = make_room(trial, model)
            if changes is None:
                raise
            spans = changes[model]
        others = {m: tuple(s) for m, s in (changes or {}).items() if m != model}
        return Prospect(tuple(sorted(spans)), tuple(trial.chains(model, spans, others)), others)

    # -- what happened ---------------------------------------------------------------------------------------------

    def _take(self, event: Event, now_s: float) -> bool:
        """Note the event; whether plans may have to change for it at once."""
        board = self._board
        match event:
            case Joined(node):
                old = board.nodes.get(node.id)
                if old is not None and not _drifted(old, node):
                    return False
                board.nodes[node.id] = node
                if old is None:
                    self._ranked = None
            case Left(name):
                if board.nodes.pop(name, None) is None:
                    return False
                self._ranked = None
            case ModelAdded(model, wanted):
                return self._add(model, wanted)
            case ModelDropped(model):
                if board.models.pop(model, None) is None:
                    return False
                self._forget(model)
            case PlanSeen(plan):
                return self._seen(plan, now_s)
            case Observed(model, facts, demand, copies_max):
                board.facts[model] = facts
                known = board.models.get(model)
                if known is not None and demand is not None:
                    most = known.copies_max if copies_max is None else copies_max
                    board.models[model] = replace(known, demand=demand, copies_max=most)
                return False
            case Tick():
                return False
        return True

    def _add(self, model: str, wanted: Wanted) -> bool:
        board = self._board
        old = board.models.get(model)
        board.models[model] = wanted
        if old is not None and replace(old, demand=wanted.demand, copies_max=wanted.copies_max) == wanted:
            return False
        board.copies[model] = wanted.copies
        if old is not None and old.shape != wanted.shape:
            board.plans.pop(model, None)
            board.broken.pop(model, None)
        remembered = Plan(model, 0, "", tuple(self._state.remembered.pop(model, ())))
        if old is None and remembered.assignments and is_whole(remembered, wanted.shape.layers):
            board.broken[model] = remembered
        return True

    def _forget(self, model: str) -> None:
        for table in (self._board.plans, self._board.broken, self._board.copies, self._board.facts,
                      self._state.short, self._state.weighed_s, self._state.proposals,
                      self._state.answered_s):  # fmt: skip
            table.pop(model, None)
        self._state.rivals.pop(model, None)

    @property
    def _members(self) -> tuple[frozenset[str], str]:
        """All members, and the one that plans. Counted once after many came or went together."""
        if self._ranked is None:
            members = frozenset({node_of(name) for name in self._board.nodes} | {self._me})
            self._ranked = (members, planner_rank(MESH, members)[0])
        return self._ranked

    def _seen(self, plan: Plan, now_s: float) -> bool:
        """Adopt a plan, or note that it stands against the one held. A plan of anyone but the first member is followed
        only by who has none, or whose own has lost its planner."""
        board, state = self._board, self._state
        state.seen[plan.model] = max(plan.epoch, state.seen.get(plan.model, 0))
        wanted = board.models.get(plan.model)
        if wanted is None or not is_whole(plan, wanted.shape.layers):
            return False
        current, members = board.held_to(plan.model), self._members[0]
        fence = state.fences.get(plan.model, (0, ""))
        orphan = current is None or current.planner not in members
        known = (plan.epoch, plan.planner) == fence
        if current is not None and known:
            return False
        new = plan.epoch > fence[0] or known
        if new and (plan.planner == self.first or orphan) and adopt(current, plan, members):
            self._hold(plan)
            state.weighed_s[plan.model] = now_s
            return True
        if current is None or plan.epoch < current.epoch:
            return False
        if plan.planner not in members:
            # Whoever adopted it before its planner went must be led away from it. Where that planner is not gone but
            # only out of our sight it would answer in kind, so not at once again.
            if now_s < state.answered_s.get(plan.model, now_s):
                return False
            state.answered_s[plan.model] = now_s + self._every_s
        rival = state.rivals.get(plan.model)
        if rival is None or plan.epoch >= rival.epoch:
            state.rivals[plan.model] = plan
        return True

    def _hold(self, plan: Plan) -> None:
        """Hold to a plan: it is the newest that this member ever held to."""
        board = self._board
        (board.broken if plan.assignments else board.plans).pop(plan.model, None)
        (board.plans if plan.assignments else board.broken)[plan.model] = plan
        self._fence(plan)

    def _fence(self, plan: Plan) -> None:
        fences = self._state.fences
        fences.pop(plan.model, None)
        fences[plan.model] = (plan.epoch, plan.planner)
        if len(fences) > FENCES_MAX:
            del fences[next(iter(fences))]

    # -- what to do ------------------------------------------------------------------------------------------------

    def _mend_all(self, now_s: float) -> list[Instruction]:
        """Mend every model; where one finds no place, see whether others can give way."""
        board = self._board
        out: list[Instruction] = []
        shortages: dict[str, Shortage] = {}
        for rival in self._state.rivals.values():
            self._side_with_hosts(rival)
        for model in in_order(board, board.models):
            out += self._mend(model, now_s, shortages)
        for model in in_order(board, shortages):
            changes = make_room(board, model)
            if changes is not None:
                del shortages[model]
                out += self._change(changes, now_s)
                for other in in_order(board, board.models):
                    out += self._mend(other, now_s, {})
        for model, short in shortages.items():
            out += self._report(model, short)
        return _last_of_each(out)

    def _side_with_hosts(self, rival: Plan) -> None:
        """Where hosts follow the plan of another member (it planned while this one was not there, say), go on from
        that one: the plan stands that has less to be fetched. What that member says of itself is no vote for it."""
        board, model = self._board, rival.model
        own = board.plans.get(model)
        if own is None or model not in board.models or not rival.assignments:
            return
        shape, held = board.models[model].shape, board.facts.get(model, NOTHING).held
        votes = {node: spans for node, spans in held.items() if node_of(node) != rival.planner}

        def missing_bytes(plan: Plan) -> int:
            spans = [(a.node, (a.start, a.end)) for a in plan.assignments]
            return sum(fetch_bytes(shape, None, span, votes.get(node, ())) for node, span in spans)

        if missing_bytes(rival) < missing_bytes(own):
            board.plans[model] = replace(own, assignments=rival.assignments)

    def _mend(self, model: str, now_s: float, shortages: dict[str, Shortage]) -> list[Instruction]:
        """Keep what stands, add what is short; new spans only where additions cannot do."""
        board = self._board
        old = board.held_to(model)
        try:
            spans = board.place(model, board.free(model), board.spans(model), board.copies[model])
        except Shortage as short:
            shortages[model] = short
            board.plans.pop(model, None)
            if old is not None:
                board.broken[model] = old
            return []
        return self._publish(model, spans, now_s)

    def _change(self, changes: Changes, now_s: float) -> list[Instruction]:
        """Publish new spans, of those who give way first. Whoever gave all is left without a plan."""
        out: list[Instruction] = []
        for model in sorted(changes, key=lambda m: (len(changes[m]) > len(self._board.spans(m)), m)):
            if changes[model]:
                wanted = self._board.models[model]
                have = min(coverage(list(changes[model]), wanted.shape.layers))
                self._board.copies[model] = max(wanted.copies, have)
                out += self._publish(model, changes[model], now_s)
            else:
                self._board.broken[model] = self._next(model, ())
                self._state.short.pop(model, None)
        return out

    def _report(self, model: str, short: Shortage) -> list[Instruction]:
        """Say what is missing, once, and again where it is something else."""
        if self._state.short.get(model) == str(short):
            return []
        self._state.short[model] = str(short)
        plan = self._next(model, self._board.spans(model))
        self._board.plans.pop(model, None)
        self._board.broken[model] = plan
        self._fence(plan)
        return [ReportShortage(model, short, plan)]

    def _next(self, model: str, spans: Spans) -> Plan:
        """A plan of the next epoch, above all that were ever seen."""
        state, old = self._state, self._board.held_to(model)
        epoch = 1 + max(state.seen.get(model, 0), old.epoch if old else 0)
        state.seen[model] = epoch
        return Plan(model, epoch, self._me, tuple(spans))

    def _publish(self, model: str, assignments: Iterable[Assignment], now_s: float) -> list[Instruction]:
        state = self._state
        spans = tuple(sorted(assignments, key=lambda a: (a.start, a.end, a.node)))
        old = self._board.plans.get(model)
        state.weighed_s.setdefault(model, now_s)
        rival = state.rivals.pop(model, None) is not None
        if old is not None and old.assignments == spans and old.planner in self._members[0] and not rival:
            return []
        plan = self._next(model, spans)
        state.short.pop(model, None)
        self._hold(plan)
        return [Publish(plan)]

    # -- at leisure ------------------------------------------------------------------------------------------------

    def _second_thoughts(self, now_s: float) -> list[Instruction]:
        """Now and then: copies by demand, a better plan where one pays, another try for who has no place."""
        board, state, out = self._board, self._state, list[Instruction]()
        if state.shared_s is None:
            state.shared_s = now_s
        if now_s - state.shared_s >= self._every_s:
            state.shared_s = now_s
            out += self._change(share_out(board) or {}, now_s)
            if len(board.plans) < len(board.models):
                out += self._mend_all(now_s)
        for model in in_order(board, board.plans):
            if now_s - state.weighed_s.setdefault(model, now_s) >= self._every_s:
                state.weighed_s[model] = now_s
                out += self._publish(model, self._reconsidered(model), now_s)
        return _last_of_each(out)

    def _reconsidered(self, model: str) -> Spans:
        """The model's spans as they should be now that there is time to think."""
        board, old = self._board, self._board.spans(model)
        nodes = board.free(model)
        if board.is_pinned():
            return old
        if len(nodes) > SECOND_THOUGHTS_NODES_MAX:
            return relieve(old, board.seats(model, nodes), board.models[model].shape.layers)
        try:
            new = board.weigh(model, nodes, old, board.copies[model])
        except Shortage:
            return old
        if sorted(new) == sorted(old):
            self._state.proposals.pop(model, None)
            return old
        proposals = self._state.proposals.get(model, 0) + 1
        self._state.proposals[model] = proposals % PROPOSALS
        return new if proposals == PROPOSALS else old

    def validate(self) -> None:
        """Raise LocalFault unless memory holds and every layer of every plan is covered, where the plans are mine."""
        board = self._board
        if self.first != self._me:
            return
        used: dict[str, int] = {}
        for model, plan in board.plans.items():
            shape = board.models[model].shape
            names = [a.node for a in plan.assignments]
            if len(names) != len(set(names)):
                raise LocalFault(f"{model}: a host has two spans")
            gone = [n for n in names if n not in board.nodes]
            if gone or min(plan.coverage(shape.layers)) < 1:
                raise LocalFault(f"{model}: the plan has holes (gone: {gone})")
            for a in plan.assignments:
                if board.nodes[a.node].pinned is None:
                    used[a.node] = used.get(a.node, 0) + memory_needed(shape, a.start, a.end)
        for name, size in used.items():
            if size > board.nodes[name].memory_bytes:
                raise LocalFault(f"{name} is given {size} bytes of {board.nodes[name].memory_bytes}")


def is_whole(plan: Plan, layers: int) -> bool:
    """Whether a plan is one that an honest planner publishes: every layer has a host, or nothing is placed yet."""
    if any(not 0 <= a.start < a.end <= layers for a in plan.assignments):
        return False
    return not plan.assignments or min(plan.coverage(layers)) > 0


def _last_of_each(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Of several plans for one model only the last: nobody saw those before it."""
    last: dict[str, Instruction] = {}
    for instruction in instructions:
        model = instruction.plan.model
        last.pop(model, None)
        last[model] = instruction
    return list(last.values())


def _drifted(old: NodeShape, new: NodeShape) -> bool:
    """Whether the figures moved enough to plan with them."""
    if new == old:
        return False
    if _fixed(new) != _fixed(old) or abs(new.reliability - old.reliability) > RELIABILITY_DRIFT_LEAST:
        return True
    return _moved(old.decode_s_per_layer, new.decode_s_per_layer) or _moved(
        old.prefill_s_per_token_per_layer, new.prefill_s_per_token_per_layer
    )


def _fixed(node: NodeShape) -> NodeShape:
    return replace(node, decode_s_per_layer=None, prefill_s_per_token_per_layer=None, reliability=1.0)


def _moved(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > DRIFT_LEAST * old
