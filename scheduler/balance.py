"""Several models on one mesh: room for one that has no place, and copies that follow demand, by the smallest moves.

Each function answers with new spans for the models that change, or with none; it changes no plan itself. What must be
fetched again and the sessions that a move disturbs count against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.board import NOTHING, Board, Spans
from scheduler.errors import Shortage
from scheduler.placement import HYSTERESIS, SECOND_THOUGHTS_NODES_MAX, move_cost
from scheduler.relief import trim
from scheduler.shapes import coverage

Changes = dict[str, Spans]


def make_room(board: Board, model: str) -> Changes | None:
    """New spans for a model without a place, and for those that must give way to it; None where it has none.

    First copies beyond those wanted go, of the model that needs them least; then what is left of models that cannot be
    served anyway; then one other model is placed anew, then all are.
    """
    for attempt in (_of_spare_copies, _of_the_broken, _of_one_other, _of_all):
        changes = attempt(board, model)
        if changes is not None:
            return changes
    return None


def _placed(board: Board, model: str, instead: Changes, copies: int = 1) -> Spans | None:
    try:
        return board.place(model, board.free(model, instead), board.spans(model), copies)
    except Shortage:
        return None


def _of_spare_copies(board: Board, model: str) -> Changes | None:
    changes: Changes = {}
    donors = [m for m in board.plans if m != model and board.have(m) > board.models[m].copies]
    for donor in sorted(donors, key=lambda m: (_worth_s(board, m, board.have(m)), m)):
        changes[donor] = _fewer(board, donor, board.models[donor].copies)
        spans = _placed(board, model, changes)
        if spans is not None:
            return changes | {model: spans}
    return None


def _of_the_broken(board: Board, model: str) -> Changes | None:
    others = [m for m in board.broken if m != model and board.broken[m].assignments]
    if not others:
        return None
    changes: Changes = dict.fromkeys(others, ())
    spans = _placed(board, model, changes)
    return None if spans is None else changes | {model: spans}


def _movable(board: Board, model: str) -> list[str]:
    """Models that may be placed anew for the sake of one, those with the fewest open sessions first."""
    if len(board.nodes) > SECOND_THOUGHTS_NODES_MAX or board.is_pinned():
        return []
    others = [m for m in board.plans if m != model]
    return sorted(others, key=lambda m: (sum(board.facts.get(m, NOTHING).sessions.values()), m))


def _of_one_other(board: Board, model: str) -> Changes | None:
    for other in _movable(board, model):
        spans = _placed(board, model, {other: ()})
        if spans is None:
            continue
        moved = _anew(board, [other], {model: spans})
        if moved is not None:
            return moved
    return None


def _of_all(board: Board, model: str) -> Changes | None:
    others = _movable(board, model)
    if not others:
        return None
    by_size = sorted([*others, model], key=lambda m: (-board.models[m].shape.layer_bytes, m))
    for order in ([model, *others], by_size):
        found = _anew(board, order, dict.fromkeys(order, ()))
        if found is not None:
            return found
    return None


def _anew(board: Board, order: Sequence[str], changes: Changes) -> Changes | None:
    """`changes` with the models of `order` placed once from nothing, in turn; None where one finds no room."""
    changes = dict(changes)
    for m in order:
        nodes = board.free(m, changes)
        try:
            changes[m] = board.weigh(m, nodes, (), 1)
        except Shortage:
            return None
    return changes


def share_out(board: Board) -> Changes | None:
    """One more copy for the model that needs one most, in free memory or in that of one which needs its last copy much
    less; or one copy less of what is wanted less now. None where all is as it should be."""
    surplus = [
        m for m in board.plans if board.have(m) > max(board.models[m].copies, board.models[m].copies_max)
    ]
    if surplus:
        m = surplus[0]
        return {m: _fewer(board, m, max(board.models[m].copies, board.models[m].copies_max))}
    if len(board.plans) < len(board.models) or board.is_pinned():
        return None
    hungry = [m for m in board.plans if board.have(m) < board.models[m].copies_max]
    for m in sorted(hungry, key=lambda m: (-_worth_s(board, m, board.have(m) + 1), m)):
        spans = _one_more(board, m, {})
        if spans is not None:
            return {m: spans}
        traded = _trade(board, m)
        if traded is not None:
            return traded
    return None


def _worth_s(board: Board, model: str, copy: int) -> float:
    """What the `copy`-th copy of a model is worth: the demand that each of so many carries (D'Hondt's quotient)."""
    return board.models[model].demand / max(1, copy)


def _fewer(board: Board, model: str, copies: int) -> Spans:
    seats = board.seats(model, board.free(model))
    layers = board.models[model].shape.layers
    return trim(board.spans(model), copies, seats, layers, board.facts.get(model, NOTHING).sessions)


def _one_more(board: Board, model: str, instead: Changes) -> Spans | None:
    """The model's spans with additions that make one whole copy more."""
    want, old = board.have(model) + 1, board.spans(model)
    nodes = board.free(model, instead)
    spans = board.mender(model, nodes).mend(old, want)
    if spans is not None and min(coverage(list(spans), board.models[model].shape.layers)) >= want:
        return spans
    if len(nodes) > SECOND_THOUGHTS_NODES_MAX:
        return None
    # Additions one by one can miss a copy that there is room for; a plan over the idle nodes does not.
    busy = {a.node for a in old}
    try:
        return [*old, *board.weigh(model, [node for node in nodes if node.id not in busy], (), 1)]
    except Shortage:
        return None


def _trade(board: Board, model: str) -> Changes | None:
    """A copy of a model that needs it less, given to `model`, if that pays for the bytes and sessions it costs."""
    gained = _worth_s(board, model, board.have(model) + 1)
    donors = [m for m in board.plans if m != model and board.have(m) > board.models[m].copies]
    for donor in sorted(donors, key=lambda m: (_worth_s(board, m, board.have(m)), m)):
        gain = gained / max(1e-12, _worth_s(board, donor, board.have(donor)))
        if gain <= 1 + HYSTERESIS:
            return None
        fewer = _fewer(board, donor, board.have(donor) - 1)
        more = _one_more(board, model, {donor: fewer})
        if more is None:
            continue
        if gain > 1 + HYSTERESIS * (1 + _cost(board, model, more) + _cost(board, donor, fewer)):
            return {donor: fewer, model: more}
    return None


def _cost(board: Board, model: str, spans: Spans) -> float:
    facts = board.facts.get(model, NOTHING)
    return move_cost(board.models[model].shape, board.spans(model), spans, facts.held, facts.sessions)


def in_order(board: Board, models: Iterable[str]) -> list[str]:
    """Who gets memory first: what is placed already, then as the models' own order says, then the most wanted."""
    return sorted(
        models, key=lambda m: (m not in board.plans, board.models[m].order, -board.models[m].demand, m)
    )
