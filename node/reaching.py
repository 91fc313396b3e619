"""How this node is reached, in the mesh: what each member says of that travels as a record of its own.

Joins `p2p.Reach` to gossip and to the documents for people. Records of others are bounded like any bytes from a peer.
It decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import trio

from dht import Gossip, OwnRecordsFull, RecordInvalid, View
from node.config import DaemonConfig
from p2p import (
    Host,
    PeerId,
    Reach,
    ReachConfig,
    RelayLimits,
    RemoteFault,
    Rpc,
    Said,
    pack_value,
    unpack_value,
)

log = logging.getLogger("shoal.reach")

REACH = "reach"
TTL_S = 60.0
METERED = "metered"
VERDICTS = ("public", "private", "unknown")
KINDS = ("none", "port-preserving", "endpoint-independent", "symmetric", "unknown")
RELAYS_MAX = 8
MBPS_MAX = 1e6


class Reaching:
    """One a life in a mesh. `changed` is called when this node has other addresses than before."""

    def __init__(
        self,
        host: Host,
        rpc: Rpc,
        gossip: Gossip,
        view: View,
        config: DaemonConfig,
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._gossip = gossip
        self._view = view
        self._moved = changed
        self._addrs: tuple[str, ...] = host.addrs()
        mbps = 0.0 if METERED in config.tags else config.relay_mbps
        limits = RelayLimits(mbps=mbps)
        self.reach = Reach(
            host,
            rpc,
            ReachConfig(relay=limits, upnp=config.upnp),
            members=self.members,
            changed=self._changed,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        await self.reach.run(task_status=task_status)

    def members(self) -> dict[PeerId, Said]:
        """What the others say of themselves."""
        records = self._view.records(REACH, self._gossip.now_s())
        said = {r.signer: read_said(r.value) for r in records if r.signer != self._host.peer_id}
        return {peer: one for peer, one in said.items() if one is not None}

    def path(self, peer: str) -> str:
        """How messages to a connected member travel: direct, hole-punched, relayed, or none."""
        ways = self._host.ways(peer)
        if not ways:
            return "none"
        return {"direct": "direct", "punched": "hole-punched", "relayed": "relayed"}[ways[0].kind]

    def document(self) -> dict[str, Any]:
        """For `/mesh`: this node's own standing, and what its members say of theirs."""
        members = {
            str(peer): {**asdict(said), "relays": list(said.relays), "path": self.path(peer)}
            for peer, said in self.members().items()
        }
        own = asdict(self.reach.report())
        return {**own, "relays": list(own["relays"]), "members": members}

    def _changed(self) -> None:
        try:
            self._gossip.publish(REACH, "", pack_value(self.reach.said()), TTL_S)
        except (OwnRecordsFull, RecordInvalid) as problem:
            log.warning("the mesh cannot be told how this node is reached: %s", problem)
        addrs = self._host.addrs()
        if addrs != self._addrs:
            self._addrs = addrs
            self._moved()


def read_said(value: bytes) -> Said | None:
    """What a member said, within bounds; None for anything else."""
    try:
        said = unpack_value(Said, value)
    except RemoteFault:
        return None
    if said.verdict not in VERDICTS or said.nat not in KINDS or not 0.0 <= said.mbps <= MBPS_MAX:
        return None
    relays = tuple(r for r in said.relays[:RELAYS_MAX] if len(r) <= 64 and r.isascii() and r.isalnum())
    return replace(said, relays=relays)
