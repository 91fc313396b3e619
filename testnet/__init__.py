"""Whole meshes on one machine: the process launcher behind `shoal testnet` and `shoal demo`.

Nodes are ordinary `shoal up` processes; nothing here reaches into them other than by their flags, their
HTTP API and signals.
"""

from __future__ import annotations

from testnet.errors import AlreadyRunning, LaunchFailed, StateProblem, TestnetError
from testnet.launch import LaunchOptions, Testnet, stop_recorded
from testnet.processes import LocalNode, read_state

__all__ = [
    "AlreadyRunning",
    "LaunchFailed",
    "LaunchOptions",
    "LocalNode",
    "StateProblem",
    "Testnet",
    "TestnetError",
    "read_state",
    "stop_recorded",
]
