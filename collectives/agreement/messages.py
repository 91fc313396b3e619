"""The messages of agreement, and their bytes. Of one chain: the transport routes by (run, tag) and names the sender.

Decoding is total (`ProtocolViolation`); `check` then refuses what is well formed and yet absurd. Whoever sends a
message holds the `incarnation` it gives. What is done about a message is the chain's matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from collectives.agreement.types import (
    HASH_BYTES_MAX,
    NAME_BYTES_MAX,
    Ballot,
    Certificate,
    Config,
    Decided,
    Declaration,
    Offer,
    Resignation,
    Value,
    Vote,
)
from p2p import ProtocolViolation, pack_value, unpack_value

EPOCH_MAX = 1 << 53
NUMBER_MAX = 1 << 31
HELD_MAX = 16
FORMER_MAX = 64
EARLIER_MAX = 4


@dataclass(frozen=True, slots=True)
class Ready:
    """To the coordinator: what I would contribute to `epoch`. Repeated until the round ends: it asks for what I miss.
    `seen`: the ballot of the last declaration I have."""

    epoch: int
    incarnation: int
    offer: Offer
    seen: Ballot
    resigned: tuple[Resignation, ...] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to a repeated Ready while nothing new is known: the owner of `ballot` is at it."""

    epoch: int
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Gone:
    """The attempt `nonce` of the sender is over: nothing more will come of it."""

    epoch: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Decline:
    """The sender does not coordinate `epoch`; `heir` is asked to."""

    epoch: int
    heir: str


@dataclass(frozen=True, slots=True)
class Prepare:
    epoch: int
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Promise:
    """The answer to Prepare, and to a Declare of a new ballot: nothing below `ballot` will have my vote.
    `vote`: my last one; `held`: the digests whose bytes I have; `offer`: what I contribute if I am in a round."""

    epoch: int
    ballot: Ballot
    incarnation: int
    vote: Vote | None
    held: tuple[bytes, ...]
    offer: Offer | None
    resigned: tuple[Resignation, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """`ballot` is too low: I promised `promised`."""

    epoch: int
    ballot: Ballot
    promised: Ballot


@dataclass(frozen=True, slots=True)
class Declare:
    """Reduce this. For a number above 0 it asks for a promise too."""

    declaration: Declaration


@dataclass(frozen=True, slots=True)
class Trouble:
    """I cannot finish the reduction of `ballot` because of these. why: silent, nonfinite, norm, mismatch."""

    epoch: int
    ballot: Ballot
    without: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Accept:
    """Vote for this if you hold it; get it from `holders` if you do not. `tellers` as in Vote."""

    epoch: int
    ballot: Ballot
    value: Value
    holders: tuple[str, ...]
    tellers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Voted:
    epoch: int
    ballot: Ballot
    incarnation: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """What the last epoch decided; also the answer to whatever belongs to an earlier one. `waiting`: who wanted to take
    part and came too late, so that the next coordinator waits for them a little. `former`: who is no member and is to
    be told nevertheless. `earlier`: what the epochs just before decided, oldest first, for whoever may not have heard
    of it, and may have been counted in it."""

    decided: Decided
    waiting: tuple[str, ...] = ()
    former: tuple[str, ...] = ()
    earlier: tuple[Decided, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """I know `epoch` (-1: nothing). Answered with Commit by whoever knows more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No place in `epoch` for the attempt `nonce`. why: diverged, mismatch, full."""

    epoch: int
    nonce: int
    why: str


@dataclass(frozen=True, slots=True)
class Resign:
    """The sender leaves for good. `decided`: the last epoch it knows."""

    resignation: Resignation
    decided: Decided


Message = (
    Ready
    | Heard
    | Gone
    | Decline
    | Prepare
    | Promise
    | Nack
    | Declare
    | Trouble
    | Accept
    | Voted
    | Commit
    | Ask
    | Refused
    | Resign
)

# The numbers are the wire's: append only.
_KINDS: tuple[type, ...] = (
    Ready,
    Heard,
    Gone,
    Decline,
    Prepare,
    Promise,
    Nack,
    Declare,
    Trouble,
    Accept,
    Voted,
    Commit,
    Ask,
    Refused,
    Resign,
)
_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}


def pack_message(message: Message) -> bytes:
    """One byte for the kind, then the message."""
    return bytes([_NUMBER[type(message)]]) + pack_value(message)


def unpack_message(data: bytes | bytearray | memoryview, members_max: int = 256) -> Message:
    """The message, or ProtocolViolation: undecodable, of no known kind, or absurd. `data` is as long as the transport
    allows (65536 bytes hold some 400 members)."""
    if not data or data[0] >= len(_KINDS):
        raise ProtocolViolation("not a message of agreement")
    message: Message = unpack_value(_KINDS[data[0]], memoryview(data)[1:])
    check(message, members_max)
    return message


def check(message: Message, members_max: int) -> None:
    """ProtocolViolation if a count, a length or a number is out of all bounds."""
    match message:
        case Ready(epoch, _, offer, seen, resigned):
            _epoch(epoch)
            _offer(offer)
            _ballot(seen, lowest=-1)
            _resignations(resigned, members_max)
        case Promise(epoch, ballot, _, vote, held, given, resigned):
            _epoch(epoch)
            _count(len(held), HELD_MAX)
            for digest in held:
                _hash(digest)
            _ballot(ballot)
            _vote(vote, members_max)
            if given is not None:
                _offer(given)
            _resignations(resigned, members_max)
        case Declare(declaration):
            _declaration(declaration, members_max)
        case Accept(epoch, ballot, value, holders, tellers):
            _epoch(epoch)
            _ballot(ballot)
            _value(value, members_max)
            _names(holders, members_max)
            _tellers(tellers, ballot, members_max)
        case Voted(epoch, ballot, _, digest):
            _epoch(epoch)
            _ballot(ballot)
            _hash(digest)
        case Commit(decided, waiting, former, earlier):
            _decided(decided, members_max)
            _count(len(earlier), EARLIER_MAX)
            for one in earlier:
                _decided(one, members_max)
            _names(waiting, members_max)
            _names(former, FORMER_MAX)
        case Resign(resignation, decided):
            _resignation(resignation, members_max)
            _decided(decided, members_max)
        case Trouble(epoch, ballot, without, why):
            _epoch(epoch)
            _ballot(ballot)
            _names(without, members_max)
            _names((why,), 1)
        case Heard(epoch, ballot) | Prepare(epoch, ballot):
            _epoch(epoch)
            _ballot(ballot)
        case Nack(epoch, ballot, promised):
            _epoch(epoch)
            _ballot(ballot)
            _ballot(promised)
        case Decline(epoch, name) | Refused(epoch, _, name):
            _epoch(epoch)
            _names((name,), 1)
        case Gone(epoch, _):
            _epoch(epoch)
        case Ask(epoch):
            _epoch(epoch, lowest=-1)


def _epoch(epoch: int, lowest: int = 0) -> None:
    if not lowest <= epoch <= EPOCH_MAX:
        raise ProtocolViolation(f"epoch must be {lowest} to {EPOCH_MAX}, got {epoch}")


def _ballot(ballot: Ballot, lowest: int = 0) -> None:
    if not lowest <= ballot.number <= NUMBER_MAX or len(ballot.owner) > NAME_BYTES_MAX:
        raise ProtocolViolation(f"a ballot's number must be {lowest} to {NUMBER_MAX}, got {ballot.number}")


def _count(count: int, most: int) -> None:
    if count > most:
        raise ProtocolViolation(f"at most {most} allowed, got {count}")


def _names(names: tuple[str, ...], most: int) -> None:
    _count(len(names), most)
    if any(len(name) > NAME_BYTES_MAX for name in names):
        raise ProtocolViolation(f"a name may have {NAME_BYTES_MAX} bytes")


def _tellers(tellers: tuple[str, ...], ballot: Ballot, members_max: int) -> None:
    _names(tellers, members_max)
    if ballot.owner not in tellers:
        raise ProtocolViolation("whoever owns a ballot counts its votes")


def _hash(data: bytes) -> None:
    if len(data) > HASH_BYTES_MAX:
        raise ProtocolViolation(f"a digest may have {HASH_BYTES_MAX} bytes, got {len(data)}")


def _numbers(*numbers: float) -> None:
    if not all(math.isfinite(one) and one >= 0 for one in numbers):
        raise ProtocolViolation(f"weight, bandwidth and norm must be finite and not negative, got {numbers}")


def _offer(offer: Offer) -> None:
    _epoch(offer.epoch)
    _hash(offer.layout)
    _hash(offer.state)
    _hash(offer.commit)
    _names((offer.codec, offer.group), 2)
    _numbers(offer.weight, offer.bandwidth_bps, offer.norm)


def _declaration(declaration: Declaration, members_max: int) -> None:
    _epoch(declaration.epoch, lowest=1)
    _ballot(declaration.ballot)
    _hash(declaration.layout)
    _hash(declaration.seed)
    _count(len(declaration.members), members_max)
    _count(len(declaration.left_out), 2 * members_max)
    _names(declaration.peers, members_max)
    _names((declaration.run, declaration.tag, declaration.codec), 3)
    if not declaration.members or len(set(declaration.peers)) != len(declaration.members):
        raise ProtocolViolation("a declaration's members must be there, and each only once")
    for member in declaration.members:
        _names((member.group,), 1)
        _hash(member.commit)
        _numbers(member.weight, member.bandwidth_bps, member.norm)
    for left in declaration.left_out:
        _names((left.peer, left.why), 2)


def _value(value: Value, members_max: int) -> None:
    _declaration(value.declaration, members_max)
    _hash(value.digest)


def _vote(vote: Vote | None, members_max: int) -> None:
    if vote is not None:
        _ballot(vote.ballot)
        _value(vote.value, members_max)
        _tellers(vote.tellers, vote.ballot, members_max)


def _resignation(resignation: Resignation, members_max: int) -> None:
    _epoch(resignation.epoch)
    _ballot(resignation.promised, lowest=-1)
    _names((resignation.seat.peer,), 1)
    _vote(resignation.vote, members_max)


def _resignations(resigned: tuple[Resignation, ...], members_max: int) -> None:
    _count(len(resigned), members_max)
    for one in resigned:
        _resignation(one, members_max)


def _config(config: Config, members_max: int) -> None:
    _epoch(config.epoch)
    _names(config.peers, members_max)
    if not config.seats or len(set(config.peers)) != len(config.seats):
        raise ProtocolViolation("a configuration's seats must be there, and each peer have one")


def _certificate(certificate: Certificate | None, members_max: int) -> None:
    if certificate is not None:
        _ballot(certificate.ballot)
        _names(certificate.voters, 2 * members_max)
        _names(certificate.resigned, members_max)


def _decided(decided: Decided, members_max: int) -> None:
    _config(decided.config, members_max)
    _certificate(decided.certificate, members_max)
    value = decided.value
    if value is None:
        if decided.config.epoch != 0:
            raise ProtocolViolation("only epoch 0 is decided without a value")
        return
    _value(value, members_max)
    if value.declaration.config() != decided.config or decided.certificate is None:
        raise ProtocolViolation("a decision's configuration must be its value's, with a certificate")
