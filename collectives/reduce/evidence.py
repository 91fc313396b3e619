"""Evidence that anyone can recheck: who altered a part, who said two things, who accuses without proof.

Before a round each member signs the hashes of its encoded contribution, chunk by chunk; their digest (`commit_of`) is
part of its offer, and so of every declaration. Before anybody votes each root signs the hashes of the results it gave
out, under the declaration it made them for, whole. One chunk's contributions and those statements are enough to make
its result once more: the arithmetic is the same on every machine.

What the accused has signed holds all that its result depends on (members, weights, codec, layout, settings, the bytes
of the contributions), so a proof needs no belief in whoever shows it, and nobody can be framed by what others signed.
What this cannot see: values that are wrong from the start but signed; the aggregators are for those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from blake3 import blake3

from collectives.agreement import Declaration, Member
from collectives.codecs import Codec, CodecFault, UnknownCodec, codec
from collectives.errors import NonFinite
from collectives.reduce import combine
from collectives.reduce.contribution import encoded
from collectives.reduce.errors import LayoutError, PlanError
from collectives.reduce.frames import IDENT_MASK
from collectives.reduce.layout import CHUNKS_MAX, Layout, applied
from collectives.reduce.plan import plan_reduce
from collectives.reduce.result import HASH_BYTES
from collectives.reduce.robust import aggregate
from collectives.reduce.settings import ExchangeSettings
from p2p import Identity, PeerId, ProtocolViolation, pack_value, unpack_value, verify

CONTRIBUTION = "contribution"
RESULT = "result"
HONEST = "the result is what the contributions make"
_DOMAIN = "shoal reduce statement 1"
TERMS_BYTES_MAX = 1 << 30  # of decoded contributions to one chunk: more is not rechecked


@dataclass(frozen=True, slots=True)
class Statement:
    """What `peer` says of an epoch, signed. kind `contribution`: `name` is `contribution_name`, `hashes` has 32 bytes a
    chunk. kind `result`: `name` is `declared`, `hashes` has 32 bytes for each chunk it is root of, in order."""

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


def contribution_name(nonce: int, codec_name: str, layout: bytes) -> bytes:
    """The name under which a contribution is stated: also how it is to be read. `layout` is the declaration's."""
    head = (nonce & IDENT_MASK).to_bytes(8, "little") + codec_name.encode() + b"\0"
    return blake3(b"shoal contribution 1\0" + head + layout).digest()


def commit_of(hashes: bytes) -> bytes:
    """What a member offers with a contribution of these hashes: they cannot be others afterwards."""
    return blake3(b"shoal commit 1\0" + hashes).digest()


def declared(declaration: Declaration) -> bytes:
    """The name of a declaration and of everything in it, which `key` is not."""
    return blake3(b"shoal declared 1\0" + pack_value(declaration)).digest()


def layout_name(layout: Layout, settings: ExchangeSettings) -> bytes:
    """What members compare before they reduce together: shapes, dtypes, and how is averaged."""
    return blake3(layout.digest + settings.fingerprint).digest()


def contribution_statement(declaration: Declaration, member: Member, hashes: bytes) -> Statement:
    """Unsigned."""
    where = declaration.run, declaration.tag, declaration.epoch
    name = contribution_name(member.nonce, declaration.codec, declaration.layout)
    return Statement(CONTRIBUTION, *where, member.peer, name, hashes)


def result_statement(declaration: Declaration, peer: str, hashes: bytes) -> Statement:
    """Unsigned."""
    where = declaration.run, declaration.tag, declaration.epoch
    return Statement(RESULT, *where, peer, declared(declaration), hashes)


def is_bound(declaration: Declaration, member: Member, statement: Statement, chunks: int) -> bool:
    """Whether `statement` is `member`'s own, of the very contribution that it has offered."""
    return (
        statement.subject == contribution_statement(declaration, member, b"").subject
        and len(statement.hashes) == HASH_BYTES * chunks
        and commit_of(statement.hashes) == member.commit
        and statement.genuine
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


def recheck(evidence: Accusation | Equivocation, layout: Layout, settings: ExchangeSettings) -> Verdict:
    """The same verdict for everybody; never raises, whatever the evidence holds. Layout and settings are those that
    the accused has signed, or the verdict is: unfounded."""
    if isinstance(evidence, Equivocation):
        return _equivocation(evidence)
    try:
        return _accusation(evidence, layout, settings)
    except _Unfounded as reason:
        return Verdict(evidence.accuser, "unfounded", str(reason))


@dataclass(frozen=True, slots=True)
class _Proof:
    """Evidence as it travels, with all that is needed to recheck it."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    chunk_elements: int
    settings: ExchangeSettings
    altered: Accusation | None
    equivocated: Equivocation | None


def pack_proof(evidence: Accusation | Equivocation, layout: Layout, settings: ExchangeSettings) -> bytes:
    """Bytes that `verify_proof` takes, anywhere, at any time."""
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in layout.dtypes)
    altered = evidence if isinstance(evidence, Accusation) else None
    equivocated = evidence if isinstance(evidence, Equivocation) else None
    return pack_value(_Proof(layout.shapes, dtypes, layout.chunk_elements, settings, altered, equivocated))


def verify_proof(proof: bytes, run: str | None = None) -> Verdict:
    """Who is guilty of what, by `proof` alone: whoever shows it need not be trusted. Total: `why` is "unfounded", with
    nobody named, for whatever proves nothing, or (with `run`) is of another run."""
    try:
        found = unpack_value(_Proof, proof)
        layout = _layout(found.shapes, found.dtypes, found.chunk_elements)
    except (ProtocolViolation, LayoutError, ValueError, OverflowError) as fault:
        return Verdict("", "unfounded", str(fault))
    evidence = found.altered if found.altered is not None else found.equivocated
    if evidence is None:
        return Verdict("", "unfounded", "it accuses nobody")
    of = evidence.result.run if isinstance(evidence, Accusation) else evidence.first.run
    if run is not None and of != run:
        return Verdict("", "unfounded", "it is of another run")
    verdict = recheck(evidence, layout, found.settings)
    return replace(verdict, guilty="") if verdict.why == "unfounded" else verdict


def _layout(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], chunk_elements: int) -> Layout:
    known = [getattr(torch, name, None) for name in dtypes]
    if len(shapes) != len(known) or not all(isinstance(dtype, torch.dtype) for dtype in known):
        raise LayoutError("unknown dtypes")
    if any(not 0 <= size <= 1 << 40 for shape in shapes for size in shape):
        raise LayoutError("a shape that no tensor has")
    return Layout(shapes, [dtype for dtype in known if isinstance(dtype, torch.dtype)], chunk_elements)


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
    _expect(declaration.layout == layout_name(layout, settings), "of other tensors, or settings")
    _expect(not settings.groups, "LAN groups are not rechecked")
    _expect(0 <= chunk < layout.chunks <= CHUNKS_MAX, "no such chunk")
    _expect(4 * layout.size(chunk) * len(declaration.members) <= TERMS_BYTES_MAX, "too large to be rechecked")
    members = settings.weighed(declaration.members)
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
    subject = result_statement(declaration, evidence.accused, b"").subject
    _expect(stated.subject == subject, "of another result")
    _expect(stated.genuine and len(stated.hashes) == HASH_BYTES * plan.counts_of(root), "no genuine result")
    terms = _terms(evidence, members, made, layout)
    if isinstance(terms, Verdict):
        return terms
    try:
        right = blake3(remade(terms, made, layout, chunk, settings)).digest()
    except NonFinite as fault:
        raise _Unfounded(f"the sum is no number: {fault}") from fault
    place = int(np.count_nonzero(plan.roots[:chunk] == root))
    if right == _hash_at(stated.hashes, place):
        raise _Unfounded(HONEST)
    return Verdict(evidence.accused, "altered", f"chunk {chunk} of epoch {declaration.epoch}")


def _terms(
    evidence: Accusation, members: Sequence[Member], made: Codec, layout: Layout
) -> list[combine.Term] | Verdict:
    """What was added up, or who has signed what cannot be."""
    declaration, chunk, size = evidence.declaration, evidence.chunk, layout.size(evidence.chunk)
    weighty = [member for member in members if member.weight > 0]
    _expect(
        len(weighty) == len(evidence.contributions) == len(evidence.payloads), "contributions are missing"
    )
    terms: list[combine.Term] = []
    for member, statement, payload in zip(weighty, evidence.contributions, evidence.payloads, strict=True):
        _expect(
            is_bound(declaration, member, statement, layout.chunks), f"not what {member.peer} has offered"
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
    return terms


def remade(
    terms: Sequence[combine.Term], made: Codec, layout: Layout, chunk: int, settings: ExchangeSettings
) -> memoryview:
    """The result of `chunk` as its root hands it out. `terms`: weights above 0 and values, in the members' order."""
    size = layout.size(chunk)
    out = np.zeros(size, np.float32)
    if terms and settings.aggregator != "mean":
        aggregate(settings.aggregator, terms, out, trim=settings.trim, clip_factor=settings.clip_factor)
    elif terms:
        out = combine.weighted_mean([[term] for term in terms])
    final = made.result
    data = encoded(final, out)
    if final.relative_error:
        final.decode(data, size, torch.from_numpy(out))
    # What can be sent again from the tensors is sent from there, rounded as they are.
    return encoded(final, applied(layout, chunk, out)) if final.stable else data


def _hash_at(hashes: bytes, place: int) -> bytes:
    return hashes[HASH_BYTES * place : HASH_BYTES * (place + 1)]


def _expect(good: bool, otherwise: str) -> None:
    if not good:
        raise _Unfounded(otherwise)
