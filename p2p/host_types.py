"""What users of a host name: its limits, and what it tells of peers. Plain values, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from p2p.compat.swarm import SwarmLimits
from p2p.compat.yamux import MuxLimits
from p2p.errors import LocalFault
from p2p.identity import PeerId


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Every limit of a host. Counts are per host unless the name says otherwise; all positive but `port_wanted`.
    A subnet is an IPv4 /24 or an IPv6 /48; its limits are for what came from there.

    An address in `listen` with port 0 gets `port_wanted` (0: none) if that is free, else any, and its successors get
    the same: where peers remember this node, it should be found again. Of several addresses with port 0 those that this
    machine's network lacks (IPv6, mostly) are passed over.
    """

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    port_wanted: int = 0
    connections_max: int = 512
    connections_per_peer_max: int = 8
    connections_per_subnet_max: int = 256
    handshakes_max: int = 64
    handshakes_per_subnet_max: int = 32
    streams_per_connection_max: int = 256
    streams_per_peer_max: int = 512
    stream_window_bytes: int = 2 << 20
    unread_per_connection_bytes_max: int = 64 << 20
    dial_addrs_max: int = 32
    dial_deadline_s: float = 5.0
    handshake_deadline_s: float = 5.0
    member_deadline_s: float = 5.0
    negotiate_deadline_s: float = 10.0
    close_deadline_s: float = 0.8
    quiet_s: float = 2.0
    silence_s: float = 8.0
    events_max: int = 4096

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("listen", "port_wanted") and not value > 0:
                raise LocalFault(f"HostConfig.{one.name} must be positive, got {value!r}")
        if self.stream_window_bytes < 256 << 10:
            raise LocalFault(
                f"HostConfig.stream_window_bytes must be at least 262144, got {self.stream_window_bytes}"
            )

    def swarm_limits(self) -> SwarmLimits:
        """The part that the connections beneath enforce."""
        return SwarmLimits(
            connections_max=self.connections_max,
            connections_per_peer_max=self.connections_per_peer_max,
            connections_per_subnet_max=self.connections_per_subnet_max,
            handshakes_max=self.handshakes_max,
            handshakes_per_subnet_max=self.handshakes_per_subnet_max,
            handshake_deadline_s=self.handshake_deadline_s,
            dial_deadline_s=self.dial_deadline_s,
            streams_per_peer_max=self.streams_per_peer_max,
            mux=MuxLimits(
                streams_max=self.streams_per_connection_max,
                window_bytes=self.stream_window_bytes,
                unread_bytes_max=self.unread_per_connection_bytes_max,
            ),
        )


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """`up` once a peer's first connection is proven, `down` when its last one has died. `moved` in between, when one
    that was only relayed is there directly, or comes from another address: what is opened from now on takes the new
    way, what is open stays."""

    peer: PeerId
    kind: Literal["up", "moved", "down"]
