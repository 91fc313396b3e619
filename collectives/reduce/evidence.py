"""Evidence that anyone can recheck: who altered a part, who said two things, who accuses without proof.

Before a reduction each member signs the hashes of its encoded contribution, chunk by chunk (`Exchange.contribution`,
`Exchange.committed`); afterwards each root signs the hashes of the results it gave out. One chunk's contributions,
which the members hand out again on request, and those statements are enough to make the result once more: the
arithmetic is the same on every machine. Works without LAN groups (`ExchangeSettings.audit` sees to that).

It does not know whom the round agreed on: whoever rechecks compares the evidence's declaration with the decided one.
Which chunks are looked at should hang on something nobody knows before the results are out: the decided digest does.
What this cannot see: values that are wrong from the start but signed; the aggregators are for those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3

from collectives.agreement import Declaration, Member
from collectives.codecs import CodecFault, UnknownCodec, codec
from collectives.codecs.base import F32
from collectives.errors import NonFinite
from collectives.reduce import combine
from collectives.reduce.contribution import encoded
from collectives.reduce.errors import PlanError
from collectives.reduce.frames import IDENT_MASK
from collectives.reduce.layout import Layout
from collectives.reduce.plan import plan_reduce
from collectives.reduce.result import HASH_BYTES
from collectives.reduce.robust import aggregate, capped
from collectives.reduce.settings import DEFAULTS, ExchangeSettings
from p2p import Identity, PeerId, verify

CONTRIBUTION = "contribution"
RESULT = "result"
_DOMAIN = "shoal reduce statement 1"


@dataclass(frozen=True, slots=True)
class Statement:
    """What `peer` says of an epoch, signed. kind `contribution`: `name` is its nonce, `hashes` has 32 bytes a chunk.
    kind `result`: `name` is the declaration's key, `hashes` has 32 bytes for each chunk it is root of, in order."""

    kind: str
    run: str
    tag: str
    epoch: int
    peer: str
    name: bytes
    hashes: bytes
    signature: bytes = b""

    @property
    def subject(self) -> tuple[str, str, str, int, str, bytes]:
        """What it is about: one peer may make one statement on one subject."""
        return self.kind, self.run, self.tag, self.epoch, self.peer, self.name

    def _signed(self) -> bytes:
        parts = [
            self.kind.encode(),
            self.run.encode(),
            self.tag.encode(),
            b"%d" % self.epoch,
            self.name,
            self.hashes,
        ]
        hasher = hashlib.blake2b(digest_size=32)
        for part in parts:
            hasher.update(len(part).to_bytes(8, "little") + part)
        return hasher.digest()

    def sign(self, identity: Identity) -> Statement:
        """The same with the signature of `identity`, which must be `peer`'s."""
        return replace(self, signature=identity.sign(_DOMAIN, self._signed()))

    @property
    def genuine(self) -> bool:
        """Whether `peer` has signed it."""
        return verify(PeerId(self.peer), _DOMAIN, self._signed(), self.signature)


def nonce_name(nonce: int) -> bytes:
    """The name under which a contribution is stated."""
    return (nonce & IDENT_MASK).to_bytes(8, "little")


def contribution_statement(declaration: Declaration, member: Member, hashes: bytes) -> Statement:
    """Unsigned."""
    where = declaration.run, declaration.tag, declaration.epoch
    return Statement(CONTRIBUTION, *where, member.peer, nonce_name(member.nonce), hashes)


def result_statement(declaration: Declaration, peer: str, hashes: bytes) -> Statement:
    """Unsigned."""
    return Statement(
        RESULT, declaration.run, declaration.tag, declaration.epoch, peer, declaration.key, hashes
    )


@dataclass(frozen=True, slots=True)
class Accusation:
    """`accuser` says that `accused` gave out another result of `chunk` than the contributions make. `contributions` and
    `payloads` are those of the members that weigh anything, in the declaration's order."""

    accuser: str
    accused: str
    chunk: int
    declaration: Declaration
    contributions: tuple[Statement, ...]
    payloads: tuple[bytes, ...]
    result: Statement


@dataclass(frozen=True, slots=True)
class Equivocation:
    """`accuser` has two statements of one peer on one subject."""

    accuser: str
    first: Statement
    second: Statement


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is at fault, and why: altered, equivocated, nonfinite (a contribution no root may use), or unfounded (the
    accuser itself)."""

    guilty: str
    why: str
    detail: str = ""


def recheck(
    evidence: Accusation | Equivocation, layout: Layout, settings: ExchangeSettings = DEFAULTS
) -> Verdict:
    """The same verdict for everybody; never raises, whatever the evidence holds."""
    if isinstance(evidence, Equivocation):
        return _equivocation(evidence)
    try:
        return _accusation(evidence, layout, settings)
    except _Unfounded as reason:
        return Verdict(evidence.accuser, "unfounded", str(reason))


def audited(seed: bytes, chunks: int, count: int) -> tuple[int, ...]:
    """`count` different chunks drawn from `seed`, rising; the same for everybody."""
    order = sorted(
        range(chunks), key=lambda chunk: hashlib.blake2b(seed + chunk.to_bytes(8, "little")).digest()
    )
    return tuple(sorted(order[:count]))


class _Unfounded(Exception):
    """The evidence does not hold."""


def _equivocation(evidence: Equivocation) -> Verdict:
    first, second = evidence.first, evidence.second
    if first.subject != second.subject or first.hashes == second.hashes:
        return Verdict(evidence.accuser, "unfounded", "the statements do not contradict each other")
    if not (first.genuine and second.genuine):
        return Verdict(evidence.accuser, "unfounded", "a signature is not genuine")
    return Verdict(first.peer, "equivocated", f"two {first.kind} statements for epoch {first.epoch}")


def _accusation(evidence: Accusation, layout: Layout, settings: ExchangeSettings) -> Verdict:
    declaration, chunk = evidence.declaration, evidence.chunk
    members = capped(declaration.members, settings.weight_cap, settings.weight_share_max)
    _expect(0 <= chunk < layout.chunks, "no such chunk")
    try:
        made = codec(declaration.codec)
        plan = plan_reduce(
            replace(declaration, members=members), layout.elements, layout.chunk_elements, flat=True
        )
    except (PlanError, UnknownCodec) as fault:
        raise _Unfounded(str(fault)) from fault
    root = plan.root(chunk)
    _expect(members[root].peer == evidence.accused, "the accused is not the chunk's root")
    stated = evidence.result
    _expect(
        stated.subject == result_statement(declaration, evidence.accused, b"").subject, "of another result"
    )
    _expect(stated.genuine and len(stated.hashes) == HASH_BYTES * plan.counts_of(root), "no genuine result")
    weighty = [member for member in members if member.weight > 0]
    _expect(
        len(weighty) == len(evidence.contributions) == len(evidence.payloads), "contributions are missing"
    )
    size = layout.size(chunk)
    terms: list[combine.Term] = []
    for member, statement, payload in zip(weighty, evidence.contributions, evidence.payloads, strict=True):
        _expect(
            statement.subject == contribution_statement(declaration, member, b"").subject, "of another member"
        )
        _expect(
            statement.genuine and len(statement.hashes) == HASH_BYTES * layout.chunks,
            "no genuine contribution",
        )
        _expect(
            blake3(payload).digest() == _hash_at(statement.hashes, chunk),
            f"not what {member.peer} has signed",
        )
        try:
            values = made.decode(payload, size).numpy()
        except CodecFault as fault:
            return Verdict(member.peer, "nonfinite", str(fault))
        if not math.isfinite(combine.squares(values)):
            return Verdict(member.peer, "nonfinite", "signed values hold NaN or infinity")
        terms.append((member.weight, values))
    place = int(np.count_nonzero(plan.roots[:chunk] == root))
    try:
        right = blake3(encoded(made.result, _combined(terms, size, settings))).digest()
    except NonFinite as fault:
        raise _Unfounded(f"the sum is no number: {fault}") from fault
    if right == _hash_at(stated.hashes, place):
        raise _Unfounded("the result is what the contributions make")
    return Verdict(evidence.accused, "altered", f"chunk {chunk} of epoch {declaration.epoch}")


def _combined(terms: Sequence[combine.Term], size: int, settings: ExchangeSettings) -> F32:
    if terms and settings.aggregator != "mean":
        out = np.empty(size, np.float32)
        aggregate(settings.aggregator, terms, out, trim=settings.trim, clip_factor=settings.clip_factor)
        return out
    if not terms:
        return np.zeros(size, np.float32)
    return combine.weighted_mean([[term] for term in terms])


def _hash_at(hashes: bytes, place: int) -> bytes:
    return hashes[HASH_BYTES * place : HASH_BYTES * (place + 1)]


def _expect(good: bool, otherwise: str) -> None:
    if not good:
        raise _Unfounded(otherwise)


def hashes_of(payloads: Sequence[memoryview]) -> bytes:
    """The hash list of a statement."""
    return b"".join(blake3(payload).digest() for payload in payloads)
