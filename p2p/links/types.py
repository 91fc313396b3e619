"""What users of links name: limits and reports. Plain values, checked when they are made. Nothing here sends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from p2p.errors import LocalFault
from p2p.identity import PeerId

PathName = Literal["direct", "stream", "none"]

RECORD_BYTES_MIN = 4 << 10
RECORD_BYTES_MAX = 1 << 20
SOCKETS_MAX = 16


@dataclass(frozen=True, slots=True)
class LinksConfig:
    """Every limit of links.

    `listen` are IP addresses, or IP:PORT, to be dialled at by direct paths; None follows where the host listens, on a
    port of the system's choice, and () never listens. `sockets` stripe a direct path; where the round trip is below
    `near_rtt_s` it is `sockets_near`, because a single one is the cheapest. A link holds at most `window_bytes` in each
    direction; all links of a node together promise `held_bytes_max` at most. Times are in seconds.
    """

    listen: tuple[str, ...] | None = None
    direct: bool = True
    sockets: int = 4
    sockets_near: int = 1
    near_rtt_s: float = 0.004
    record_bytes: int = 256 << 10
    window_bytes: int = 8 << 20
    held_bytes_max: int = 1 << 30
    header_bytes_max: int = 64 << 10
    payload_bytes_max: int = 256 << 20
    services_max: int = 256
    links_max: int = 1024
    links_per_peer_max: int = 64
    handshakes_max: int = 128
    handshakes_per_ip_max: int = 32
    handshake_deadline_s: float = 3.0
    open_deadline_s: float = 10.0
    dial_deadline_s: float = 2.0
    dial_grace_s: float = 0.3
    dial_addrs_max: int = 16
    direct_retry_s: float = 30.0
    recover_deadline_s: float = 5.0
    stall_deadline_s: float = 10.0
    close_deadline_s: float = 1.0
    upgrade_min_s: float = 1.0
    upgrade_max_s: float = 60.0
    peers_remembered_max: int = 1024

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("listen", "direct") and not value > 0:
                raise LocalFault(f"LinksConfig.{one.name} must be positive, got {value!r}")
        if not RECORD_BYTES_MIN <= self.record_bytes <= RECORD_BYTES_MAX:
            raise LocalFault(
                f"LinksConfig.record_bytes must be {RECORD_BYTES_MIN} to {RECORD_BYTES_MAX}, got {self.record_bytes}"
            )
        if self.window_bytes < 4 * self.record_bytes:
            raise LocalFault(
                f"LinksConfig.window_bytes must hold 4 records of {self.record_bytes}, got {self.window_bytes}"
            )
        for name in ("sockets", "sockets_near"):
            if getattr(self, name) > SOCKETS_MAX:
                raise LocalFault(
                    f"LinksConfig.{name} must be at most {SOCKETS_MAX}, got {getattr(self, name)}"
                )
        if self.header_bytes_max > 1 << 20:
            raise LocalFault(
                f"LinksConfig.header_bytes_max must be at most {1 << 20}, got {self.header_bytes_max}"
            )


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What real traffic with one peer told. None where there was none to tell it from.

    `path` is that of the most recent open link; `bandwidth_bps` is what went out in bits a second while there was
    more to send, `inbound_bps` what came in without pauses; `loss` the share of segments sent again, where the system
    counts them.
    """

    peer: PeerId
    path: PathName
    links: int
    sockets: int
    rtt_s: float | None
    bandwidth_bps: float | None
    inbound_bps: float | None
    loss: float | None
    bytes_sent: int
    bytes_received: int


__all__ = ["LinkReport", "LinksConfig", "PathName"]
