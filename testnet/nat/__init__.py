"""A laboratory of home networks: computers behind routers of every kind, in network namespaces of this machine.

`Router` and `Network` are pure: they decide what becomes of a packet. `NatLab` joins real processes by them.
"""

from __future__ import annotations

from testnet.nat.lab import NatLab, sweep, why_not
from testnet.nat.mesh import HOMES, NatMesh, Pair, measure
from testnet.nat.network import Delivery, HostSpec, LinkSpec, Network, RouterSpec
from testnet.nat.router import KINDS, Router, RouterKind

__all__ = [
    "HOMES",
    "KINDS",
    "Delivery",
    "HostSpec",
    "LinkSpec",
    "NatLab",
    "NatMesh",
    "Network",
    "Pair",
    "Router",
    "RouterKind",
    "RouterSpec",
    "measure",
    "sweep",
    "why_not",
]
