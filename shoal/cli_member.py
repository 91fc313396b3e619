"""`shoal expel`, `rotate-key` and `doctor`: who belongs to the mesh, and how this node is.

The daemon decides and measures; here its answers are drawn. `doctor` also answers where no daemon runs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from shoal import terminal
from shoal.daemon_client import connect, data_dir
from shoal.errors import DaemonAbsent

MARKS = {"blocker": "!!", "warning": " !", "note": "  "}


def expel(options: argparse.Namespace) -> int:
    """Put a member out for good."""
    client = connect(options.api, options.data_dir)
    answer = client.post("/shoal/expel", {"peer": options.peer, "branch": options.branch})
    if options.json:
        print(json.dumps(answer))
        return 0
    print(f"{answer.get('expelled')} is expelled")
    kept = answer.get("kept") or []
    if kept:
        terminal.note(f"{len(kept)} that came in through it stay (--branch puts them out too)")
    terminal.note(f"invites that it may have seen end with: {terminal.program()} rotate-key --overlap 1s")
    return 0


def rotate_key(options: argparse.Namespace) -> int:
    """Change the swarm key of the running mesh."""
    client = connect(options.api, options.data_dir)
    answer = client.post("/shoal/rotate", {"overlap_s": options.overlap})
    if options.json:
        print(json.dumps(answer))
        return 0
    print("the swarm key has changed")
    terminal.note(
        f"members get the new one by themselves; the old one, and invites with it, count for "
        f"{terminal.duration(options.overlap)} more"
    )
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Say how this node is. Exit status 1 where something keeps it from working."""
    try:
        answer = connect(options.api, options.data_dir).post("/shoal/doctor", {})
    except DaemonAbsent:
        if options.api is not None:
            raise
        from node.examine import examine_offline

        answer = examine_offline(data_dir(options.data_dir))
    found = [one for one in answer.get("findings", ()) if isinstance(one, dict)]
    if options.json:
        print(json.dumps(answer, indent=1))
    else:
        _draw(answer, found)
    return 1 if any(one.get("level") == "blocker" for one in found) else 0


def _draw(answer: dict[str, Any], found: list[dict[str, Any]]) -> None:
    for name, value in _figures(answer):
        print(f"{name:<14}{value}")
    peers = [peer for peer in answer.get("peers", ()) if isinstance(peer, dict)]
    if peers:
        print()
        terminal.table(
            ("peer", "path", "connected", "rtt", "rate", "clock"),
            map(_peer_row, peers),
            right=("rtt", "rate"),
        )
    print()
    if not found:
        print("nothing is wrong that could be measured")
    for one in found:
        print(f"{MARKS.get(str(one.get('level')), '  ')} {one.get('what')}")
        if one.get("next_step"):
            print(f"     next: {one['next_step']}")


def _figures(answer: dict[str, Any]) -> list[tuple[str, str]]:
    def size(name: str) -> str:
        value = answer.get(name)
        return "unknown" if value is None else terminal.size(value)

    chips = answer.get("accelerators")
    listening = answer.get("listening") or ()
    return [
        ("mesh", str(answer.get("mesh") or "none")),
        ("listening", ", ".join(a.partition("/p2p/")[0] for a in listening) or "no"),
        ("reachable", str(answer.get("reachability", "unknown"))),
        ("NAT", str(answer.get("nat", "unknown"))),
        ("disk", f"{size('disk_free_bytes')} free in {answer.get('disk_path')}"),
        ("memory", f"{size('memory_free_bytes')} free, {size('memory_lent_bytes')} lent"),
        ("accelerator", "unknown" if chips is None else ", ".join(chips) or "none"),
        ("clock", _seconds(answer.get("clock_behind_s"), "behind the mesh's")),
    ]


def _peer_row(peer: dict[str, Any]) -> tuple[str, ...]:
    rtt, rate = peer.get("rtt_s"), peer.get("bytes_per_s")
    return (
        str(peer.get("name")),
        str(peer.get("path")),
        str(peer.get("dialled")),
        "unknown" if rtt is None else f"{rtt * 1e3:.1f} ms",
        "unknown" if rate is None else f"{terminal.size(rate)}/s",
        _seconds(peer.get("clock_ahead_s"), "ahead"),
    )


def _seconds(value: Any, way: str) -> str:
    return f"{value:+.2f} s {way}" if isinstance(value, int | float) else "unknown"
