"""`shoal bench blobs`: one span of a model from several sources, each a process, encrypted, through real sockets on
loopback; and beside it, in the same run, the same bytes through one plain TLS socket between two processes.

The sources publish one directory of random bytes. The fetcher brings the span to a new store on its disk: received,
decrypted, checked chunk by chunk, written to its place. The TLS socket takes the bytes to memory and no further.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import tempfile
from pathlib import Path
from typing import Any

from shoal import terminal
from shoal.bench_peers import Peers

PEER = "shoal.bench_blobs_peer"
MIB = 1 << 20
FILE = "span.bin"


def measure(
    sources: int, mib: int, rounds: int, directory: Path | None = None, mbps: float | None = None
) -> dict[str, Any]:
    """The figures, as printed by --json. Files lie under `directory` meanwhile (None: the system's own for
    temporary ones). `mbps` limits what each source uploads, in Mbit/s."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="shoal-bench-") as name:
        root = Path(name)
        (root / "source").mkdir()
        with (root / "source" / FILE).open("wb") as file:
            for _ in range(mib):
                file.write(secrets.token_bytes(MIB))
        return _measure(root, sources, mib, rounds, mbps)


def _measure(root: Path, sources: int, mib: int, rounds: int, mbps: float | None) -> dict[str, Any]:
    common = {"root": str(root), "mib": mib}
    givers = Peers(PEER, [common | {"role": "source", "index": i, "mbps": mbps} for i in range(sources)])
    others: list[Peers] = []
    try:
        met = givers.hear()
        addrs = [one["addrs"] for one in met]
        seen: list[dict[str, Any]] = []
        plain: list[float] = []
        for number in range(rounds):
            tls = Peers(PEER, [common | {"role": "tls-receive"}, common | {"role": "tls-send"}])
            others.append(tls)
            plain.append(_tls_round(tls))
            fetcher = Peers(PEER, [common | {"role": "fetcher", "addrs": addrs, "round": number}])
            others.append(fetcher)
            (found,) = fetcher.hear()
            fetcher.end()
            seen.append(found)
    finally:
        for one in [*others, givers]:
            one.end()
    return _figures(seen, plain, sources, mib)


def _tls_round(tls: Peers) -> float:
    """MB a second of one TLS socket."""
    port = tls.hear_from(0)["port"]
    tls.say(port=port)
    (received, _) = tls.hear()
    tls.end()
    speed: float = received["mb_per_s"]
    return speed


def _figures(seen: list[dict[str, Any]], plain: list[float], sources: int, mib: int) -> dict[str, Any]:
    ratios = [one["mb_per_s"] / tls for one, tls in zip(seen, plain, strict=True)]
    return {
        "sources": sources,
        "mib": mib,
        "rounds": len(seen),
        "mb_per_s": statistics.median(one["mb_per_s"] for one in seen),
        "tls_socket_mb_per_s": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds": statistics.median(one["seconds"] for one in seen),
        "flush_s": statistics.median(one["flush_s"] for one in seen),
        "fetcher_cpu_s": statistics.median(one["cpu_s"] for one in seen),
        "peak_memory_mib": max(one["peak_memory_mib"] for one in seen),
        "process_mib": max(one["process_mib"] for one in seen),
        "sources_used": min(one["sources_used"] for one in seen),
        "least_share": min(one["least_share"] for one in seen),
        "paths": sorted({path for one in seen for path in one["paths"]}),
        "encrypted": True,
    }


def blobs(options: argparse.Namespace) -> int:
    """Run it and print the figures."""
    directory = None if options.dir is None else Path(options.dir)
    found = measure(options.sources, options.mib, options.rounds, directory, options.upload_mbps)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in found.items()]
    terminal.table(("figure", "seen"), rows, right=("seen",))
    return 0
