"""What can be wrong with blobs, on p2p's three axes.

P2pError
    RemoteFault
        ProtocolViolation       a manifest or a chunk that is not what it claims to be
        BlobUnavailable         no peer has what is missing
    ResourceLimit               the quota or the disk is full
    LocalFault
        SourceChanged           a published file is no longer what was published
        StoreFault              a directory of the store, or to publish, cannot be used
"""

from __future__ import annotations

from collections.abc import Mapping

from p2p.errors import LocalFault, RemoteFault


class BlobUnavailable(RemoteFault):
    """No peer has `missing` of `file`, both plain text for people. `reasons` says why, by peer."""

    def __init__(self, file: str, missing: str, reasons: Mapping[str, str] | None = None) -> None:
        self.file = file
        self.missing = missing
        self.reasons = dict(reasons or {})
        why = "; ".join(self.reasons.values()) or "no peer was asked"
        super().__init__(f"no peer has {missing} of {file} ({why})")


class SourceChanged(LocalFault):
    """A published file was changed, cut or removed after it was published."""


class StoreFault(LocalFault):
    """A directory cannot be read or written. One clear line."""
