"""How a node is reached through routers: probes by members, relays, and holes punched between two homes.

Cores that decide (`core`, `relay_core`) and the shells around them. A relay carries ciphertext only: the connection
inside a circuit proves key and membership from end to end, as any other does.
"""

from p2p.reach.relay_core import RelayLimits
from p2p.reach.service import Reach
from p2p.reach.types import ReachConfig, ReachReport, Said

__all__ = ["Reach", "ReachConfig", "ReachReport", "RelayLimits", "Said"]
