"""The flags of `shoal testnet`. It imports nothing that takes long."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def pair(text: str) -> tuple[str, str]:
    """Two kinds of homes."""
    from testnet.nat import HOMES

    one, colon, other = text.partition(":")
    if not colon or one not in HOMES or other not in HOMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not two of {', '.join(HOMES)} with a colon between")
    return one, other


def testnet_commands(
    commands: Any,
    add: Callable[..., Any],
    count: Callable[[str], int],
    positive: Callable[[str], float],
) -> None:
    """`add`, `count` and `positive` are those of `shoal.cli_parser`."""
    testnet = add(commands, "testnet", None, "run a whole mesh of local nodes on this machine")
    actions = testnet.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    up = add(
        actions,
        "up",
        "shoal.cli_testnet:up",
        "start N local nodes that serve a model, and leave them running",
        "Start N nodes on this machine as one mesh, share a model from the first one only, wait until every\n"
        "layer is served, and leave them running. `shoal testnet down` ends exactly those.",
        "  shoal testnet up -n 4\n"
        "  shoal testnet up -n 4 --model ~/models/qwen=qwen --node-memory 900 --copies 2 --json",
    )
    up.add_argument("-n", "--nodes", metavar="N", type=count, default=4, help="how many nodes (default: 4)")
    up.add_argument(
        "--model",
        metavar="DIR[=NAME]",
        default="embedded",
        help="what they serve (default: the built-in model)",
    )
    up.add_argument(
        "--node-memory", metavar="MIB", type=positive, help="memory each node lends to models, in MiB"
    )
    up.add_argument("--copies", metavar="K", type=count, default=1, help="copies of each layer (default: 1)")
    up.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=180.0, help="give up after this (default: 180)"
    )
    up.add_argument("--json", action="store_true", help="print the nodes as JSON")
    down = add(actions, "down", "shoal.cli_testnet:down", "end the nodes that `testnet up` started")
    down.add_argument("--json", action="store_true", help="print what was ended as JSON")
    status = add(actions, "status", "shoal.cli_testnet:status", "show the nodes that `testnet up` started")
    status.add_argument("--json", action="store_true", help="print the nodes as JSON")
    for action in (up, down, status):
        action.add_argument("--state-dir", metavar="DIR", help="where their logs and records are kept")
    nat = add(
        actions,
        "nat",
        "shoal.cli_nat:nat",
        "how pairs of homes behind routers of each kind come to one another, and how soon",
        "Make two homes behind routers and two public computers out of network namespaces, start a member without\n"
        "models on each, and tell how the homes are connected in the end. Linux and root only; nothing leaves\n"
        "this machine.",
        "  shoal testnet nat cone:symmetric double:firewall\n  shoal testnet nat --delay-ms 30 --json",
    )
    nat.add_argument(
        "pairs", metavar="KIND:KIND", nargs="*", type=pair, help="kinds of homes (default: all pairs)"
    )
    nat.add_argument(
        "--delay-ms", metavar="MS", type=positive, default=10.0, help="of each line, one way (default: 10)"
    )
    nat.add_argument("--json", action="store_true", help="print a JSON line for each pair")
