"""The two-phase scheduler: which node hosts which layers, and which chain of nodes serves a request.

Pure and deterministic, standard library only. It knows shapes, times, bytes and links as numbers;
it measures nothing, sends nothing and keeps no clock. The events of its state machines stand beside
them, in `online` and `admission`; the simulator is `scheduler.sim`.
"""

from scheduler.admission import Admission, AdmissionConfig, Ticket
from scheduler.bench import bench_plan
from scheduler.board import Facts
from scheduler.bridging import bridge
from scheduler.corrections import Corrections, Observation
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
from scheduler.policy import Policy, slowdown
from scheduler.routing import Chain, ChainRequest, Hosted, Router, Split, Stage, choose_chain
from scheduler.shapes import (
    Assignment,
    Device,
    Link,
    Links,
    ModelShape,
    NodeShape,
    Plan,
    device_id,
    memory_needed,
    node_of,
)
from scheduler.sharing import Wanted

__all__ = [
    "Admission",
    "AdmissionConfig",
    "Assignment",
    "Chain",
    "ChainRequest",
    "Corrections",
    "Device",
    "Facts",
    "Health",
    "HealthConfig",
    "Hosted",
    "InputError",
    "Link",
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
    "Shortage",
    "Split",
    "Stage",
    "Standing",
    "Ticket",
    "Wanted",
    "adopt",
    "bench_plan",
    "bridge",
    "choose_chain",
    "device_id",
    "make_plan",
    "memory_needed",
    "needs_replan",
    "node_of",
    "planner_rank",
    "preview",
    "slowdown",
]
