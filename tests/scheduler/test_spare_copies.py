"""Copies beyond the first: whoever has room for one gets it, however cheap the scraps of room beside it look."""

from __future__ import annotations

import random

import pytest

from scheduler import Assignment, Link, ModelShape, NodeShape, Shortage, make_plan
from scheduler.balance import share_out
from scheduler.board import Board, Facts
from scheduler.mend import Mender
from scheduler.policy import fetch_factor
from scheduler.seating import seat_of
from scheduler.shapes import Plan, coverage
from scheduler.sharing import Wanted

MIB = 1 << 20
METERED = frozenset({"metered"})


def link(_a, _b):
    return Link(0.001, 1e8)


def shape(layers=8, embed=1_572_864):
    return ModelShape(layers, 750_336, embed, 1_573_248, True, 750_336.0, 384, 256, 1024, 4, 663_552)


def node(name, mib, tags=frozenset()):
    return NodeShape(name, int(mib * MIB), 1e11, 2e10, tags=tags)


@pytest.mark.parametrize("spare_tags", [frozenset(), METERED])
@pytest.mark.parametrize("held", [{}, {"spare": [(3, 8)]}])
def test_the_spare_copy_goes_to_the_empty_node_though_a_scrap_beside_the_other_model_fetches_less(
    spare_tags, held
):
    board = Board(link)
    for n in (node("a", 20), node("b", 20), node("spare", 20, spare_tags)):
        board.nodes[n.id] = n
    for model, host, demand, most in (("asked", "a", 1.0, 3), ("other", "b", 0.01, 1)):
        board.models[model] = Wanted(shape(), demand=demand, copies_max=most)
        board.plans[model] = Plan(model, 1, "a", (Assignment(host, 0, 8),))
        board.copies[model] = 1
    board.facts["asked"] = Facts(held={"a": [(0, 8)], **held}, sessions={"a": 6})
    assert 0 < seat_of(shape(), next(n for n in board.free("asked") if n.id == "b")).room < 8
    changes = share_out(board)
    assert changes is not None
    assert sorted(changes) == ["asked"]
    assert sorted(changes["asked"]) == [Assignment("a", 0, 8), Assignment("spare", 0, 8)]


def pool(seed):
    """A few nodes that can hold a whole copy together, some metered, some with parts of it on their disks."""
    chance = random.Random(seed)
    model = shape(chance.choice([4, 8, 12]), chance.choice([0, 1_572_864, 6_000_000]))
    while True:
        nodes = [
            node(f"n{k}", chance.uniform(1, 26), METERED if chance.random() < 0.4 else frozenset())
            for k in range(chance.randint(2, 6))
        ]
        ends = range(model.layers + 1)
        held = {n.id: [tuple(sorted(chance.sample(ends, 2)))] for n in nodes if chance.random() < 0.3}
        try:
            make_plan("m", model, nodes, link, epoch=1, planner="")
        except Shortage:
            continue
        return model, nodes, held


def test_a_copy_that_there_is_room_for_is_found_in_any_pool():
    for seed in range(150):
        model, nodes, held = pool(seed)
        board = Board(link, {n.id: n for n in (*nodes, node("full", 100))})
        board.models["m"] = Wanted(model, copies_max=2)
        board.plans["m"] = Plan("m", 1, "full", (Assignment("full", 0, model.layers),))
        board.facts["m"] = Facts(held=held)
        changes = share_out(board)
        assert changes is not None, seed
        assert min(coverage(list(changes["m"]), model.layers)) == 2, seed
        assert Assignment("full", 0, model.layers) in changes["m"], seed


def test_additions_take_a_whole_node_where_scraps_would_leave_a_copy_with_holes():
    nodes = [node("a", 20), node("scrap", 4.2), node("spare", 20, METERED)]
    mender = Mender(shape(), [seat_of(shape(), n) for n in nodes], {}, {n.id: fetch_factor(n) for n in nodes})
    whole = [Assignment("a", 0, 8), Assignment("spare", 0, 8)]
    assert mender.mend([Assignment("a", 0, 8)], 2) == whole
