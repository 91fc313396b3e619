"""`shoal drop`: take a model back from the mesh. The daemon knows who may; here its answer is drawn."""

from __future__ import annotations

import argparse
import json

from shoal import terminal
from shoal.daemon_client import connect


def drop(options: argparse.Namespace) -> int:
    """Have the daemon drop a model that it added."""
    answer = connect(options.api, options.data_dir).post("/shoal/drop", {"model": options.model})
    if options.json:
        print(json.dumps(answer))
        return 0
    print(f"{answer.get('dropped')} is dropped from the mesh")
    terminal.note(
        "its files stay where they are, and what other nodes fetched of it stays on their disks; "
        f"share it again with: {terminal.program()} add DIR --name {answer.get('dropped')}{terminal.aim(options)}"
    )
    return 0
