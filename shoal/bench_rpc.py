"""`shoal bench rpc`: calls and bulk between two processes on this machine, encrypted, over the real transport."""

from __future__ import annotations

import argparse
import json
from typing import Any

from p2p.bench import RpcBenchConfig, measure
from shoal import terminal


def rpc(options: argparse.Namespace) -> int:
    """Run it and print the figures."""
    found = measure(
        RpcBenchConfig(
            round_trips=options.round_trips,
            at_once=options.at_once,
            calls=options.calls,
            connections=options.connections,
            total_bytes=options.bulk_mib << 20,
        )
    )
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    terminal.table(("figure", "seen"), list(_rows("", found)), right=("seen",))
    return 0


def _rows(before: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested figures under names with dots."""
    rows: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows += _rows(f"{before}{key}.", value)
        else:
            rows.append((before + key, f"{value:g}" if isinstance(value, float) else str(value)))
    return rows
