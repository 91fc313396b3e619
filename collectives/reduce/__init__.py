"""The data plane of a round: who sends which bytes to whom, and what owners add up.

`Exchange` is a reduction from one member's point of view: frames in, frames out, tensors at the end. It does no I/O.
"""

from collectives.reduce.combine import weighted_mean
from collectives.reduce.errors import FrameRefused, LayoutError, MisuseError, PlanError
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
    "Vector",
    "capped",
    "digest_of",
    "header_of",
    "norm_of",
    "outliers",
    "plan_reduce",
    "weighted_mean",
]
