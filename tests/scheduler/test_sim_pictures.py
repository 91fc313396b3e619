"""Pictures of runs: well-formed SVG with every policy named, whatever the figures."""

import itertools
from xml.etree import ElementTree

import pytest

from scheduler.sim import POLICIES, goodput_picture, times_picture
from scheduler.sim.figures import herding, percentiles
from scheduler.sim.pictures import steps


def figures(asked=(5.0, 6.0), kept=(4.0, 3.0), p99=9.0):
    return {
        "nodes": 4,
        "nodes_left": 1,
        "nodes_joined": 0,
        "targets": {"ttft_s": 5.0, "tpot_s": 0.25},
        "ttft_s": {"p50": 1.0, "p90": None, "p99": p99},
        "tpot_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3},
        "series": {"asked_per_s": list(asked), "kept_per_s": list(kept)},
    }


@pytest.mark.parametrize("draw", [goodput_picture, times_picture])
@pytest.mark.parametrize("shape", [{}, {"asked": [0.0], "kept": [0.0], "p99": None}])
def test_a_picture_is_svg_that_names_every_policy(draw, shape):
    picture = draw({name: figures(**shape) for name in POLICIES})
    tree = ElementTree.fromstring(picture)
    texts = {element.text for element in tree.iter() if element.tag.endswith("text")}
    for name in POLICIES:
        assert name in texts or set(name.split("-")) <= texts


def test_labels_do_not_cover_one_another():
    picture = goodput_picture({name: figures(kept=(1.0, 1.0)) for name in POLICIES})
    tree = ElementTree.fromstring(picture)
    heights = sorted(float(e.get("y")) for e in tree.iter() if e.text in POLICIES)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= 420 - 52 + 5


@pytest.mark.parametrize(
    ("top", "marks"),
    [(0, [0, 1]), (4, [0, 1, 2, 3, 4]), (0.3, [0, 0.1, 0.2, 0.3]), (70, [0, 20, 40, 60, 80])],
)
def test_marks_are_round_figures_that_reach_the_top(top, marks):
    assert steps(top) == pytest.approx(marks)


def test_percentiles_are_by_the_nearest_rank():
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_herding_is_the_share_of_the_most_picked():
    chains = [(0.1 * k, "g", ("a", "b") if k < 6 else ("a", "c")) for k in range(8)]
    assert herding(chains) == {"most_picked_chain": 0.75, "most_picked_node": 1.0}
    assert herding(chains[:3]) == {"most_picked_chain": None, "most_picked_node": None}
