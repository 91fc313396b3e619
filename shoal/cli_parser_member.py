"""The flags of `shoal limits`, `tags`, `expel`, `rotate-key` and `doctor`. It imports nothing that takes long."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Add = Callable[..., Any]


def member_commands(
    commands: Any, add: Add, where: Callable[[Any], None], ttl: Callable[[str], float]
) -> None:
    """`add`, `where` and `ttl` are those of `shoal.cli_parser`."""
    _limits(commands, add, where)
    tags = add(
        commands,
        "tags",
        "shoal.cli_tags:tags",
        "show or change what this node says of itself",
        "Tags are words that an owner sets. `metered`: its link is paid by the byte, so that little is fetched\n"
        "there. `owner-active`: its owner is using it, so that work goes elsewhere where it can. `trusted`, or any\n"
        "other: models may ask for it. A tag holds until it is taken away or the node stops.",
        "  shoal tags\n  shoal tags --add owner-active\n  shoal tags --remove owner-active",
    )
    tags.add_argument("--add", metavar="TAG", action="append", default=[], help="may be repeated")
    tags.add_argument("--remove", metavar="TAG", action="append", default=[], help="may be repeated")
    _json(tags, "the tags")
    where(tags)

    expel = add(
        commands,
        "expel",
        "shoal.cli_member:expel",
        "put a computer out of the mesh for good",
        "Put a computer out of the mesh, on all members and for good. The node that founded the mesh can expel\n"
        "any, each node those that it let in. Those that the expelled one had let in stay, unless --branch is given.",
        "  shoal expel laptop\n  shoal expel 12D3KooW... --branch",
    )
    expel.add_argument("peer", metavar="PEER", help="its name, its peer id, or the end of that")
    expel.add_argument("--branch", action="store_true", help="also all that came in through it")
    _json(expel, "who was expelled and who stays")
    where(expel)

    rotate = add(
        commands,
        "rotate-key",
        "shoal.cli_member:rotate_key",
        "change the mesh's swarm key while it runs",
        "Give the mesh a new swarm key, on the node that founded it. Members get it by themselves, those that\n"
        "were off when they come back. Open invites hold the old key and end with it.",
        "  shoal rotate-key\n  shoal rotate-key --overlap 1h",
    )
    rotate.add_argument(
        "--overlap", metavar="TIME", type=ttl, default="24h", help="how long both keys count (default: 24h)"
    )
    _json(rotate, "the answer")
    where(rotate)

    doctor = add(
        commands,
        "doctor",
        "shoal.cli_member:doctor",
        "say what is wrong with this node and what to do next",
        "Connections, clock, disk, memory and accelerator, as measured; for whatever is wrong the next step.\n"
        "Also answers where no daemon runs. Exit status 1 where something keeps the node from working.",
        "  shoal doctor\n  shoal doctor --json",
    )
    _json(doctor, "everything that was measured")
    where(doctor)


def _json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def _limits(commands: Any, add: Callable[..., Any], where: Callable[[Any], None]) -> None:
    limits = add(
        commands,
        "limits",
        "shoal.cli_limits:limits",
        "what this node gives of its upload and disk",
        "Show what this node gives of its upload and disk for models' files, and change it while it runs. What\n"
        "nobody needs goes from the disk at once where the limit is lower; what is served stays.",
        "  shoal limits\n  shoal limits --upload-mbps 10\n  shoal limits --upload-mbps none --disk 50GiB",
    )
    limits.add_argument("--upload-mbps", metavar="N", help="Mbit/s; 0 is nothing, none is no limit")
    limits.add_argument("--disk", metavar="SIZE", help="for example 50GiB")
    _json(limits, "the limits")
    where(limits)
