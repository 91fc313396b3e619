"""`shoal bench allreduce`: the mean of tensors over separate processes, encrypted, through real sockets on loopback.

The parent starts the peers, introduces them to one another, starts each round at the same time for all and gathers
what they saw; it takes no part itself. A round's time is that of its slowest peer. What is measured beside time: bytes,
the error against the mean in double precision, and memory beyond the tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from shoal import terminal
from shoal.bench_peers import Peers
from shoal.errors import ShoalError

PEER = "shoal.bench_allreduce_peer"
MIB = 1 << 20


def measure(
    peers: int, mib: float, codec: str, rounds: int, rate_mbit: float | None = None, warmups: int = 2
) -> dict[str, Any]:
    """The figures, as printed by --json."""
    settings = {"mib": mib, "codec": codec, "rate_mbit": rate_mbit, "rounds": rounds + warmups}
    group = Peers(PEER, [settings | {"index": index, "peers": peers} for index in range(peers)])
    try:
        met = group.hear()
        group.say(peers=[one["peer"] for one in met], addrs=[one["addrs"] for one in met])
        group.hear()
        seen: list[list[dict[str, Any]]] = []
        for number in range(rounds + warmups):
            group.say(round=number, measure_memory=number == 0)
            found = group.hear()
            if len({one["digest"] for one in found}) != 1 or any(one["members"] != peers for one in found):
                raise ShoalError(f"round {number} did not end alike for all peers")
            seen.append(found)
        group.say(check=True)
        last = group.hear()
    finally:
        group.end()
    return _figures(seen[warmups:], last, peers, mib, codec, rate_mbit)


def _figures(
    seen: list[list[dict[str, Any]]],
    last: list[dict[str, Any]],
    peers: int,
    mib: float,
    codec: str,
    rate_mbit: float | None,
) -> dict[str, Any]:
    times = [max(one["took_s"] for one in found) for found in seen]
    median_s = statistics.median(times)
    sent = statistics.median(one["bytes_sent"] for found in seen for one in found)
    figures: dict[str, Any] = {
        "peers": peers,
        "mib": mib,
        "codec": codec,
        "rounds": len(seen),
        "median_s": median_s,
        "min_s": min(times),
        "max_s": max(times),
        "mb_per_s": mib * MIB / 1e6 / median_s,
        "bytes_sent_per_peer": int(sent),
        "cpu_s_per_peer": statistics.median(one["cpu_s"] for found in seen for one in found),
        "rel_l2_error": max(one["rel_l2_error"] for one in last),
        "memory_beyond_tensors": max(one["memory_ratio"] for one in last),
        "encrypted": True,
        "paths": sorted({path for one in last for path in one["paths"]}),
    }
    if rate_mbit is not None:
        floor_s = max(one["bytes_sent"] for found in seen for one in found) * 8 / (rate_mbit * 1e6)
        figures |= {
            "rate_mbit": rate_mbit,
            "link_limit_s": floor_s,
            "over_link_limit": median_s / floor_s - 1,
        }
    return figures


def allreduce(options: argparse.Namespace) -> int:
    """Run it and print the figures."""
    found = measure(options.peers, options.mib, options.codec, options.rounds, options.rate_mbit)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in found.items()]
    terminal.table(("figure", "seen"), rows, right=("seen",))
    return 0
