"""`shoal tags`: what a running node says of itself, and changing it while it runs."""

from __future__ import annotations

import argparse
import json

from shoal.daemon_client import connect


def tags(options: argparse.Namespace) -> int:
    """Add and take away tags, and print those the node has now."""
    client = connect(options.api, options.data_dir)
    found = client.post("/shoal/tags", {"add": options.add, "remove": options.remove})
    if options.json:
        print(json.dumps(found))
    else:
        print(" ".join(found["tags"]) or "no tags")
    return 0
