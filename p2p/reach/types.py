"""What users of Reach name: what members say of their place in the network, limits, and a report. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from p2p.errors import LocalFault
from p2p.identity import PeerId
from p2p.reach.core import NatKind, Verdict
from p2p.reach.relay_core import RelayLimits


@dataclass(frozen=True, slots=True)
class Said:
    """What a node says of itself to its mesh. `mbps` is what it relays with (0: it does not)."""

    verdict: str = "unknown"
    nat: str = "unknown"
    mbps: float = 0.0
    relays: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReachConfig:
    """Rhythms and limits, in seconds. A verdict that holds is looked at again every `probe_every_s`."""

    relay: RelayLimits = field(default_factory=RelayLimits)
    tick_s: float = 0.5
    knock_s: float = 1.5
    probe_every_s: float = 120.0
    probe_soon_s: float = 0.7
    observe_every_s: float = 25.0
    network_every_s: float = 2.0
    punch_s: float = 6.0
    punch_again_s: float = 5.0
    punch_again_max_s: float = 900.0
    upgrade: bool = True
    upnp: bool = True

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.name not in ("relay", "upgrade", "upnp") and not getattr(self, one.name) > 0:
                raise LocalFault(f"ReachConfig.{one.name} must be positive, got {getattr(self, one.name)!r}")


@dataclass(frozen=True, slots=True)
class ReachReport:
    """How this node can be reached. `at` is IP:PORT as members see it, `mapped` what the router forwards here (else
    `router_says` why it does not, where it was asked); `relays` carry for it, `carries` circuits of others go through
    it, `serves` peers hold reservations."""

    verdict: Verdict
    nat: NatKind
    at: str
    mapped: str
    router_says: str
    relays: tuple[PeerId, ...]
    mbps: float
    carries: int
    carried_bytes: int
    serves: int


__all__ = ["ReachConfig", "ReachReport", "Said"]
