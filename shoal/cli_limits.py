"""`shoal limits`: what a running node gives of its upload and disk, and changing it while it runs."""

from __future__ import annotations

import argparse
import json

from shoal import terminal
from shoal.daemon_client import connect
from shoal.errors import UsageProblem


def limits(options: argparse.Namespace) -> int:
    """Change limits, and print those that hold now."""
    from node.config import parse_size
    from node.errors import ConfigProblem

    order: dict[str, object] = {}
    try:
        if options.disk is not None:
            order["disk_bytes"] = parse_size(options.disk, "disk")
        if options.upload_mbps == "none":
            order["unlimited"] = True
        elif options.upload_mbps is not None:
            order["upload_mbps"] = float(options.upload_mbps)
    except ConfigProblem as problem:
        raise UsageProblem(str(problem)) from None
    except ValueError:
        raise UsageProblem(f"--upload-mbps {options.upload_mbps!r}: a number of Mbit/s, or none") from None
    found = connect(options.api, options.data_dir).post("/shoal/limits", order)
    if options.json:
        print(json.dumps(found))
        return 0
    disk, mbps = found["disk"], found["upload_mbps"]
    print(f"upload {'no limit' if mbps is None else f'{mbps:g} Mbit/s'}")
    print(f"disk {terminal.size(disk['used_bytes'])} of {terminal.size(disk['limit_bytes'])} used")
    return 0
