"""How quickly large messages come from peers of whom nothing large came yet: one transfer each, asked for once.

Whoever moved models knows its links already; this is for those who did not. A node with the tag `metered` neither asks
nor answers. It decides nothing about what the figures are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import trio

from p2p import Call, Method, RemoteFault, Rpc, RpcRefusal, Tensor

PROBE_BYTES = 512 << 10
PROBES_MAX = 64
ANSWER_EVERY_S = 60.0
WAIT_S = 20.0
TAKES_LEAST_S = 1e-4


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """Send so many bytes."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """Bytes that mean nothing (uint8 [size_bytes])."""

    data: Tensor


PROBE = Method(
    name="links.probe",
    request=ProbeRequest,
    reply=ProbeReply,
    body_bytes_max=256,
    payload_bytes_max=PROBE_BYTES,
    deadline_s=WAIT_S,
    lane="bulk",
)


class Probe:
    """`rates` are bytes a second by peer, as far as this probe measured them. `metered()` tells what this node is."""

    def __init__(self, rpc: Rpc, metered: Callable[[], bool]) -> None:
        self._rpc = rpc
        self._metered = metered
        self._asked: set[str] = set()
        self._answered_s: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        rpc.serve(PROBE, self._answer)

    async def ask_one(self, peers: Collection[str]) -> None:
        """Measure one of the peers that was not asked before, if any is left to ask."""
        left = [peer for peer in sorted(peers) if peer not in self._asked]
        if not left or self._metered() or len(self._asked) >= PROBES_MAX:
            return
        peer = left[0]
        self._asked.add(peer)
        began_s = trio.current_time()
        try:
            await self._rpc.call(peer, PROBE, ProbeRequest(PROBE_BYTES))
        except RemoteFault:
            return
        took_s = trio.current_time() - began_s - (self._rpc.rtt_s(peer) or 0.0)
        self.rates[peer] = PROBE_BYTES / max(TAKES_LEAST_S, took_s)

    async def _answer(self, call: Call, request: ProbeRequest) -> ProbeReply:
        now_s = trio.current_time()
        if self._metered():
            raise RpcRefusal("denied", "the link of this node is metered")
        if now_s - self._answered_s.get(call.peer, -ANSWER_EVERY_S) < ANSWER_EVERY_S:
            raise RpcRefusal("busy", "asked too often", retry_after_s=ANSWER_EVERY_S)
        if len(self._answered_s) >= 4 * PROBES_MAX:
            self._answered_s.clear()
        self._answered_s[call.peer] = now_s
        size = max(0, min(request.size_bytes, PROBE_BYTES))
        return ProbeReply(Tensor("uint8", (size,), bytes(size)))
