"""A discrete-event mesh around the scheduler's own cores, and the schedulers of others to compare with.

Pure and deterministic: time and chance are its own. It reads traces that it is given and sends nothing.
"""

from scheduler.sim.config import POLICIES, Load, SimConfig, Targets, default_model
from scheduler.sim.pictures import goodput_picture, times_picture
from scheduler.sim.run import capacity, compare, run, simulate

__all__ = [
    "POLICIES",
    "Load",
    "SimConfig",
    "Targets",
    "capacity",
    "compare",
    "default_model",
    "goodput_picture",
    "run",
    "simulate",
    "times_picture",
]
