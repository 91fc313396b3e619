"""Reading `/mesh` and answering from it."""

from __future__ import annotations

import pytest

from shoal.errors import DaemonGarbled
from shoal.mesh_view import MeshView, layer_range, node_state


def view(*spans: tuple[str, int, int, str], layers: int = 6, **model) -> MeshView:
    """A mesh with one span a node."""
    nodes = [
        {"peer": f"peer{i}", "name": name, "connected": True, "spans": [span_of(start, end, state)]}
        for i, (name, start, end, state) in enumerate(spans)
    ]
    return MeshView.parse(
        {"mesh": "m", "self": "peer0", "nodes": nodes, "models": [{"name": "x", "layers": layers} | model]}
    )


def span_of(start: int, end: int, state: str) -> dict:
    return {"model": "x", "start": start, "end": end, "state": state, "progress": 0.5}


def test_copies_counts_ready_layers_only():
    mesh = view(("a", 0, 4, "ready"), ("b", 2, 6, "ready"), ("c", 0, 6, "loading"))
    assert mesh.copies("x") == [1, 1, 2, 2, 1, 1]
    assert mesh.served("x")
    assert not mesh.served("x", 2)


def test_a_model_without_layers_or_name_is_not_served():
    assert not view(layers=0).served("x")
    assert not view().served("unknown")


@pytest.mark.parametrize(
    ("spans", "copies", "says"),
    [
        ([("a", 0, 6, "ready")], 1, ""),
        (
            [("a", 0, 2, "ready"), ("b", 4, 5, "ready")],
            1,
            "layers 2-3, 5 of 6 of 'x' are not served by any node",
        ),
        ([("a", 0, 6, "ready"), ("b", 0, 5, "ready")], 2, "layers 5 of 6 of 'x' are not served 2 times"),
    ],
)
def test_lacking_names_the_layers(spans, copies, says):
    assert view(*spans).lacking("x", copies) == says


def test_lacking_gives_the_daemons_reason():
    assert view(detail="2.1 GiB short").lacking("x").endswith("by any node (2.1 GiB short)")
    assert "no node knows" in view().lacking("y")


@pytest.mark.parametrize(
    ("spans", "copies", "progress"),
    [
        ([("a", 0, 3, "ready")], 1, 0.5),
        ([("a", 0, 3, "ready"), ("b", 3, 6, "loading")], 1, 0.75),
        ([("a", 0, 3, "ready"), ("b", 3, 6, "failed")], 1, 0.5),
        ([("a", 0, 6, "ready")], 2, 0.5),
        ([("a", 0, 6, "ready"), ("b", 0, 6, "ready")], 1, 1.0),
    ],
)
def test_progress(spans, copies, progress):
    assert view(*spans).progress("x", copies) == pytest.approx(progress)


@pytest.mark.parametrize(
    "document",
    [
        {"mesh": 1},
        {"nodes": {}},
        {"nodes": [1]},
        {"nodes": [{"name": ["a"]}]},
        {"nodes": [{"memory_bytes": True}]},
        {"nodes": [{"spans": [{"start": 3, "end": 1}]}]},
        {"nodes": [{"spans": [{"start": 0, "end": 10**12}]}]},
        {"nodes": [{"rtt_ms": "fast"}]},
        {"models": [{"layers": -1}]},
        {"models": [{"ready": "yes"}]},
    ],
)
def test_wrong_types_are_refused(document):
    with pytest.raises(DaemonGarbled):
        MeshView.parse(document)


def test_unknown_and_missing_keys_are_tolerated():
    mesh = MeshView.parse({"new": 1, "nodes": [{"peer": "p", "newer": {}}], "models": [{"name": "x"}]})
    assert mesh.nodes[0].peer == "p"
    assert mesh.models[0].copies_wanted == 1


def test_names_cannot_steer_the_terminal():
    mesh = MeshView.parse({"nodes": [{"name": "a\x1b[2Jb\r\n\u202ec"}]})
    assert mesh.nodes[0].name == "a?[2Jb???c"


@pytest.mark.parametrize(
    ("node", "state"),
    [
        ({"self": True}, "idle"),
        ({"connected": True}, "idle"),
        ({}, "unreachable"),
        ({"connected": True, "suspect": True}, "lost?"),
        ({"connected": True, "spans": [span_of(0, 1, "ready")]}, "serving"),
        ({"connected": True, "spans": [span_of(0, 1, "fetching")]}, "fetching 50 %"),
        ({"connected": True, "spans": [span_of(0, 1, "failed")]}, "failed: x"),
        (
            {"connected": True, "spans": [span_of(0, 1, "ready")], "health": {"state": "slow"}},
            "slow, avoided",
        ),
        (
            {"connected": True, "spans": [span_of(0, 1, "ready")], "health": {"state": "probation"}},
            "on probation",
        ),
        ({"connected": True, "spans": [span_of(0, 1, "ready")], "health": {"state": "good"}}, "serving"),
        ({"connected": True, "spans": [span_of(0, 1, "ready")], "health": None}, "serving"),
    ],
)
def test_node_state(node, state):
    mesh = MeshView.parse({"nodes": [{"peer": "p"} | node]})
    assert node_state(mesh.nodes[0]) == state


def test_layer_ranges_are_written_inclusively():
    assert [layer_range(0, 1), layer_range(4, 8)] == ["0", "4-7"]
