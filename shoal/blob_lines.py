"""Models' files as a person wants them told: what is being fetched and how fast, and which sources sent bad bytes.

It reads the part `blobs` of a `/mesh` document, tolerant of what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal import terminal
from shoal.mesh_view import short_peer


def blob_lines(document: Mapping[str, Any]) -> list[str]:
    """One line a fetch, and one a source that was dropped."""
    blobs = document.get("blobs")
    if not isinstance(blobs, dict):
        return []
    names = {node.get("peer"): node.get("name") for node in _dicts(document.get("nodes"))}

    def named(peer: object) -> str:
        name = names.get(peer)
        return f"{name} ({short_peer(str(peer))})" if name else short_peer(str(peer))

    lines = []
    for one in _dicts(blobs.get("fetches")):
        done, total = one.get("done_bytes", 0), max(1, one.get("total_bytes", 1))
        sources = len(_dicts(one.get("sources")))
        plural = "" if sources == 1 else "s"
        lines.append(
            f"fetching {one.get('model', '?')}: {terminal.size(done)} of {terminal.size(total)}"
            f" ({100 * done // total} %), {one.get('mb_per_s', 0.0):.1f} MB/s from {sources} source{plural}"
        )
    lines += [
        f"{named(one.get('peer'))} sent bad bytes of {one.get('model', '?')} and is not asked for it any more"
        for one in _dicts(blobs.get("dropped_sources"))
    ]
    return lines


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
