"""The errors of dht, on p2p's three axes.

p2p.RemoteFault
    RecordRefused       bytes that are not a record, or a record that breaks a rule; `reason` is one word
p2p.ResourceLimit
    OwnRecordsFull      this node publishes more than one signer may
p2p.LocalFault
    RecordInvalid       what this node asked to sign breaks a limit; names field, value and limit
"""

from __future__ import annotations

from p2p import LocalFault, RemoteFault, ResourceLimit

__all__ = ["LocalFault", "OwnRecordsFull", "RecordInvalid", "RecordRefused", "RemoteFault", "ResourceLimit"]


class RecordRefused(RemoteFault):
    """A record that must not enter the view. `reason` is from a small fixed set, so that it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"record refused ({reason}){': ' if detail else ''}{detail}")
        self.reason = reason


class OwnRecordsFull(ResourceLimit):
    """One signer's share of every view is used up; withdraw something first."""


class RecordInvalid(LocalFault):
    """A record this node wanted to sign breaks a limit."""
