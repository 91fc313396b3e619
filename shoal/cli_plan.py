"""`shoal plan`: how the scheduler would place a model, over the mesh as it is or over machines that a file describes.

For the mesh it asks the daemon; for a file it asks `scheduler.preview`, and nothing is started, measured or asked over
a network. Nothing is loaded either way.
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
from shoal.daemon_client import connect
from shoal.errors import CommandFailed, UsageProblem
from shoal.mesh_view import layer_range, printable

INPUT_BYTES_MAX = 64 << 20


def plan(options: argparse.Namespace) -> int:
    """Print where a model would go, or what is missing."""
    if (options.model is None) == (options.input is None):
        raise UsageProblem("give either a model of the mesh (or its directory) or --input FILE")
    if options.input is None:
        return _over_the_mesh(options)
    if options.copies is not None:
        raise UsageProblem("--copies is for a model of the mesh; a file's machines get as many as pay")
    return _over_a_file(options)


def _over_the_mesh(options: argparse.Namespace) -> int:
    if options.prefer is not None:
        raise UsageProblem("--prefer is for --input; the mesh is planned for both in measure")
    client = connect(options.api, options.data_dir)
    found = client.post("/shoal/plan", {"model": wanted(options.model), "copies": options.copies})
    if options.json:
        print(json.dumps(found, indent=1))
    short = found.get("shortage")
    if short:
        raise CommandFailed(f"the mesh has no room for {options.model}: it {short['detail']}")
    if not options.json:
        _show_mesh(found)
    return 0


def wanted(model: str) -> str:
    """A directory as an absolute path, anything else as the name it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _over_a_file(options: argparse.Namespace) -> int:
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


def _show_mesh(found: Mapping[str, Any]) -> None:
    names = {span["node"]: printable(span["name"]) for span in found["spans"]}
    rows = [
        (
            names[span["node"]]
            + (f" (device {span['node'].partition('#')[2]})" if "#" in span["node"] else ""),
            layer_range(span["start"], span["end"]),
            terminal.size(span["memory_bytes"]),
            "serves them" if span["serves"] else f"{terminal.size(span['fetch_bytes'])} to fetch",
        )
        for span in found["spans"]
    ]
    terminal.table(("node", "layers", "memory", "now"), rows, right=("memory",))
    for replica in found["replicas"]:
        chain = ", ".join(names[stage["node"]] for stage in replica["stages"])
        terminal.note(
            f"{chain}: about {replica['ms_per_token']:.1f} ms a token, {replica['tokens_per_s']:.1f} tokens/s"
        )
    if found["moved"]:
        terminal.note("these would move to make room: " + ", ".join(map(printable, found["moved"])))


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
