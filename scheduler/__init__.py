"""The two-phase scheduler: which node hosts which layers, and which chain of nodes serves a request.

Pure and deterministic, standard library only. It knows shapes, times, bytes and links as numbers;
it measures nothing, sends nothing and keeps no clock. The events of its state machines stand beside
them, in `online` and `admission`; the simulator is `scheduler.sim`.
"""

from scheduler.admission import Admission, AdmissionConfig, Ticket
from scheduler.bench import bench_plan
from scheduler.corrections import Corrections, LinkEstimates, Observation
from scheduler.document import preview
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
from scheduler.health import Health, HealthConfig, Standing
from scheduler.online import MeshPlanner
from scheduler.placement import make_plan, needs_replan
from scheduler.planner import adopt, planner_rank
from scheduler.policy import Policy
from scheduler.routing import Chain, ChainRequest, Hosted, Router, Split, Stage, choose_chain
from scheduler.shapes import Assignment, Device, Link, Links, ModelShape, NodeShape, Plan, memory_needed
from scheduler.sharing import Shares, Wanted, share

__all__ = [
    "Admission",
    "AdmissionConfig",
    "Assignment",
    "Chain",
    "ChainRequest",
    "Corrections",
    "Device",
    "Health",
    "HealthConfig",
    "Hosted",
    "InputError",
    "Link",
    "LinkEstimates",
    "Links",
    "LocalFault",
    "MeshPlanner",
    "ModelShape",
    "NoChain",
    "NoRoom",
    "NodeShape",
    "Observation",
    "Plan",
    "Policy",
    "PreviewError",
    "Rejected",
    "RemoteFault",
    "ResourceLimit",
    "Router",
    "SchedulerError",
    "Shares",
    "Shortage",
    "Split",
    "Stage",
    "Standing",
    "Ticket",
    "Wanted",
    "adopt",
    "bench_plan",
    "choose_chain",
    "make_plan",
    "memory_needed",
    "needs_replan",
    "planner_rank",
    "preview",
    "share",
]
