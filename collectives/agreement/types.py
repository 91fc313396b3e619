"""What agreement is about: configurations, ballots, offers, declarations, values, and what must survive a crash.

All are frozen and travel as they are (`p2p.pack_value`). The rule of quorums lives here, because everything that
cannot fork rests on it: two quorums of one configuration share a member. Nothing here knows time or messages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

NAME_BYTES_MAX = 200
HASH_BYTES_MAX = 64


@dataclass(frozen=True, slots=True, order=True)
class Ballot:
    """Of one epoch; ordered. Number 0 belongs to the first-ranked alone and needs no prepare."""

    number: int
    owner: str


NO_BALLOT = Ballot(-1, "")


@dataclass(frozen=True, slots=True)
class Seat:
    """A place in a configuration. `incarnation` names one unbroken journal of `peer`: whoever lost its journal, or
    resigned, comes back with another one and is not this acceptor any more."""

    peer: str
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """The committed membership of `epoch`, best-ranked first. Its seats are the acceptors of `epoch + 1`."""

    epoch: int
    seats: tuple[Seat, ...]

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple([seat.peer for seat in self.seats])

    def seat(self, peer: str) -> Seat | None:
        for seat in self.seats:
            if seat.peer == peer:
                return seat
        return None

    def is_quorum(self, peers: Collection[str], without: Collection[str] = ()) -> bool:
        """More than half of the seats that are not in `without`, or exactly half with the best-ranked of them."""
        counted = present = 0
        first = False
        for seat in self.seats:
            peer = seat.peer
            if peer in without:
                continue
            if peer in peers:
                present += 1
                first = first or counted == 0
            counted += 1
        return 2 * present > counted or (counted > 0 and 2 * present == counted and first)


def rank(run: str, tag: str, epoch: int, seats: Iterable[Seat]) -> tuple[Seat, ...]:
    """Rendezvous hashing: nobody owns the first place for long, and everybody computes the same order."""
    prefix = f"{run}\0{tag}\0{epoch}\0".encode()

    def score(seat: Seat) -> bytes:
        return hashlib.blake2b(prefix + seat.peer.encode(), digest_size=16).digest()

    return tuple(sorted(seats, key=score))


def config_of(run: str, tag: str, epoch: int, seats: Iterable[Seat]) -> Config:
    """The configuration that these seats form once `epoch` is committed."""
    return Config(epoch, rank(run, tag, epoch + 1, seats))


def founding(run: str, tag: str, founders: Iterable[str]) -> Config:
    """C_0. Founders hold incarnation 0, so a founder that lost its journal must come back as a joiner."""
    return config_of(run, tag, 0, [Seat(peer) for peer in founders])


@dataclass(frozen=True, slots=True)
class Offer:
    """What a member would contribute. `epoch` is that of the state it stands on; it offers for `epoch + 1`.

    `nonce` is new for every attempt, also after a restart: contributions, held or in flight, belong to (peer, nonce).
    `layout`, `state`: digests of the tensors' shapes and of the state; members whose `layout`, `state` and `codec` are
    not the quorum's are refused. `weight` >= 0 (tokens), `norm` the L2 norm of the contribution, `group` the LAN.
    `commit` binds the member to its contribution's bytes, where there are audits: the digest of their hashes.
    """

    epoch: int
    nonce: int
    weight: float
    layout: bytes = b""
    state: bytes = b""
    codec: str = "fp32"
    bandwidth_bps: float = 0.0
    group: str = ""
    dialable: bool = True
    norm: float = 0.0
    commit: bytes = b""


@dataclass(frozen=True, slots=True)
class Member:
    """One of a declaration."""

    peer: str
    incarnation: int
    nonce: int
    weight: float
    bandwidth_bps: float = 0.0
    group: str = ""
    dialable: bool = True
    norm: float = 0.0
    commit: bytes = b""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Somebody who offered, or has a seat, and is no member. why: late, silent, nonfinite, norm, mismatch, diverged."""

    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is to be reduced: by whom, in which order of addition, under which names.

    `seed` (32 bytes) is public, the same for all, unknown before the offers were, and differs between any two
    declarations: it also serves as the declaration's name (`key`) on the data plane.
    """

    run: str
    tag: str
    epoch: int
    ballot: Ballot
    members: tuple[Member, ...]
    codec: str
    layout: bytes
    seed: bytes
    left_out: tuple[LeftOut, ...] = ()

    @property
    def key(self) -> bytes:
        return self.seed

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple([member.peer for member in self.members])

    def member(self, peer: str) -> Member | None:
        for member in self.members:
            if member.peer == peer:
                return member
        return None

    def config(self) -> Config:
        """The configuration this membership forms once it is committed."""
        seats = [Seat(member.peer, member.incarnation) for member in self.members]
        return config_of(self.run, self.tag, self.epoch, seats)


def seed_of(run: str, tag: str, epoch: int, ballot: Ballot, members: Iterable[Member], last: bytes) -> bytes:
    """`last`: the digest of the epoch before."""
    parts = [run, tag, str(epoch), str(ballot.number), ballot.owner, last.hex()]
    for one in members:
        parts += [one.peer, str(one.incarnation), str(one.nonce), repr(one.weight)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class Value:
    """What an epoch decides: a declaration and the digest of the result's bytes."""

    declaration: Declaration
    digest: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """Why a value is decided: who voted for it in `ballot`, and whose resignations made the quorum smaller."""

    ballot: Ballot
    voters: tuple[str, ...]
    resigned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """The last vote of an acceptor in an epoch. `tellers` are the owners of all ballots in which this value may have
    been decided, `ballot`'s among them: nobody else ever counts votes for it."""

    ballot: Ballot
    value: Value
    tellers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resignation:
    """The frozen state of an acceptor that takes part in nothing any more, in `epoch` or later ones."""

    seat: Seat
    epoch: int
    promised: Ballot
    vote: Vote | None


@dataclass(frozen=True, slots=True)
class Decided:
    """A committed epoch: its value (None for epoch 0 alone), why it is decided, and the membership it gives."""

    config: Config
    value: Value | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """All that must survive a crash. `promised` and `vote` are of the epoch after `decided`'s."""

    incarnation: int
    decided: Decided | None
    promised: Ballot = NO_BALLOT
    vote: Vote | None = None
    left: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds. The defaults suit a LAN and, since all waits adapt or repeat, do no harm on a WAN."""

    members_max: int = 256
    members_min: int = 1  # nothing is declared below this, until `hurry_s` before the coordinator's deadline
    resend_s: float = 0.4  # every question is asked again after this long without an answer
    takeover_s: float = 1.5  # a coordinator that says nothing for this long is passed over
    grace_min_s: float = (
        0.02  # how long those who are late are waited for once a quorum is there: learnt, between
    )
    grace_max_s: float = 5.0  # these two
    grace_first_s: float = 0.5  # before anything is learnt
    report_s: float = 0.1  # reports of silence are collected this long before somebody is left out
    backoff_s: float = 0.15  # two who would coordinate at once part by this
    hurry_s: float = 0.5  # before a coordinator's deadline it declares whatever is a quorum
    no_quorum_s: float = 5.0  # a round fails with NoQuorum once its members were suspected this long

    def __post_init__(self) -> None:
        if self.members_max < 1 or not 1 <= self.members_min <= self.members_max:
            raise ValueError(
                f"members_min must be 1 to members_max, got {self.members_min}, {self.members_max}"
            )
        for name in (
            "resend_s",
            "takeover_s",
            "grace_min_s",
            "report_s",
            "backoff_s",
            "hurry_s",
            "no_quorum_s",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")
        if not self.grace_min_s <= self.grace_first_s <= self.grace_max_s:
            raise ValueError(
                f"grace_first_s must be between grace_min_s and grace_max_s, got {self.grace_first_s}"
            )
