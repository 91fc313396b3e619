"""`shoal plan --input FILE`: how the scheduler would place a model over machines that a file describes.

It reads the file, asks `scheduler.preview`, and draws the answer. Nothing is started, measured or asked over a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduler import PreviewError, Shortage, preview
from shoal import terminal
from shoal.errors import CommandFailed
from shoal.mesh_view import layer_range, printable

INPUT_BYTES_MAX = 64 << 20


def plan(options: argparse.Namespace) -> int:
    """Print the replicas that the scheduler finds."""
    document = read_document(options.input)
    try:
        found = preview(document, prefer=options.prefer)
    except Shortage as short:
        raise CommandFailed(f"{options.input}: the model {short}") from None
    except PreviewError as problem:
        raise CommandFailed(f"{options.input}: {problem}") from None
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return 0


def read_document(source: str) -> Mapping[str, Any]:
    """The JSON object in the file `source`, from stdin for `-`. Raises CommandFailed."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
        else:
            with Path(source).open("rb") as handle:
                data = handle.read(INPUT_BYTES_MAX + 1)
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise CommandFailed(f"{source} cannot be read: {reason}") from None
    if len(data) > INPUT_BYTES_MAX:
        raise CommandFailed(f"{source} is longer than {INPUT_BYTES_MAX >> 20} MiB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise CommandFailed(f"{source} is not JSON: {problem}") from None
    if not isinstance(document, dict):
        raise CommandFailed(f"{source} holds no JSON object")
    return document


def _show(found: Mapping[str, Any]) -> None:
    rows = []
    for number, replica in enumerate(found["replicas"], 1):
        first = (str(number), f"{replica['ms_per_token']:.1f}", f"{replica['tokens_per_s']:.1f}")
        for stage in replica["stages"]:
            rows.append((*first, printable(stage["node"]), layer_range(stage["start"], stage["end"])))
            first = ("", "", "")
    right = ("replica", "ms/token", "tokens/s")
    terminal.table(("replica", "ms/token", "tokens/s", "node", "layers"), rows, right=right)
    if found["unused"]:
        terminal.note("unused: " + ", ".join(map(printable, found["unused"])))
    terminal.note(f"planned in {terminal.duration(found['planning_s'])}")
