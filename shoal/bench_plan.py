"""`shoal bench plan`: how long placing layers and choosing chains takes on this machine."""

from __future__ import annotations

import argparse
import json

from scheduler import bench_plan
from shoal import terminal


def plan(options: argparse.Namespace) -> int:
    """Print the figures beside their targets."""
    found = bench_plan(nodes_max=options.nodes)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    terminal.table(
        ("figure", "seen", "target"),
        [
            (k, f"{v:.4g}", f"{found['targets'][k]:g}" if k in found["targets"] else "")
            for k, v in found["figures"].items()
        ],
        right=("seen", "target"),
    )
    return 0
