"""One member's work as a collector: which inputs its chunks still lack, what it holds of them, and their sums.

It decodes, checks (finite, not longer than claimed) and adds up; to whom the sums go is not its business.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from blake3 import blake3

from collectives.agreement import Member
from collectives.codecs import Codec, CodecFault
from collectives.codecs.base import F32
from collectives.errors import NonFinite
from collectives.reduce import combine
from collectives.reduce.contribution import Contribution
from collectives.reduce.frames import IDENT_MASK
from collectives.reduce.hold import Hold, Source
from collectives.reduce.layout import Layout
from collectives.reduce.plan import ReducePlan
from collectives.reduce.result import HASH_BYTES
from collectives.reduce.robust import aggregate
from collectives.reduce.settings import ExchangeSettings

Input = tuple[float, Source | F32]
SOURCES_MAX = 16  # a peer's values, and its sums under this plan and others


def leaf_of(member: Member) -> Source:
    """The source that is a member's own values."""
    return Source(False, member.peer, member.nonce & IDENT_MASK)


def ident_of(plan: ReducePlan, unit: int) -> int:
    """Names the sum over a unit by who is in it, so that it survives a new plan unless they change."""
    members = [plan.members[number] for number in plan.units[unit]]
    names = [f"{member.peer}\0{member.nonce}\0{member.weight!r}" for member in members if member.weight > 0]
    return int.from_bytes(hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest(), "little")


class Collector:
    """For the chunks that the plan gives to member `me`, as root or as head of its unit."""

    def __init__(
        self, layout: Layout, codec: Codec, hold: Hold, own: Contribution, settings: ExchangeSettings
    ) -> None:
        self._layout = layout
        self._codec = codec
        self._hold = hold
        self._own = own
        self._settings = settings
        self._hashes: dict[Source, bytes] = {}
        self._scratch = np.empty(min(combine.SUM_SLAB, layout.chunk_elements), np.float32)
        exact = codec.relative_error == 0
        self._decoded = np.empty(0 if exact else min(layout.chunk_elements, layout.elements), np.float32)
        self._seen: dict[Source, bytearray] = {}
        self._lacking: dict[int, set[Source]] = {}
        self._roles: dict[int, list[int]] = {}
        self._norms: dict[Source, float] = {}
        self._counted: dict[Source, bytearray] = {}
        self.norm_limits: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def adopt(self, plan: ReducePlan, me: int) -> list[int]:
        """Takes a plan over; returns the chunks for which everything needed is here already."""
        self._plan = plan
        self._me = me
        self.refused = {}
        self._norms = {}
        self._counted = {}
        self._hold.relax()
        self._idents = {unit: ident_of(plan, unit) for unit in plan.heads}
        leaves = {leaf_of(member) for member in plan.members}
        sums = set(self._idents.values())
        self._seen = {
            s: bits for s, bits in self._seen.items() if s in leaves or (s.partial and s.ident in sums)
        }
        self._hold.discard(self._seen)
        self._lacking = {}
        mine = set(np.flatnonzero(plan.roots == me).tolist())
        heads = plan.heads.get(plan.unit_of[me])
        if heads is not None:
            mine |= set(np.flatnonzero(heads == me).tolist())
        ready = []
        for chunk in sorted(mine):
            lacking = {source for source in self.sources(chunk) if not self._ready(source, chunk)}
            if lacking:
                self._lacking[chunk] = lacking
            elif plan.root(chunk) == me or self._groups(chunk):
                ready.append(chunk)
        self._hold.trim()
        return ready

    def collects(self, chunk: int) -> bool:
        """Whether this member adds `chunk` up."""
        plan = self._plan
        return plan.root(chunk) == self._me or plan.leaf_to(self._me, chunk) == self._me

    def sources(self, chunk: int) -> list[Source]:
        """From whom inputs are needed for `chunk`; members of weight 0 give none, and this member's own are here."""
        return [
            source
            for group in self._groups(chunk)
            for _, source in group
            if source.peer != self._plan.members[self._me].peer
        ]

    def _groups(self, chunk: int) -> list[list[tuple[float, Source]]]:
        """What is added up for `chunk`, in groups: weight and source."""
        plan = self._plan
        mine = plan.unit_of[self._me]
        units = range(len(plan.units)) if plan.root(chunk) == self._me else [mine]
        groups: list[list[tuple[float, Source]]] = []
        for unit in units:
            members = [plan.members[number] for number in plan.units[unit] if plan.members[number].weight > 0]
            if not members:
                continue
            if unit == mine or len(plan.units[unit]) == 1:
                groups.append([(member.weight, leaf_of(member)) for member in members])
            else:
                groups.append([(1.0, self.partial(unit, chunk))])
        return groups

    def partial(self, unit: int, chunk: int) -> Source:
        """The source that is the sum over a unit."""
        head = self._plan.members[self._plan.head(unit, chunk)]
        return Source(True, head.peer, self._idents[unit])

    def expects(self, source: Source) -> bool:
        """Whether to take note of frames of this source: a member's is known, and a few may be of plans to come."""
        return source in self._seen or sum(known.peer == source.peer for known in self._seen) < SOURCES_MAX

    def settle(self, chunk: int) -> None:
        """The sum of `chunk` is not needed any more for now."""
        self._lacking.pop(chunk, None)
        self._hold.release(
            [(source, chunk) for source in self.sources(chunk)], keep=len(self._plan.members) > 2
        )

    def accept(self, source: Source, chunk: int, payload: memoryview) -> bool:
        """Takes an input, ownership of `payload` included; whether `chunk` has everything now."""
        seen = self._seen.setdefault(source, bytearray(self._layout.chunks))
        seen[chunk] = 1
        lacking = self._lacking.get(chunk)
        wanted = lacking is not None and source in lacking
        self._hold.put((source, chunk), payload, wanted)
        if lacking is None or not wanted or (self._settings.audit and source not in self._hashes):
            return False
        return self._got(source, chunk, lacking)

    def _got(self, source: Source, chunk: int, lacking: set[Source]) -> bool:
        lacking.discard(source)
        if lacking:
            return False
        del self._lacking[chunk]
        return True

    def commit(self, source: Source, hashes: bytes) -> list[int]:
        """What the values of `source` have to be, by chunk; the chunks that have everything now."""
        if self._hashes.setdefault(source, hashes) is not hashes:
            return []
        held = [
            (c, lacking)
            for c, lacking in self._lacking.items()
            if source in lacking and (source, c) in self._hold
        ]
        return sorted(chunk for chunk, lacking in held if self._got(source, chunk, lacking))

    def lost(self) -> dict[str, tuple[set[int], set[int]]]:
        """Inputs that came once and are needed again: by peer, chunks of its leaves and of its partials."""
        return self._missing(
            lambda source, chunk: bool(self._seen.get(source, b"")) and self._seen[source][chunk] == 1
        )

    def missing(self) -> dict[str, tuple[set[int], set[int]]]:
        """Every input that is lacking."""
        return self._missing(lambda source, chunk: True)

    def _missing(self, test: Callable[[Source, int], bool]) -> dict[str, tuple[set[int], set[int]]]:
        found: dict[str, tuple[set[int], set[int]]] = {}
        for chunk, lacking in self._lacking.items():
            for source in lacking:
                if (source, chunk) not in self._hold and test(source, chunk):
                    found.setdefault(source.peer, (set(), set()))[source.partial].add(chunk)
        return found

    def again(self, chunk: int) -> bool:
        """A sum that was made is wanted once more: whether its inputs are here; if not they are lacking again."""
        lacking = {source for source in self.sources(chunk) if not self._ready(source, chunk)}
        if lacking:
            self._lacking[chunk] = lacking
        return not lacking

    def _ready(self, source: Source, chunk: int) -> bool:
        held = self._hold.need((source, chunk))
        return held and not (self._settings.audit and source not in self._hashes)

    def lags(self, peer: str) -> bool:
        """Whether `peer` is among those that the chunks which came furthest still wait for."""
        fewest = min((len(lacking) for lacking in self._lacking.values()), default=0)
        return any(
            len(lacking) == fewest and any(source.peer == peer for source in lacking)
            for lacking in self._lacking.values()
        )

    def sound(self, chunk: int) -> bool:
        """Whether all inputs of `chunk` can be used; if not, the culprits are in `refused`."""
        inputs = [one for group in self._groups(chunk) for one in group]
        try:
            norms = [combine.squares(self._values(what, chunk)) for _, what in inputs]
        except CodecFault as fault:
            self.refused[fault.args[1]] = "mismatch"
            return False
        return self._check(inputs, norms, chunk)

    def total(self, chunk: int, out: F32) -> bool:
        """out = the weighted sum of `chunk`. False, with the culprits in `refused`, if an input cannot be used."""
        return self._sum(chunk, out, None)

    def mean(self, chunk: int, out: F32) -> bool:
        """out = the weighted mean of `chunk`, for its root."""
        return self._sum(chunk, out, combine.total_weight([member.weight for member in self._plan.members]))

    def _sum(self, chunk: int, out: F32, total: float | None) -> bool:
        groups = self._groups(chunk)
        good = True
        if groups and total is not None and self._settings.aggregator != "mean":
            good = self._aggregate([group[0] for group in groups], chunk, out)
        elif not groups:
            out.fill(0)
        elif len(groups) == 1:
            good = self._add(list(groups[0]), chunk, out, total)
        else:
            inputs: list[Input] = []
            for group in groups:
                if len(group) == 1:
                    inputs.append(group[0])
                else:
                    part = np.empty(len(out), np.float32)
                    good = self._add(list(group), chunk, part, None) and good
                    inputs.append((1.0, part))
            good = good and self._add(inputs, chunk, out, total)
        if good:
            self.settle(chunk)
        return good

    def _add(self, inputs: Sequence[Input], chunk: int, out: F32, total: float | None) -> bool:
        """out = sum of the inputs. With an exact codec in one go over all of them, else one after the other, so that
        only one is decoded at a time. Where nobody is held to a length, one look at the sum shows that all inputs can
        be used; only if it does not, each is looked at."""
        norms = [0.0] * len(inputs)
        each = bool(self.norm_limits)
        good = False
        try:
            if self._codec.relative_error == 0:
                terms = [(weight, self._values(what, chunk)) for weight, what in inputs]
                good = combine.add_up(terms, out, self._scratch, norms if each else None, total, not each)
            else:
                for index, (weight, what) in enumerate(inputs):
                    values = self._values(what, chunk)
                    if each:
                        norms[index] = combine.squares(values)
                    before = [(1.0, out)] if index else []
                    last = index == len(inputs) - 1
                    good = combine.add_up(
                        [*before, (weight, values)],
                        out,
                        self._scratch,
                        None,
                        total if last else None,
                        last and not each,
                    )
            if not each:
                if good:
                    return True
                norms = [combine.squares(self._values(what, chunk)) for _, what in inputs]
        except CodecFault as fault:
            self.refused[fault.args[1]] = "mismatch"
            return False
        return self._check(inputs, norms, chunk)

    def _aggregate(self, inputs: Sequence[tuple[float, Source]], chunk: int, out: F32) -> bool:
        """out = the aggregate of the inputs, all decoded at a time."""
        try:
            # Where decoding goes through scratch memory, each has to be kept while the next one is decoded.
            keep = self._codec.relative_error > 0
            values = (self._values(what, chunk) for _, what in inputs)
            terms = [(w, v.copy() if keep else v) for (w, _), v in zip(inputs, values, strict=True)]
        except CodecFault as fault:
            self.refused[fault.args[1]] = "mismatch"
            return False
        if not self._check(inputs, [combine.squares(values) for _, values in terms], chunk):
            return False
        settings = self._settings
        aggregate(settings.aggregator, terms, out, trim=settings.trim, clip_factor=settings.clip_factor)
        return True

    def _values(self, what: Source | F32, chunk: int) -> F32:
        """Values of an input. May be scratch memory of the collector unless the codec is exact."""
        if not isinstance(what, Source):
            return what
        if what.peer == self._plan.members[self._me].peer:
            return self._own.values(chunk)
        codec = self._codec.result if what.partial else self._codec
        size = self._layout.size(chunk)
        out = None if codec.relative_error == 0 else torch.from_numpy(self._decoded[:size])
        try:
            payload = self._hold.get((what, chunk))
            self._compare(what, chunk, payload)
            values: F32 = codec.decode(payload, size, out).numpy()
        except CodecFault as fault:
            raise CodecFault(str(fault), what.peer) from fault
        return values

    def _compare(self, source: Source, chunk: int, payload: memoryview) -> None:
        """CodecFault if the payload is not what its member has committed itself to."""
        hashes = self._hashes.get(source)
        if (
            hashes is not None
            and blake3(payload).digest() != hashes[HASH_BYTES * chunk : HASH_BYTES * (chunk + 1)]
        ):
            raise CodecFault("other bytes than those it has signed")

    def _check(self, inputs: Sequence[Input], norms: Sequence[float], chunk: int) -> bool:
        good = True
        for (weight, what), square in zip(inputs, norms, strict=True):
            if not isinstance(what, Source):
                continue
            fits = math.isfinite(square) and (
                what.partial or weight * math.sqrt(square) <= combine.MAGNITUDE_MAX
            )
            if what.peer == self._plan.members[self._me].peer:
                if not fits:
                    raise NonFinite(
                        f"this member's own values in chunk {chunk} hold NaN, infinity or far too much"
                    )
                continue
            if not fits:
                self.refused[what.peer] = "norm" if math.isfinite(square) else "nonfinite"
                good = False
                continue
            total = self._norms.get(what, 0.0)
            counted = self._counted.setdefault(what, bytearray(self._layout.chunks))
            if not counted[chunk]:
                counted[chunk] = 1
                total = self._norms[what] = total + square
            limit = self.norm_limits.get(what.peer)
            if limit is not None and not what.partial and total > limit * limit:
                self.refused[what.peer] = "norm"
                good = False
        return good
