"""The data plane of a round: who sends which bytes to whom, and what owners add up.

`Exchange` is a reduction from one member's point of view: frames in, frames out, tensors at the end. It does no I/O.
"""

from collectives.reduce.combine import weighted_mean
from collectives.reduce.errors import FrameRefused, LayoutError, MisuseError, PlanError
from collectives.reduce.evidence import (
    Accusation,
    Equivocation,
    Statement,
    Verdict,
    commit_of,
    contribution_statement,
    pack_proof,
    recheck,
    result_statement,
    verify_proof,
)
from collectives.reduce.exchange import Exchange
from collectives.reduce.feedback import Feedback
from collectives.reduce.frames import HEADER_BYTES, Frame, Header, Kind, header_of
from collectives.reduce.layout import Layout, Vector
from collectives.reduce.plan import ReducePlan, plan_reduce
from collectives.reduce.result import Result, digest_of
from collectives.reduce.robust import AGGREGATORS, capped, norm_of, outliers
from collectives.reduce.settings import ExchangeSettings

__all__ = [
    "AGGREGATORS",
    "HEADER_BYTES",
    "Accusation",
    "Equivocation",
    "Exchange",
    "ExchangeSettings",
    "Feedback",
    "Frame",
    "FrameRefused",
    "Header",
    "Kind",
    "Layout",
    "LayoutError",
    "MisuseError",
    "PlanError",
    "ReducePlan",
    "Result",
    "Statement",
    "Vector",
    "Verdict",
    "capped",
    "commit_of",
    "contribution_statement",
    "digest_of",
    "header_of",
    "norm_of",
    "outliers",
    "pack_proof",
    "plan_reduce",
    "recheck",
    "result_statement",
    "verify_proof",
    "weighted_mean",
]
