"""A small internet: hosts, the routers before them, one public network, and links with delay, jitter, loss and rate.

A synchronous core: a packet from a host goes in, packets with the time and the host of their delivery come out. Chance
is seeded, time is an argument. It does not know namespaces, and routes IPv4 only.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from testnet.nat.packets import target_ip
from testnet.nat.router import Router, RouterKind

QUEUE_S_MAX = 1.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What one host's line does to packets, each way. `rate_bps` 0 is without limit; what would wait for more than a
    second before a slow line is dropped."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    rate_bps: float = 0.0

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s, self.rate_bps) < 0 or not 0 <= self.loss < 1:
            raise ValueError(f"{self}: nothing may be negative, and loss must be below 1")


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router; `behind` names another one, None is the public network."""

    name: str
    kind: RouterKind
    outer_ip: str
    behind: str | None = None
    idle_s: float = 120.0


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A computer; `behind` names its router, None is the public network."""

    name: str
    ip: str
    behind: str | None = None
    link: LinkSpec = field(default_factory=LinkSpec)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A packet that is due at a host."""

    due_s: float
    host: str
    packet: bytes


class _Line:
    """One direction of a host's link."""

    def __init__(self, spec: LinkSpec, rng: random.Random) -> None:
        self.spec = spec
        self._rng = rng
        self._free_s = 0.0
        self._last_s = 0.0

    def through(self, size_bytes: int, at_s: float) -> float | None:
        """When a packet is through; None where it is lost. Packets do not overtake one another."""
        spec = self.spec
        if spec.loss and self._rng.random() < spec.loss:
            return None
        if spec.rate_bps:
            if self._free_s - at_s > QUEUE_S_MAX:
                return None
            self._free_s = max(self._free_s, at_s) + 8 * size_bytes / spec.rate_bps
            at_s = self._free_s
        due_s = at_s + spec.delay_s + spec.jitter_s * self._rng.random()
        self._last_s = max(self._last_s, due_s)
        return self._last_s


class Network:
    """Times are any monotonic seconds. Unknown names raise ValueError."""

    def __init__(self, routers: Sequence[RouterSpec], hosts: Sequence[HostSpec], *, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self.specs = {spec.name: spec for spec in routers}
        self.routers = {
            spec.name: Router(spec.kind, spec.outer_ip, seed=seed + k, idle_s=spec.idle_s)
            for k, spec in enumerate(routers)
        }
        self.hosts: dict[str, HostSpec] = {}
        self._up: dict[str, _Line] = {}
        self._down: dict[str, _Line] = {}
        for spec in routers:
            self._check_behind(spec.behind)
        for host in hosts:
            self.attach(host)

    def attach(self, host: HostSpec) -> None:
        """A host appears, or goes on elsewhere or over another line."""
        self._check_behind(host.behind)
        ipaddress.IPv4Address(host.ip)
        self.hosts[host.name] = host
        self._up[host.name] = _Line(host.link, self._rng)
        self._down[host.name] = _Line(host.link, self._rng)

    def detach(self, name: str) -> None:
        """A host is gone: what is for it is dropped."""
        self.hosts.pop(name, None)

    def send(self, name: str, packet: bytes, now_s: float) -> Iterator[Delivery]:
        """What becomes of a packet that `name` sends: one delivery, or none."""
        host = self.hosts.get(name)
        if host is None:
            return
        at_s = self._up[name].through(len(packet), now_s)
        if at_s is None:
            return
        for receiver, arrived in self._reached(host, packet, now_s):
            due_s = self._down[receiver].through(len(arrived), at_s)
            if due_s is not None:
                yield Delivery(due_s, receiver, arrived)

    def _reached(self, host: HostSpec, packet: bytes, now_s: float) -> list[tuple[str, bytes]]:
        """A multicast reaches all neighbours in a home, anything else one host or none."""
        ip = target_ip(packet)
        if not ip:
            return []
        if ipaddress.IPv4Address(ip).is_multicast:
            near = (one for one in self.hosts.values() if host.behind and one.behind == host.behind)
            return [(one.name, packet) for one in near if one.name != host.name]
        found = self._climb(host.behind, packet, now_s)
        return [] if found is None or found[0] == host.name else [found]

    def _climb(self, place: str | None, packet: bytes, now_s: float) -> tuple[str, bytes] | None:
        """Deliver inside the network behind `place`, else go on outside of it."""
        here: bytes | None = packet
        while here is not None:
            taken, found = self._inside(place, here, now_s)
            if taken or place is None:
                return found
            if target_ip(here) == self.specs[place].outer_ip:
                return (
                    None  # its own outer address from inside: most routers at homes do not turn such packets
                )
            here = self.routers[place].outward(here, now_s)
            place = self.specs[place].behind
        return None

    def _inside(
        self, place: str | None, packet: bytes, now_s: float
    ) -> tuple[bool, tuple[str, bytes] | None]:
        """Whether the address is directly behind `place`; then the host that gets the packet, unless it is dropped."""
        ip = target_ip(packet)
        for host in self.hosts.values():
            if host.behind == place and host.ip == ip:
                return True, (host.name, packet)
        for spec in self.specs.values():
            router = self.routers[spec.name]
            here = spec.outer_ip == ip if router.translates else self._leads_to(spec.name, ip)
            if spec.behind == place and here:
                arrived = router.inward(packet, now_s)
                return True, None if arrived is None else self._inside(spec.name, arrived, now_s)[1]
        return False, None

    def _leads_to(self, router: str, ip: str) -> bool:
        return any(host.behind == router and host.ip == ip for host in self.hosts.values())

    def _check_behind(self, behind: str | None) -> None:
        if behind is not None and behind not in self.specs:
            raise ValueError(f"behind is {behind!r}: it must name a router, one of {', '.join(self.specs)}")
