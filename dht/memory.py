"""The peers this node remembers on disk, so that a mesh forms again after every node was off.

Knows the file's format, its bounds, and how to write it so that a crash leaves the old or the new
one whole. A damaged file costs only the memory. It does not know who is connected.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dht.adverts import own_addrs
from p2p import PeerId

logger = logging.getLogger(__name__)

_VERSION = 1
_FILE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Remembered:
    """A peer, its addresses (the likeliest first) and when it was last connected, in Unix seconds."""

    peer: PeerId
    addrs: tuple[str, ...]
    seen_at_s: float


class PeerMemory:
    """At most `peers_max` peers, those seen last. Changes stay in memory until `save`. `path` None: no file."""

    def __init__(self, path: Path | None, peers_max: int = 64) -> None:
        self._path = path
        self._peers_max = peers_max
        self._dirty = False
        self._peers: dict[PeerId, Remembered] = {one.peer: one for one in _load(path)[:peers_max]}

    def peers(self) -> tuple[Remembered, ...]:
        """All that are remembered, the last seen first."""
        return tuple(sorted(self._peers.values(), key=lambda one: (-one.seen_at_s, one.peer)))

    def remember(self, peer: PeerId, addrs: Iterable[str], now_s: float) -> None:
        """`peer` is connected now; `addrs` replace the older ones, unless there are none."""
        known = self._peers.get(peer)
        fitting = own_addrs(peer, addrs) or (known.addrs if known else ())
        if not fitting:
            return
        self._peers[peer] = Remembered(peer, fitting, now_s)
        if known is None or known.addrs != fitting or now_s - known.seen_at_s > 3600:
            self._dirty = True
        for stale in self.peers()[self._peers_max :]:
            del self._peers[stale.peer]

    def forget(self, peer: PeerId) -> None:
        """`peer` shall not be dialled after a restart."""
        self._dirty |= self._peers.pop(peer, None) is not None

    def save(self) -> None:
        """Write the file if anything changed: a neighbour file, flushed, then renamed over the old one.

        A failure is logged: this node can go on without its memory.
        """
        if self._path is None or not self._dirty:
            return
        document = {
            "version": _VERSION,
            "peers": [
                {"peer": one.peer, "addrs": list(one.addrs), "seen_at_s": one.seen_at_s}
                for one in self.peers()
            ],
        }
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
            self._dirty = False
        except OSError as error:
            logger.warning("cannot write the remembered peers to %s: %s", self._path, error.strerror or error)
            with contextlib.suppress(OSError):
                temporary.unlink()


def _load(path: Path | None) -> list[Remembered]:
    """What the file holds, the last seen first; single entries that make no sense are left out."""
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_BYTES_MAX + 1)
        document: Any = json.loads(raw) if len(raw) <= _FILE_BYTES_MAX else None
        entries: Any = document["peers"] if document["version"] == _VERSION else None
        found = [one for one in map(_entry, entries) if one is not None]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("the remembered peers in %s cannot be read (%s); starting without", path, error)
        return []
    return sorted(found, key=lambda one: (-one.seen_at_s, one.peer))


def _entry(item: Any) -> Remembered | None:
    if not isinstance(item, dict):
        return None
    peer, addrs, seen_at_s = item.get("peer"), item.get("addrs"), item.get("seen_at_s")
    if not isinstance(peer, str) or not isinstance(addrs, list) or isinstance(seen_at_s, bool):
        return None
    if not isinstance(seen_at_s, int | float) or not math.isfinite(seen_at_s):
        return None
    fitting = own_addrs(PeerId(peer), (addr for addr in addrs if isinstance(addr, str)))
    return Remembered(PeerId(peer), fitting, float(seen_at_s)) if fitting else None
