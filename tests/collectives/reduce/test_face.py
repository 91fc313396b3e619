"""What the package shows."""

import collectives.reduce as face


def test_the_face_is_pinned():
    assert set(face.__all__) == {
        "AGGREGATORS", "HEADER_BYTES", "Accusation", "Equivocation", "Exchange", "ExchangeSettings", "Feedback",
        "Frame", "FrameRefused", "Header", "Kind", "Layout", "LayoutError", "MisuseError", "PlanError", "ReducePlan",
        "Result", "Statement", "Vector", "Verdict", "capped", "commit_of", "contribution_statement", "digest_of",
        "header_of", "norm_of", "outliers", "pack_proof", "plan_reduce", "recheck", "result_statement", "verify_proof",
        "weighted_mean",
    }  # fmt: skip
    assert all(hasattr(face, name) for name in face.__all__)
