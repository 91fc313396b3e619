"""The flags of `shoal bench rpc`. It imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def bench_rpc_command(commands: Any, add: Callable[..., Any], count: Callable[[str], int]) -> None:
    """`add` and `count` are those of `shoal.cli_parser`."""
    rpc = add(
        commands,
        "rpc",
        "shoal.bench_rpc:rpc",
        "round trips and bulk between two processes, encrypted, on loopback",
        "Start a second process on this machine, and print how long calls to it take, how fast bulk goes, how\n"
        "soon a first connection is there, and what many calls leave behind. Takes a minute or two.",
        "  shoal bench rpc --json\n  shoal bench rpc --calls 2000 --bulk-mib 64",
    )
    rpc.add_argument(
        "--round-trips", metavar="N", type=count, default=3000, help="timed at each size (default: 3000)"
    )
    rpc.add_argument(
        "--at-once", metavar="N", type=count, default=1000, help="calls in flight together (default: 1000)"
    )
    rpc.add_argument(
        "--calls", metavar="N", type=count, default=100_000, help="after which is counted what is left"
    )
    rpc.add_argument(
        "--connections", metavar="N", type=count, default=15, help="first connections timed (default: 15)"
    )
    rpc.add_argument(
        "--bulk-mib", metavar="M", type=count, default=1024, help="sent each way as bulk (default: 1024)"
    )
    rpc.add_argument("--json", action="store_true", help="print the figures as JSON")
