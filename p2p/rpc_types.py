"""What users of Rpc name: methods, limits, and what a handler is told of its caller.

Plain values, checked when they are made. Nothing here sends or receives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar

from p2p.errors import LocalFault
from p2p.frames import DATA_FRAME_BYTES_MAX, DEADLINE_S_MAX, METHOD_CHARS_MAX
from p2p.identity import PeerId
from p2p.messages import codec_of
from p2p.rpc_state import MessageLimits

Q = TypeVar("Q")
A = TypeVar("A")

LaneName = Literal["small", "bulk"]
LANES: tuple[LaneName, ...] = ("small", "bulk")
_PAYLOAD_BYTES_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    """A kind of call: its messages, and the most that each of them may measure.

    `upstream` is the type of what a caller may send after the request; `reply` of what it receives. The limits hold
    for every single message, in both directions; `limits` repeats them. `lane` bulk keeps large transfers out of the
    way of small calls.
    """

    name: str
    request: type[Q]
    reply: type[A]
    upstream: type[Any] | None = None
    body_bytes_max: int = 65536
    payload_bytes_max: int = 0
    deadline_s: float = 10.0
    lane: LaneName = "small"
    limits: MessageLimits = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= METHOD_CHARS_MAX:
            raise LocalFault(f"Method.name must be 1 to {METHOD_CHARS_MAX} characters, got {self.name!r}")
        if not 0 < self.body_bytes_max <= _PAYLOAD_BYTES_MAX:
            raise LocalFault(f"{self.name}: body_bytes_max must be 1 to 2**32 - 1, got {self.body_bytes_max}")
        if not 0 <= self.payload_bytes_max <= _PAYLOAD_BYTES_MAX:
            raise LocalFault(
                f"{self.name}: payload_bytes_max must be below 2**32, got {self.payload_bytes_max}"
            )
        if not 0 < self.deadline_s <= DEADLINE_S_MAX:
            raise LocalFault(
                f"{self.name}: deadline_s must be up to {DEADLINE_S_MAX:g}, got {self.deadline_s}"
            )
        if self.lane not in LANES:
            raise LocalFault(f"{self.name}: lane must be one of {LANES}, got {self.lane!r}")
        for kind in (self.request, self.reply, self.upstream):
            if kind is not None:
                codec_of(kind)
        object.__setattr__(self, "limits", MessageLimits(self.body_bytes_max, self.payload_bytes_max))


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """Every limit of calls. Windows are what one call may hold unread; `unread_per_peer_bytes_max` bounds their sum.

    A peer from which nothing came for `silence_s` is disconnected; it is asked every `ping_s`. A frame
    that is not whole `frame_deadline_s` after it began ends its stream.
    """

    ping_s: float = 1.0
    silence_s: float = 3.0
    calls_per_lane_max: int = 2048
    channels_per_lane_max: int = 1536
    window_bytes: int = 1 << 20
    bulk_window_bytes: int = 4 << 20
    unread_per_peer_bytes_max: int = 256 << 20
    piece_bytes_max: int = 64 << 10
    bulk_piece_bytes_max: int = 256 << 10
    frame_deadline_s: float = 30.0
    inbound_lanes_per_peer_max: int = 8
    peers_remembered_max: int = 4096

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not value > 0:
                raise LocalFault(f"RpcConfig.{one.name} must be positive, got {value!r}")
        if self.silence_s <= self.ping_s:
            raise LocalFault(f"RpcConfig.silence_s must exceed ping_s ({self.ping_s}), got {self.silence_s}")
        for name in ("piece_bytes_max", "bulk_piece_bytes_max"):
            if getattr(self, name) > DATA_FRAME_BYTES_MAX:
                raise LocalFault(f"RpcConfig.{name} must be at most {DATA_FRAME_BYTES_MAX}")
        for name in ("window_bytes", "bulk_window_bytes"):
            if getattr(self, name) >= 1 << 32:
                raise LocalFault(f"RpcConfig.{name} must be below 2**32")

    def lane_window_bytes(self, lane: LaneName) -> int:
        return self.window_bytes if lane == "small" else self.bulk_window_bytes

    def lane_piece_bytes(self, lane: LaneName) -> int:
        return self.piece_bytes_max if lane == "small" else self.bulk_piece_bytes_max


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows of its call. `deadline` is by trio's clock; the handler is cancelled then."""

    peer: PeerId
    deadline: float
