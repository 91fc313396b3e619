"""A home's router: which packets it lets through, and from and to which ports. A synchronous core with a seeded chance.

Terms are those of RFC 4787: the mapping is endpoint-independent (one outer port for a socket, whomever it talks to) or
address and port dependent (`symmetric`); filtering says who may answer. It knows neither links nor namespaces.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from testnet.nat.packets import Endpoint, Flow, flow_of, rewritten

RouterKind = Literal["cone", "shifting", "full-cone", "symmetric", "firewall", "open"]
KINDS: tuple[RouterKind, ...] = ("cone", "shifting", "full-cone", "symmetric", "firewall", "open")
"""`cone` keeps ports where they are free, `shifting` never does; both are endpoint-independent and let in only whom the
socket wrote to. `full-cone` lets in everybody. `symmetric` takes another port for each target. `firewall` translates
nothing and drops what nobody asked for; `open` translates and drops nothing."""

PORTS = range(1024, 65536)
MAPPINGS_MAX = 4096


@dataclass(slots=True)
class _Mapping:
    protocol: int
    inner: Endpoint
    port: int
    peers: set[Endpoint]
    used_s: float


class Router:
    """Between one inner network and an outer one, in which it is `outer_ip`. Times are any monotonic seconds."""

    def __init__(self, kind: RouterKind, outer_ip: str, *, seed: int = 0, idle_s: float = 120.0) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(KINDS)}")
        self.kind = kind
        self.outer_ip = outer_ip
        self.idle_s = idle_s
        self.dropped = 0
        self._rng = random.Random(seed)
        self._by_inner: dict[tuple[int, Endpoint, Endpoint | None], _Mapping] = {}
        self._by_port: dict[tuple[int, int], _Mapping] = {}
        self._forwards: dict[tuple[int, int], Endpoint] = {}

    @property
    def translates(self) -> bool:
        return self.kind not in ("firewall", "open")

    def outward(self, packet: bytes, now_s: float) -> bytes | None:
        """The packet as the outer network sees it, or None where it is dropped."""
        if self.kind == "open":
            return packet
        flow = flow_of(packet)
        if flow is None:
            return None
        forwarded = self._forwarded_from(flow)
        if forwarded is not None:
            return rewritten(packet, source=(self.outer_ip, forwarded))
        mapping = self._map(flow, now_s)
        if mapping is None:
            self.dropped += 1
            return None
        mapping.used_s = now_s
        mapping.peers.add(flow.target)
        return rewritten(packet, source=(self.outer_ip, mapping.port)) if self.translates else packet

    def inward(self, packet: bytes, now_s: float) -> bytes | None:
        """The packet as the inner network sees it, or None where nobody asked for it."""
        if self.kind == "open":
            return packet
        flow = flow_of(packet)
        if flow is None:
            return None
        if not self.translates:
            mapping = self._by_inner.get((flow.protocol, flow.target, None))
        else:
            forward = self._forwards.get((flow.protocol, flow.target[1]))
            if forward is not None:
                return rewritten(packet, target=forward)
            mapping = self._by_port.get((flow.protocol, flow.target[1]))
        if mapping is None or now_s - mapping.used_s > self.idle_s or not self._lets_in(mapping, flow):
            self.dropped += 1
            return None
        mapping.used_s = now_s
        return rewritten(packet, target=mapping.inner) if self.translates else packet

    def forward(self, protocol: int, port: int, inner: Endpoint) -> None:
        """Whatever comes to the outer port goes to `inner`, as a person or UPnP sets it up."""
        self._forwards[protocol, port] = inner

    def unforward(self, protocol: int, port: int) -> None:
        """Take a forwarding back; nothing happens where there was none."""
        self._forwards.pop((protocol, port), None)

    def restart(self) -> None:
        """Every mapping is forgotten, as after a power cut; forwardings are kept."""
        self._by_inner.clear()
        self._by_port.clear()

    def _lets_in(self, mapping: _Mapping, flow: Flow) -> bool:
        return self.kind == "full-cone" or flow.source in mapping.peers

    def _forwarded_from(self, flow: Flow) -> int | None:
        for (protocol, port), inner in self._forwards.items():
            if protocol == flow.protocol and inner == flow.source:
                return port
        return None

    def _map(self, flow: Flow, now_s: float) -> _Mapping | None:
        key = (flow.protocol, flow.source, flow.target if self.kind == "symmetric" else None)
        known = self._by_inner.get(key)
        if known is not None and now_s - known.used_s <= self.idle_s:
            return known
        if known is not None:
            self._drop(key)
        self._make_room(now_s)
        port = self._port(flow)
        if port is None:
            return None
        mapping = _Mapping(flow.protocol, flow.source, port, set(), now_s)
        self._by_inner[key] = mapping
        self._by_port[flow.protocol, port] = mapping
        return mapping

    def _drop(self, key: tuple[int, Endpoint, Endpoint | None]) -> None:
        mapping = self._by_inner.pop(key)
        if self._by_port.get((mapping.protocol, mapping.port)) is mapping:
            del self._by_port[mapping.protocol, mapping.port]

    def _make_room(self, now_s: float) -> None:
        if len(self._by_inner) < MAPPINGS_MAX:
            return
        old = [key for key, one in self._by_inner.items() if now_s - one.used_s > self.idle_s]
        for key in old or [min(self._by_inner, key=lambda key: self._by_inner[key].used_s)]:
            self._drop(key)

    def _port(self, flow: Flow) -> int | None:
        if not self.translates:
            return flow.source[1]
        taken = self._by_port.keys() | self._forwards.keys()
        if self.kind in ("cone", "full-cone") and (flow.protocol, flow.source[1]) not in taken:
            return flow.source[1]
        for _ in range(64):
            port = self._rng.choice(PORTS)
            if (flow.protocol, port) not in taken and port != flow.source[1]:
                return port
        return None
