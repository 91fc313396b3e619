"""The node that plans is stopped for so long that all it knew has run out, as a laptop that slept, and wakes."""

from __future__ import annotations

import signal
import time

import pytest

pytestmark = pytest.mark.slow  # what others said of themselves runs out after 20 s

RUN_OUT_S = 25.0


@pytest.fixture
def mesh(tmp_path, tools):
    """Four nodes, each with room for a whole model."""
    mesh = tools.Mesh(*(tools.Node(tmp_path, name, "--memory", "20MiB") for name in "abcd"))
    try:
        yield mesh
    finally:
        mesh.end()


def held(node):
    """Epoch and planner of the plan a node holds to; None where it knows no plan."""
    model = next(iter(node.view()["models"]), None)
    return model and model["planner"] and (model["epoch"], model["planner"])


def test_a_planner_that_slept_goes_on_from_the_plan_of_who_followed_it(mesh, tools):
    assert mesh.nodes[0].add(copies=2)["state"] == "ready"
    mesh.until(lambda view: view["models"][0]["copies_min"] >= 2)
    before = held(mesh.nodes[0])
    old = mesh.of(before[1])
    others = [node for node in mesh.nodes if node is not old]
    old.signal(signal.SIGSTOP)
    began_s = time.monotonic()
    tools.until(lambda: all(held(node)[1] != old.peer for node in others), "a successor's plan")
    successor = held(others[0])
    assert successor[0] > before[0]
    tools.until(lambda: time.monotonic() - began_s > RUN_OUT_S, "what the planner knew has run out")
    old.signal(signal.SIGCONT)
    seen = set()

    def agreed():
        views = [held(node) for node in (old, *others)]
        seen.update(views)
        return len(set(views)) == 1 and views[0] and views[0] >= successor and views[0]

    tools.until(agreed, "one plan in all views, none older than the successor's")
    plans = sorted(seen - {None})
    assert len({epoch for epoch, _ in plans}) == len(plans), f"two plans of one epoch: {plans}"
    assert "no peer has anything" not in old.log(), "it planned alone, and looked for what to load"
    tools.until(
        lambda: all(tools.ask(node.api, "def f", max_tokens=4)[0] == 200 for node in mesh.nodes), "answers"
    )
