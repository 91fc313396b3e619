"""The two-phase scheduler: which node hosts which layers, and which chain of nodes serves a request.

Pure and deterministic, standard library only. It knows shapes, times, bytes and links as numbers;
it measures nothing, sends nothing and keeps no clock.
"""

from scheduler.errors import (
    InputError,
    LocalFault,
    NoChain,
    NoRoom,
    PreviewError,
    Rejected,
    RemoteFault,
    ResourceLimit,
    SchedulerError,
    Shortage,
)
from scheduler.placement import make_plan, needs_replan
from scheduler.planner import adopt, planner_rank
from scheduler.preview import preview
from scheduler.routing import Chain, ChainRequest, Hosted, Router, Split, Stage, choose_chain
from scheduler.shapes import Assignment, Device, Link, Links, ModelShape, NodeShape, Plan, memory_needed

__all__ = [
    "Assignment",
    "Chain",
    "ChainRequest",
    "Device",
    "Hosted",
    "InputError",
    "Link",
    "Links",
    "LocalFault",
    "ModelShape",
    "NoChain",
    "NoRoom",
    "NodeShape",
    "Plan",
    "PreviewError",
    "Rejected",
    "RemoteFault",
    "ResourceLimit",
    "Router",
    "SchedulerError",
    "Shortage",
    "Split",
    "Stage",
    "adopt",
    "choose_chain",
    "make_plan",
    "memory_needed",
    "needs_replan",
    "planner_rank",
    "preview",
]
