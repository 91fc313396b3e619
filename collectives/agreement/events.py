"""What a chain is told and what it asks to be done; rules of order and durability stand in the package's docstring."""

from __future__ import annotations

from dataclasses import dataclass

from collectives.agreement.messages import Message
from collectives.agreement.types import Ballot, Certificate, Declaration, Offer, Saved, Value
from collectives.errors import RoundFailed

# Events.


@dataclass(frozen=True, slots=True)
class Enter:
    """The caller wants a round on top of `offer.epoch`. It ends by `deadline_s` (the clock of `now_s`) at the latest,
    with one Committed or Failed that names the nonce."""

    offer: Offer
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The caller gave its round up (it was cancelled); Failed is not emitted for it."""


@dataclass(frozen=True, slots=True)
class Leave:
    """For good: the chain resigns its seat, emits Left, and answers nothing afterwards."""


@dataclass(frozen=True, slots=True)
class Met:
    """These peers belong to the run: they are asked what is decided. A joiner
    needs one, and so does whoever restarts."""

    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """From an authenticated sender; its bytes went through `unpack_message`."""

    sender: str
    message: Message


@dataclass(frozen=True, slots=True)
class Alive:
    """The failure detector trusts `peer` again."""

    peer: str


@dataclass(frozen=True, slots=True)
class Coming:
    """`peer` transfers the state once more because the last one, which took `took_s`, was overtaken: it is waited for
    in this epoch and the next, as whoever came too late for the last one is."""

    peer: str
    took_s: float


@dataclass(frozen=True, slots=True)
class Suspected:
    """The failure detector thinks `peer` dead."""

    peer: str


@dataclass(frozen=True, slots=True)
class Reduced:
    """The data plane holds the whole result of the declaration with this ballot."""

    ballot: Ballot
    digest: bytes


@dataclass(frozen=True, slots=True)
class Stuck:
    """The data plane cannot finish because of these. why: silent, nonfinite, norm, mismatch."""

    ballot: Ballot
    without: frozenset[str]
    why: str


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of a Fetch are here, or, after a restart, they still are."""

    epoch: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """`wake_s` has come."""


Event = Enter | Withdraw | Leave | Met | Received | Coming | Alive | Suspected | Reduced | Stuck | Held | Tick

# Instructions, to be done in order.


@dataclass(frozen=True, slots=True)
class Send:
    """May be lost, late, doubled or overtaken."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Replaces what was saved before; durable before any later Send, Committed or Failed is done."""

    saved: Saved


@dataclass(frozen=True, slots=True)
class Reduce:
    """Start, or, while one of the same epoch is under way, rebase to this declaration. I am a member of it, with the
    tensors of the Enter whose nonce it names."""

    declaration: Declaration


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop reducing; a whole result that was reported stays until its Release."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these bytes from any of `holders`, check them against `value.digest`, then say Held; go on trying until the
    digest's Release. A repeated Fetch replaces the list of holders."""

    value: Value
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The bytes with this digest are not needed by the chain any more."""

    epoch: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    """`value` is decided and its bytes are here. Once an epoch, in rising order; epochs that were skipped are announced
    by Lagging. `nonce`: that of the open round, if this is its result; None if it came as something missed."""

    epoch: int
    value: Value
    certificate: Certificate
    nonce: int | None


@dataclass(frozen=True, slots=True)
class Lagging:
    """Epochs up to `epoch` are decided and their bytes are not to be had one by one: transfer the state from one of
    `holders`, then Enter on top of it."""

    epoch: int
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The open round ends without a result of its own."""

    nonce: int
    error: RoundFailed


@dataclass(frozen=True, slots=True)
class Left:
    """The resignation is sent."""


Instruction = Send | Persist | Reduce | Abandon | Fetch | Release | Committed | Lagging | Failed | Left
