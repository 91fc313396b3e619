"""The errors of collectives, on the three axes that cross the whole project.

    CollectiveError
        RoundFailed                 this round gave no result; the caller's tensors are as they were
            NoQuorum                too few members of the last committed epoch are here to decide anything
            RoundExpired            the deadline came first
            Excluded                the round went on without this member; `why` says for what reason
            Behind                  the others have committed later epochs; fetch the state first
            Diverged                this member's state differs from what the majority holds
            Superseded              another round of the same tag is open, or the run is being left
        RemoteFault                 a peer's doing: bytes that do not decode, a part that does not match its hash
            BadContribution         non-finite or far too large values, an altered part
            PiecesLost              too few pieces of a copy are left; `bad` names who lied or had none
        ResourceLimit               a configured bound was reached
        LocalFault                  this node's doing: wrong arguments, a journal that cannot be written
            NonFinite               the caller's own tensors hold NaN or infinity
            JournalError            the journal cannot be read or written
            CheckpointProblem       a checkpoint cannot be written, or is not whole

It knows nothing of trio, sockets or torch.
"""

from __future__ import annotations


class CollectiveError(Exception):
    """Root of everything that collectives raises on purpose."""


class RoundFailed(CollectiveError):
    """A round that gave no result here. `epoch` is the one that was attempted."""

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class NoQuorum(RoundFailed):
    """Too few members of the last committed epoch are reachable. `missing`: without whom nothing can be decided here,
    as far as is known. Either enough of them come back, or, where they are gone for good, the run ends here: a new one
    has to be opened from the newest state that is left, by those who are left."""

    def __init__(self, message: str, epoch: int = 0, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message, epoch)
        self.missing = missing


class RoundExpired(RoundFailed):
    """The round's deadline came before a decision."""


class Excluded(RoundFailed):
    """The round went on without this member. `why`: late, silent, nonfinite, norm, mismatch or denied."""

    def __init__(self, message: str, epoch: int = 0, why: str = "late") -> None:
        super().__init__(message, epoch)
        self.why = why


class Behind(RoundFailed):
    """The others have committed epoch `committed`, which this member does not hold. `counted`: whether values of this
    member, of this attempt or of an earlier one, are in the epoch that was attempted, so that to give them again would
    count them twice; None where that is not known."""

    def __init__(self, message: str, epoch: int = 0, committed: int = 0, counted: bool | None = None) -> None:
        super().__init__(message, epoch)
        self.committed = committed
        self.counted = counted


class Diverged(RoundFailed):
    """This member's state differs from the majority's at the same epoch: fetch theirs."""


class Superseded(RoundFailed):
    """Another round of the same tag is open, or the run is being left."""


class RemoteFault(CollectiveError):
    """A peer's doing."""


class BadContribution(RemoteFault):
    """What `peer` sent is refused; `why`: nonfinite, norm, mismatch."""

    def __init__(self, peer: str, why: str, message: str = "") -> None:
        super().__init__(message or f"{peer}'s contribution is refused: {why}")
        self.peer = peer
        self.why = why


class PiecesLost(RemoteFault):
    """Fewer pieces of a copy are to be had than it takes. `bad`: by peer, why it was done without."""

    def __init__(self, message: str, bad: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.bad = dict(bad or {})


class ResourceLimit(CollectiveError):
    """A configured bound was reached."""


class LocalFault(CollectiveError):
    """This node's doing."""


class NonFinite(LocalFault):
    """The caller's own tensors hold NaN or infinity."""


class JournalError(LocalFault):
    """The journal cannot be read or written."""


class CheckpointProblem(LocalFault):
    """A checkpoint cannot be written, or what lies at `path` is not a whole one."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
