"""The public face, pinned."""

import scheduler


def test_the_face_is_what_others_code_against():
    assert set(scheduler.__all__) >= {
        "Assignment", "Chain", "ChainRequest", "Hosted", "Link", "Links", "ModelShape", "NoChain", "NoRoom",
        "NodeShape", "Plan", "Shortage", "Stage", "adopt", "choose_chain", "make_plan", "memory_needed",
        "needs_replan", "planner_rank",
    }  # fmt: skip
    assert all(hasattr(scheduler, name) for name in scheduler.__all__)
    assert list(scheduler.__all__) == sorted(scheduler.__all__)
