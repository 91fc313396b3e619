"""The flags of `shoal drop`. It imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def drop_command(commands: Any, add: Callable[..., Any], where: Callable[[Any], None]) -> None:
    """`add` and `where` are those of `shoal.cli_parser`."""
    drop = add(
        commands,
        "drop",
        "shoal.cli_drop:drop",
        "take a model back from the mesh",
        "Take a model back from the mesh, on the node that added it: every node stops serving it and lends the\n"
        "memory to others, those that are off once they are back. Requests that run meanwhile may end with an\n"
        "error. Files stay on the disks. `shoal add` shares it again, and so does a node that is started with it\n"
        "(shoal up --model).",
        "  shoal drop qwen3-4b\n  shoal drop embedded --json",
    )
    drop.add_argument("model", metavar="MODEL", help="its name in the mesh, or its manifest's id")
    drop.add_argument("--json", action="store_true", help="print the answer as JSON")
    where(drop)
