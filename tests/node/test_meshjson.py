"""The `/mesh` document's words on what a model lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from node.meshjson import model_shortage
from scheduler import Assignment, Plan


@pytest.mark.parametrize(
    ("spans", "copies", "said", "words"),
    [
        (None, 1, "", ""),
        (None, 1, "needs 9 GiB", "needs 9 GiB"),
        ([(0, 4), (4, 8)], 1, "", ""),
        ([(0, 4), (4, 8), (0, 8)], 2, "", ""),
        ([(0, 4), (4, 8), (0, 7)], 2, "", "the mesh has room for 1 of 2 copies of each layer"),
        ([(0, 4), (4, 8)], 2, "needs 9 GiB", "needs 9 GiB"),
    ],
)
def test_what_a_model_finds_no_room_for(spans, copies, said, words):
    model = SimpleNamespace(manifest_id="m", layers=8, copies=copies)
    plans = {}
    if spans is not None:
        held = tuple(Assignment(f"n{i}", start, end) for i, (start, end) in enumerate(spans))
        plans["m"] = Plan(model="m", epoch=1, planner="n0", assignments=held)
    planning = SimpleNamespace(plans=plans, shortages={"m": said} if said else {})
    assert model_shortage(planning, model) == words
