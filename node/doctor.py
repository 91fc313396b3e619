"""What is wrong with this node, and the plain next step for each thing: `shoal doctor`.

Figures come in, findings go out. It says `unknown` of whatever was not measured: nobody is told of a kind of
NAT, or of a path, that no measurement stands behind.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

NATS = {
    "none": "none: this computer's own address is seen outside",
    "port-preserving": "port-preserving: holes can be punched",
    "endpoint-independent": "endpoint-independent: holes can be punched, ports change",
    "symmetric": "symmetric: each peer sees another port, so no hole can be punched",
    "unknown": "unknown: fewer than two members have measured it",
}
DISK_LOW_BYTES = 2 << 30
MEMORY_LOW_BYTES = 512 << 20
SKEW_S = 2.0
RTT_SLOW_S = 0.3
RATE_SLOW_BYTES_PER_S = 1e6


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an owner should know; `next_step` is what to do about it (empty where nothing is to be done)."""

    level: Literal["blocker", "warning", "note"]
    what: str
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """A connected member. `path` is how it is reached, `dialled` by whom; what was not measured yet is None."""

    peer: str
    name: str
    path: str
    dialled: str
    rtt_s: float | None
    bytes_per_s: float | None
    clock_ahead_s: float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was measured. Sizes in bytes; `standing` says why this node is no member, else it is empty.

    `reach` is the report of `p2p.Reach`. `refused` counts by reason what others said and was not believed,
    `refused_by` are members that would not connect.
    """

    running: bool
    mesh: str | None
    standing: str = ""
    listening: tuple[str, ...] = ()
    peers: tuple[PeerFacts, ...] = ()
    members_known: int = 0
    remembered: int = 0
    disk_path: str = ""
    disk_free_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_lent_bytes: int | None = None
    devices: tuple[str, ...] = ()
    accelerators: tuple[str, ...] | None = None
    reach: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    refused_by: Mapping[str, str] = field(default_factory=dict)


def document(facts: Facts) -> dict[str, Any]:
    """The JSON-able answer: what was measured, and the findings, blockers first."""
    return {
        **asdict(facts),
        "peers": [asdict(peer) for peer in facts.peers],
        "reachability": reachability(facts),
        "nat": NATS[str(facts.reach.get("nat", "unknown"))],
        "relays": list(facts.reach.get("relays", ())),
        "clock_behind_s": clock_behind_s(facts.peers),
        "findings": [asdict(finding) for finding in findings(facts)],
    }


def reachability(facts: Facts) -> str:
    """Whether others can connect to this node, in a few words."""
    verdict, at = facts.reach.get("verdict"), facts.reach.get("at")
    if verdict == "public":
        return f"yes: members connected to {at}"
    if verdict == "private":
        relays = len(facts.reach.get("relays", ()))
        through = f"through {relays} relay{'s' if relays > 1 else ''}" if relays else "by nobody"
        return f"not directly: members tried {at}; {through}"
    reached = sum(peer.dialled == "by them" for peer in facts.peers)
    if not reached:
        return "unknown"
    return f"{reached} member{'' if reached == 1 else 's'} connected to this node"


def clock_behind_s(peers: Sequence[PeerFacts]) -> float | None:
    """By how much this clock is behind the median of its peers' clocks; None where none was heard."""
    heard = [peer.clock_ahead_s for peer in peers if peer.clock_ahead_s is not None]
    return statistics.median(heard) if heard else None


def findings(facts: Facts) -> list[Finding]:
    """What to tell, the worst first."""
    found = [
        *_of_life(facts),
        *_of_company(facts),
        *_of_reach(facts),
        *_of_clocks(facts),
        *_of_resources(facts),
        *_of_links(facts),
    ]
    order = ("blocker", "warning", "note")
    return sorted(found, key=lambda one: order.index(one.level))


def _of_life(facts: Facts) -> list[Finding]:
    out = []
    if not facts.running:
        out.append(Finding("blocker", "the daemon is not running", "start it with: shoal up"))
    if facts.mesh is None:
        out.append(
            Finding(
                "note",
                "this computer belongs to no mesh yet",
                "shoal up founds one, shoal join INVITE joins one",
            )
        )
    if facts.standing:
        out.append(
            Finding(
                "blocker",
                f"this node is no member of mesh {facts.mesh}: {facts.standing}",
                "ask a member for a new invite and give it to: shoal join (whoever was expelled needs a new data "
                "directory)",
            )
        )
    return out


def _of_company(facts: Facts) -> list[Finding]:
    if not facts.running or facts.standing:
        return []
    outside = [a for a in facts.listening if not a.startswith(("/ip4/127.", "/ip6/::1/"))]
    out = []
    if not outside:
        what = "this node listens on loopback only, so no other computer can connect to it"
        out.append(Finding("warning", what, "start it with: shoal up --listen /ip4/0.0.0.0/tcp/4001"))
    if facts.refused_by:
        reason = next(iter(facts.refused_by.values()))
        step = "ask for a new invite; whoever was expelled also needs a new data directory"
        level: Literal["blocker", "warning"] = "warning" if facts.peers else "blocker"
        out.append(Finding(level, f"{len(facts.refused_by)} members refuse this node: {reason}", step))
    elif not facts.peers and (facts.members_known > 1 or facts.remembered):
        out.append(
            Finding(
                "blocker",
                f"none of the {max(facts.members_known - 1, facts.remembered)} known members is connected",
                "see that one of them runs (shoal status there), that both have a network, and that no firewall "
                "stands between; a new invite (shoal invite) carries fresh addresses",
            )
        )
    elif not facts.peers:
        out.append(Finding("note", "this node is alone in its mesh", "add a computer with: shoal invite"))
    elif outside and _undecided(facts) and not any(peer.dialled == "by them" for peer in facts.peers):
        port = outside[0].partition("/tcp/")[2].partition("/")[0]
        out.append(
            Finding(
                "note",
                "no member has connected to this node from its side, so whether it can be reached is unknown",
                f"where others cannot connect, allow or forward TCP port {port} to this computer",
            )
        )
    return out


def _undecided(facts: Facts) -> bool:
    return bool(facts.reach.get("verdict", "unknown") == "unknown")


def _of_reach(facts: Facts) -> list[Finding]:
    if facts.reach.get("verdict") != "private" or not facts.peers:
        return []
    port = str(facts.reach.get("at", "")).rpartition(":")[2]
    said = facts.reach.get("router_says")
    step = f"turn UPnP on in the router (it says: {said}), or " if said else ""
    step += f"forward TCP port {port} to this computer there"
    if facts.reach.get("relays"):
        relayed = sum(peer.path == "relayed" for peer in facts.peers)
        what = (
            f"members cannot connect to this node directly; it is reached through relays, {relayed} peers are"
        )
        return [Finding("note", what, f"nothing has to be done; to make it faster, {step}")]
    what = "members cannot connect to this node, and no member that can be reached relays for it"
    step += ", or let a member with a public address join (its owner sets --relay-mbps)"
    return [Finding("warning", what, step)]


def _of_clocks(facts: Facts) -> list[Finding]:
    behind_s = clock_behind_s(facts.peers)
    step = "turn on automatic time in the system's settings"
    if behind_s is not None and abs(behind_s) > SKEW_S:
        way = "behind" if behind_s > 0 else "ahead of"
        return [Finding("warning", f"this computer's clock is {abs(behind_s):.1f} s {way} the mesh's", step)]
    return [
        Finding("note", f"the clock of {peer.name} is off by {peer.clock_ahead_s:+.1f} s", f"there: {step}")
        for peer in facts.peers
        if peer.clock_ahead_s is not None and abs(peer.clock_ahead_s) > SKEW_S
    ]


def _of_resources(facts: Facts) -> list[Finding]:
    out = []
    if facts.disk_free_bytes is not None and facts.disk_free_bytes < DISK_LOW_BYTES:
        what = f"{facts.disk_path} has {facts.disk_free_bytes / 1e9:.1f} GB left, models need more"
        out.append(Finding("warning", what, "free some, or move it with: shoal up --data-dir DIR"))
    for name, free in (("free", facts.memory_free_bytes), ("lent to models", facts.memory_lent_bytes)):
        if free is not None and free < MEMORY_LOW_BYTES:
            step = "close other programs, or lend more with: shoal up --memory SIZE"
            out.append(Finding("warning", f"only {free / 1e6:.0f} MB of memory are {name}", step))
            break
    if facts.accelerators == ():
        out.append(Finding("note", "no accelerator was found: models run on the processor"))
    elif facts.accelerators and facts.devices and not any(d.startswith("cuda") for d in facts.devices):
        what = f"{', '.join(facts.accelerators)} is not used"
        out.append(Finding("warning", what, "lend it with: shoal up --device all"))
    bad = {reason: count for reason, count in facts.refused.items() if count}
    if bad:
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
        out.append(Finding("note", f"refused since the start: {said}"))
    return out


def _of_links(facts: Facts) -> list[Finding]:
    out = []
    for peer in facts.peers:
        if peer.rtt_s is not None and peer.rtt_s > RTT_SLOW_S:
            what = f"{peer.name} is {peer.rtt_s * 1e3:.0f} ms away"
            out.append(Finding("note", what, "a cable instead of wireless helps, where it is near"))
        if peer.bytes_per_s is not None and peer.bytes_per_s < RATE_SLOW_BYTES_PER_S:
            what = f"{peer.name} sends only {peer.bytes_per_s / 1e6:.2f} MB/s"
            out.append(Finding("note", what, "see what else uses either computer's link"))
    return out


def disk_free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or would be; None where that cannot be told."""
    for place in (path, *path.parents):
        if place.exists():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None


def memory_free_bytes() -> int:
    """Memory that programs could take now."""
    return int(psutil.virtual_memory().available)


def accelerators() -> tuple[str, ...]:
    """Names of the CUDA devices that torch can use."""
    import torch

    return tuple(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
