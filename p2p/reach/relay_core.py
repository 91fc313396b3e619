"""What a relay allows: whose circuits it carries, how many, and how fast all of them together. Synchronous.

Times are any monotonic seconds. It sends nothing and sees no content: what it carries is encrypted from end to end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from p2p.errors import LocalFault
from p2p.identity import PeerId


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """`mbps` is what the owner gives, in Mbit/s, counted once for each byte carried; 0: this node does not relay.

    A reservation is for `ttl_s`; peers from one IP address get `reservations_per_ip_max`.
    """

    mbps: float = 20.0
    ttl_s: float = 60.0
    reservations_max: int = 64
    reservations_per_ip_max: int = 16
    circuits_max: int = 128
    circuits_per_peer_max: int = 16
    burst_s: float = 0.1

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not (value > 0 or (one.name == "mbps" and value == 0)):
                raise LocalFault(f"RelayLimits.{one.name} must be positive, got {value!r}")


class NotRelayed(Exception):
    """The relay refuses; the message says why in a few plain words."""


class RelayCore:
    """One a node."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.carried_bytes = 0
        self._reserved: dict[PeerId, tuple[float, str]] = {}
        self._circuits: dict[int, tuple[PeerId, PeerId]] = {}
        self._next = 0
        self._free_s = 0.0

    @property
    def circuits(self) -> int:
        return len(self._circuits)

    def reserved(self, now_s: float) -> tuple[PeerId, ...]:
        """For whom circuits are carried."""
        self._forget_old(now_s)
        return tuple(self._reserved)

    def reserve(self, peer: PeerId, ip: str, now_s: float) -> float:
        """For how many seconds circuits to `peer` are carried. Raises NotRelayed."""
        if not self.limits.mbps:
            raise NotRelayed("it does not relay")
        self._forget_old(now_s)
        if peer not in self._reserved:
            if len(self._reserved) >= self.limits.reservations_max:
                raise NotRelayed("all its reservations are taken")
            near = Counter(held_ip for _, held_ip in self._reserved.values())
            if near[ip] >= self.limits.reservations_per_ip_max:
                raise NotRelayed(f"{near[ip]} reservations come from one address")
        self._reserved[peer] = (now_s + self.limits.ttl_s, ip)
        return self.limits.ttl_s

    def release(self, peer: PeerId) -> None:
        """The reservation of `peer` ends; open circuits go on."""
        self._reserved.pop(peer, None)

    def open(self, source: PeerId, target: PeerId, now_s: float) -> int:
        """The number of a new circuit. Raises NotRelayed."""
        self._forget_old(now_s)
        if target not in self._reserved:
            raise NotRelayed("it holds no reservation for that peer")
        ends = Counter(peer for pair in self._circuits.values() for peer in pair)
        most = self.limits.circuits_per_peer_max
        if len(self._circuits) >= self.limits.circuits_max or ends[source] >= most:
            raise NotRelayed("it carries as many circuits as it may")
        self._next += 1
        self._circuits[self._next] = (source, target)
        return self._next

    def close(self, circuit: int) -> None:
        """A circuit has ended. It is the only one that ends: others of the same peers go on (mend 7)."""
        self._circuits.pop(circuit, None)

    def wait_s(self, count: int, now_s: float) -> float:
        """How long to wait before `count` bytes go on. Each circuit has one piece waiting at most, so that they share
        the budget by turns, and a small message waits for one piece of each other circuit."""
        self.carried_bytes += count
        if not self.limits.mbps:
            return 0.0
        self._free_s = max(self._free_s, now_s - self.limits.burst_s) + 8 * count / (self.limits.mbps * 1e6)
        return max(0.0, self._free_s - now_s)

    def _forget_old(self, now_s: float) -> None:
        for peer in [peer for peer, (ends_s, _) in self._reserved.items() if ends_s <= now_s]:
            del self._reserved[peer]


class Pace:
    """So many asks of each and of all, then one in a while: for whatever a peer can make this node do."""

    def __init__(self, burst: int, every_s: float, peers_max: int = 1024) -> None:
        self._burst = burst
        self._every_s = every_s
        self._peers_max = peers_max
        self._due_s: dict[str, float] = {}

    def may(self, peer: str, now_s: float) -> bool:
        """Whether it is the turn of `peer`; a yes counts."""
        due_s = max(self._due_s.get(peer, 0.0), now_s - self._burst * self._every_s)
        if due_s + self._every_s > now_s:
            return False
        self._due_s.pop(peer, None)
        self._due_s[peer] = due_s + self._every_s
        if len(self._due_s) > self._peers_max:
            del self._due_s[next(iter(self._due_s))]
        return True
