"""The flags of `shoal bench blobs`. It imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def bench_blobs_command(
    what: Any, add: Callable[..., Any], count: Callable[[str], int], positive: Callable[[str], float]
) -> None:
    """`add`, `count` and `positive` are those of `shoal.cli_parser`."""
    blobs = add(
        what,
        "blobs",
        "shoal.bench_blobs:blobs",
        "a span of a model from several sources at once, encrypted, on loopback",
        "Start sources and a fetcher as processes on this machine, fetch a span of random bytes to the disk through\n"
        "real, encrypted links, and print how fast that was beside one plain TLS socket in the same run, which\n"
        "writes nothing to the disk.",
        "  shoal bench blobs\n  shoal bench blobs --sources 4 --mib 1024 --rounds 5 --json",
    )
    blobs.add_argument(
        "--sources", metavar="N", type=count, default=4, help="processes that serve (default: 4)"
    )
    blobs.add_argument(
        "--mib", metavar="M", type=count, default=1024, help="size of the span (default: 1024)"
    )
    blobs.add_argument("--rounds", metavar="R", type=count, default=3, help="rounds measured (default: 3)")
    blobs.add_argument("--dir", metavar="DIR", help="where the files lie meanwhile (default: the system's)")
    blobs.add_argument(
        "--upload-mbps",
        metavar="X",
        type=positive,
        help="what each source uploads, Mbit/s (default: no limit)",
    )
    blobs.add_argument("--json", action="store_true", help="print the figures as JSON")
