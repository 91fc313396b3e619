"""The errors of the data plane, within the tree of collectives.errors.

RemoteFault
    FrameRefused     a frame that is malformed, of the wrong size, from a stranger, or too much of a good thing
LocalFault
    LayoutError      tensors that cannot be reduced, or are not those the layout was made of
    PlanError        a declaration that nobody can carry out
    MisuseError      the exchange was called out of order
"""

from __future__ import annotations

from collectives.errors import LocalFault, RemoteFault


class FrameRefused(RemoteFault):
    """A frame from `peer` is refused; `why`: malformed, size, stranger, unwanted or flood."""

    def __init__(self, peer: str, why: str, message: str) -> None:
        super().__init__(f"frame from {peer} refused ({why}): {message}")
        self.peer = peer
        self.why = why


class LayoutError(LocalFault):
    """Tensors that cannot be reduced, or that are not those of the layout."""


class PlanError(LocalFault):
    """A declaration that cannot be carried out: no members, one twice, a weight that is no number."""


class MisuseError(LocalFault):
    """Called out of order: a result before it is whole, a rebase to a declaration without this member."""
