"""`shoal testnet nat`: pairs of homes in a laboratory of network namespaces. The laboratory is `testnet.nat`'s."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict

from shoal import terminal
from shoal.errors import CommandFailed
from testnet import TestnetError
from testnet.nat import HOMES, LinkSpec, measure, why_not


def nat(options: argparse.Namespace) -> int:
    """Measure each pair, one after another."""
    reason = why_not()
    if reason:
        raise CommandFailed(f"there is no NAT laboratory here: {reason}")
    link = LinkSpec(delay_s=options.delay_ms / 1e3)
    rows = []
    for one, other in options.pairs or itertools.combinations_with_replacement(HOMES, 2):
        try:
            pair = measure(one, other, link)
        except TestnetError as problem:
            raise CommandFailed(f"{one}:{other}: {problem}") from None
        if options.json:
            print(json.dumps(asdict(pair)), flush=True)
        else:
            terminal.note(f"{one}:{other}  {pair.path}")
        rows.append((one, other, pair.path, f"{pair.connected_s:.1f} s", f"{pair.settled_s:.1f} s"))
    if not options.json:
        terminal.table(
            ("home", "other", "path", "connected", "settled"), rows, right=("connected", "settled")
        )
    return 0
