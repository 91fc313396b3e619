"""Gathers what `node.doctor` judges: from a node at work, or from a data directory whose daemon is not running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from node.datadir import DataDir
from node.doctor import Facts, PeerFacts, accelerators, disk_free_bytes, document, memory_free_bytes
from node.errors import DataDirProblem
from node.mesh import MeshNode
from node.standing import read_roster
from p2p import Identity, PeerId

REFUSALS = ("malformed", "signature", "forgotten", "future", "ttl", "oversize", "signers_full", "view_full")


def examine(node: MeshNode, root: Path) -> dict[str, Any]:
    """How a running node is."""
    roster = None if node.standing is None else node.standing.roster
    refused = {reason: node.view.counts[reason] for reason in REFUSALS}
    if roster is not None:
        refused["documents of membership"] = roster.counts["documents_refused"]
    names = {peer: known.name for peer, known in node.atlas().nodes.items()}
    facts = Facts(
        running=True,
        mesh=node.membership.mesh_id,
        standing="" if roster is None else roster.problem(roster.me),
        listening=tuple(node.host.addrs()),
        peers=tuple(_peer(node, peer, names.get(peer, peer[-8:])) for peer in node.host.peers()),
        members_known=len(names),
        remembered=len(node.directory.remembered()),
        disk_path=str(root),
        disk_free_bytes=disk_free_bytes(root),
        memory_free_bytes=memory_free_bytes(),
        memory_lent_bytes=node.hardware.memory_bytes,
        devices=tuple(device.device for device in node.hardware.devices),
        accelerators=accelerators(),
        reach=_reach(node),
        refused=refused,
        refused_by={} if roster is None else {str(peer): why for peer, why in roster.refusals.items()},
    )
    return document(facts)


def _reach(node: MeshNode) -> dict[str, Any]:
    own = node.reaching.document()
    return {
        name: own[name] for name in ("verdict", "nat", "at", "mapped", "relays", "mbps", "carries", "serves")
    }


def _peer(node: MeshNode, peer: PeerId, name: str) -> PeerFacts:
    bits = node.rpc.bandwidth_bps(peer)
    return PeerFacts(
        peer=peer,
        name=name,
        path=node.reaching.path(peer),
        dialled="by them" if peer in node.host.dialled_by() else "by this node",
        rtt_s=node.rpc.rtt_s(peer),
        bytes_per_s=node.probe.rates.get(peer) if bits is None else bits / 8,
        clock_ahead_s=node.gossip.skew_s(peer),
    )


def examine_offline(root: Path) -> dict[str, Any]:
    """What can be told of a data directory whose daemon is not running. Nothing in it is changed."""
    mesh, standing = None, ""
    data = DataDir(root)
    try:
        membership = data.membership()
        if membership is not None:
            mesh = membership.mesh_id
            if data.identity_path.is_file():
                roster = read_roster(Identity.load_or_create(data.identity_path), membership, data)
                # An invite that was not redeemed yet is no fault.
                waiting = roster is None or not roster.chain
                standing = "" if waiting or roster is None else roster.problem(roster.me)
    except DataDirProblem as problem:
        standing = str(problem)
    facts = Facts(
        running=False,
        mesh=mesh,
        standing=standing,
        disk_path=str(root),
        disk_free_bytes=disk_free_bytes(root),
        memory_free_bytes=memory_free_bytes(),
        accelerators=accelerators(),
    )
    return document(facts)
