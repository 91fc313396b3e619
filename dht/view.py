"""The mesh as one node knows it: a delta-state last-writer-wins map of signed records. Pure.

Knows which of two versions wins, what is too old, too new, too much or forged, and what another
view lacks. It does not know the network, the time (always an argument) or what values mean.

State-based CRDTs: Shapiro et al., "Conflict-free Replicated Data Types" (2011); deltas: Almeida et
al., "Delta State Replicated Data Types" (2018). What a view holds is a function of the set of
records it was shown: per key the greatest in (seq, withdrawn, hash, bytes), then per signer the
newest that fit its share. So any order, loss and repetition of deliveries ends in equal views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from dht.digest import ENTRIES_MAX, SIGNERS_MAX, Detail, Digest, hash64
from dht.errors import RecordRefused
from dht.records import Key, Record
from p2p import PeerId

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """Limits of a view. All members of a mesh should use the same ones, or they cannot become equal."""

    records_per_signer_max: int = 256
    bytes_per_signer_max: int = 512 * 1024
    signers_max: int = 4096
    bytes_max: int = 64 * 1024 * 1024
    forgotten_max: int = 4096
    skew_max_s: float = 10.0
    ttl_max_s: float = 86_400.0
    delta_bytes_max: int = 256 * 1024

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"ViewConfig.{name} is {getattr(self, name)!r}: it must be above zero")
        if self.signers_max + self.forgotten_max > SIGNERS_MAX:
            raise ValueError(f"ViewConfig.signers_max plus forgotten_max must be at most {SIGNERS_MAX}")


@dataclass(frozen=True, slots=True)
class Merged:
    """What a batch did: versions taken in, versions pushed out by a signer's share, and refusals.

    `refreshed` is the part of `changed` that says the same as before with a later expiry. `stale`
    are records older than what is held, or expired.
    """

    changed: tuple[Record, ...] = ()
    refreshed: tuple[Record, ...] = ()
    evicted: tuple[Record, ...] = ()
    stale: tuple[Record, ...] = ()
    refused: tuple[RecordRefused, ...] = ()


class _Entry:
    """A record with what is asked of it often: key id, version hash, size and rank."""

    __slots__ = ("data", "key_id", "rank", "record", "version")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.data = record.encode()
        self.key_id = hash64("\0".join(record.key).encode())
        self.version = hash64(self.data)
        self.rank = (record.seq, record.withdrawn, self.version, self.data)


@dataclass(slots=True)
class _Signer:
    """One signer's entries, their size, and a hash over them that is kept until one changes."""

    id: int
    entries: dict[Key, _Entry] = field(default_factory=dict)
    bytes: int = 0
    summary: int | None = None
    expires_first_s: float = 0.0

    def changed(self) -> None:
        self.summary = None

    def refresh(self) -> int:
        """The hash over all entries; cached until one changes."""
        if self.summary is None:
            self.summary = _summary(self.entries.values())
            self.expires_first_s = min(
                (entry.record.expires_at_s for entry in self.entries.values()), default=float("inf")
            )
        return self.summary

    def live(self, now_s: float) -> list[_Entry]:
        """Entries that have not expired."""
        return [entry for entry in self.entries.values() if entry.record.expires_at_s > now_s]


def _summary(entries: Iterable[_Entry]) -> int:
    """A hash of a set of entries; never 0, which means "forgotten" in a digest."""
    return (sum(entry.version for entry in entries) & _MASK) or 1


def _same_value(old: Record, new: Record) -> bool:
    return old.value == new.value and old.withdrawn == new.withdrawn


class View:
    """Records by (kind, name, signer). Time goes in as `now_s`, Unix seconds, with each question.

    `verify` is replaceable so that simulations need not pay for signatures.
    """

    def __init__(
        self, config: ViewConfig | None = None, *, verify: Callable[[Record], bool] = Record.verify
    ) -> None:
        self.config = config or ViewConfig()
        self.counts: Counter[str] = Counter()
        # Whose records no flood of others can keep out; set by the replica.
        self.owner: PeerId | None = None
        self._verify = verify
        self._signers: dict[PeerId, _Signer] = {}
        self._forgotten: dict[PeerId, int] = {}
        self._bytes = 0

    def merge(self, record: Record, now_s: float) -> bool:
        """True if `record` is now in the view and was not before.

        False for what is older than, or equal to, what is held, already expired, or beyond its
        signer's share. Raises RecordRefused (counted by reason) for what must not be in any view.
        """
        merged = self.merge_many((record,), now_s)
        if merged.refused:
            raise merged.refused[0]
        return bool(merged.changed)

    def merge_many(self, records: Iterable[Record], now_s: float) -> Merged:
        """Take in a delta as one step: first all versions, then each signer's share. Never raises."""
        taken: dict[Key, _Entry] = {}
        before: dict[Key, Record] = {}
        stale: list[Record] = []
        refused: list[RecordRefused] = []
        for record in records:
            try:
                entry = self._admit(record, now_s)
            except RecordRefused as error:
                self.counts[error.reason] += 1
                refused.append(error)
                continue
            if entry is None:
                stale.append(record)
                continue
            old = self._put(entry)
            if old is not None:
                before.setdefault(record.key, old.record)
            taken[record.key] = entry
        evicted = [out for signer in {key[2] for key in taken} for out in self._trim(signer)]
        gone = [
            entry.record for entry in evicted if entry.record.key not in taken or entry.record.key in before
        ]
        changed = [entry.record for entry in taken.values() if self._holds(entry)]
        refreshed = [r for r in changed if r.key in before and _same_value(before[r.key], r)]
        self.counts["merged"] += len(changed)
        return Merged(tuple(changed), tuple(refreshed), tuple(gone), tuple(stale), tuple(refused))

    def get(self, kind: str, name: str, signer: PeerId) -> Record | None:
        """The version held, or None where there is none or it was withdrawn. Expiry is the caller's to check."""
        entry = self._entry((kind, name, signer))
        return None if entry is None or entry.record.withdrawn else entry.record

    def held(self, key: Key) -> Record | None:
        """The version held, tombstones included."""
        entry = self._entry(key)
        return None if entry is None else entry.record

    def records(self, kind: str, now_s: float) -> tuple[Record, ...]:
        """All live records of `kind`, by (name, signer)."""
        live = (r for r in self._live(now_s) if r.kind == kind and not r.withdrawn)
        return tuple(sorted(live, key=lambda record: record.key))

    def of_signer(self, signer: PeerId) -> tuple[Record, ...]:
        """Everything held of one signer, tombstones and the just expired included, by key."""
        known = self._signers.get(signer)
        return () if known is None else tuple(known.entries[key].record for key in sorted(known.entries))

    def signers(self, now_s: float) -> tuple[PeerId, ...]:
        """Who has at least one live record, sorted."""
        return tuple(sorted({r.signer for r in self._live(now_s) if not r.withdrawn}))

    def seq_max(self, signer: PeerId) -> int:
        """The greatest sequence number held of `signer`, or -1."""
        known = self._signers.get(signer)
        return max((e.record.seq for e in known.entries.values()), default=-1) if known else -1

    def digest(self, now_s: float) -> Digest:
        """One hash a signer over its unexpired entries, and a zero for each forgotten signer."""
        digest = dict.fromkeys(self._forgotten.values(), 0)
        for signer in self._signers.values():
            signer.refresh()
            if signer.expires_first_s <= now_s:
                live = signer.live(now_s)
                if live:
                    digest[signer.id] = _summary(live)
            else:
                digest[signer.id] = signer.refresh()
        return Digest(digest)

    def differing(self, digest: Digest, now_s: float) -> frozenset[int]:
        """Ids of the signers whose entries are not the same here and there, but for those either side forgot."""
        mine, theirs = self.digest(now_s).signers, digest.signers
        return frozenset(
            signer
            for signer in mine.keys() | theirs.keys()
            if mine.get(signer) != theirs.get(signer) and mine.get(signer) != 0 and theirs.get(signer) != 0
        )

    def detail(self, scope: frozenset[int], now_s: float, pivot: int = 0) -> Detail:
        """What is held, version by version, of the signers in `scope`.

        Where that is over ENTRIES_MAX the scope is narrowed, beginning at the signer id `pivot`, so
        that a random pivot lets every signer have its turn.
        """
        taken: set[int] = set()
        versions: dict[int, tuple[int, int]] = {}
        by_id = {signer.id: signer for signer in self._signers.values() if signer.id in scope}
        for signer_id in sorted(scope, key=lambda known: (known - pivot) & _MASK):
            signer = by_id.get(signer_id)
            live = [] if signer is None else signer.live(now_s)
            if len(taken) >= SIGNERS_MAX or len(versions) + len(live) > ENTRIES_MAX:
                break
            taken.add(signer_id)
            versions.update({entry.key_id: (entry.record.seq, entry.version) for entry in live})
        return Detail(frozenset(taken), versions)

    def missing(self, detail: Detail, now_s: float, pivot: int = 0) -> tuple[Record, ...]:
        """What the writer of `detail` lacks or has older, by signer from `pivot`, up to `delta_bytes_max`.

        At equal seq and different bytes both sides send: the greater wins on either.
        """
        nothing = (-1, 0)
        found = [
            entry
            for entry in self._scoped(detail.scope, now_s)
            if (have := detail.entries.get(entry.key_id, nothing))[0] < entry.record.seq
            or (have[0] == entry.record.seq and have[1] != entry.version)
        ]
        return self._bounded(found, pivot)

    def delta(self, digest: Digest, now_s: float, pivot: int = 0) -> tuple[Record, ...]:
        """All records of the signers that differ from `digest`, from `pivot`, up to `delta_bytes_max`."""
        return self._bounded(list(self._scoped(self.differing(digest, now_s), now_s)), pivot)

    def expire(self, now_s: float) -> tuple[Record, ...]:
        """Drop what has expired, and return it."""
        gone = [
            entry
            for signer in self._signers.values()
            if signer.refresh() and signer.expires_first_s <= now_s
            for entry in signer.entries.values()
            if entry.record.expires_at_s <= now_s
        ]
        for entry in gone:
            self._drop(entry)
        return tuple(entry.record for entry in gone)

    def forget(self, signer: PeerId) -> tuple[Record, ...]:
        """Drop all of `signer`'s records and refuse new ones until `readmit`; returns what was dropped.

        Raises RecordRefused (`forgotten_full`) when too many are forgotten.
        """
        if signer not in self._forgotten and len(self._forgotten) >= self.config.forgotten_max:
            raise RecordRefused("forgotten_full", f"already {len(self._forgotten)} signers are forgotten")
        self._forgotten[signer] = hash64(signer.encode())
        entries = list(self._signers[signer].entries.values()) if signer in self._signers else []
        for entry in entries:
            self._drop(entry)
        return tuple(entry.record for entry in entries)

    def readmit(self, signer: PeerId) -> None:
        """Undo `forget`."""
        self._forgotten.pop(signer, None)

    def validate(self) -> None:
        """Raise RuntimeError if the view breaks its own rules. For tests, after every event."""
        total = 0
        for name, signer in self._signers.items():
            size = sum(len(entry.data) for entry in signer.entries.values())
            total += size
            self._expect(bool(signer.entries), f"{name} is kept without records")
            self._expect(signer.bytes == size, f"{name} counts {signer.bytes} bytes, holds {size}")
            self._expect(size <= self.config.bytes_per_signer_max, f"{name} holds {size} bytes")
            self._expect(len(signer.entries) <= self.config.records_per_signer_max, f"{name} holds too many")
            self._expect(name not in self._forgotten, f"{name} is held and forgotten")
            for key, entry in signer.entries.items():
                self._expect(key == entry.record.key and key[2] == name, f"{key} is filed wrongly")
                self._expect(entry.version == hash64(entry.record.encode()), f"{key} has a wrong hash")
        self._expect(total == self._bytes, f"counts {self._bytes} bytes, holds {total}")
        own = self._signers.get(self.owner) if self.owner else None
        others_bytes = total - (own.bytes if own else 0)
        self._expect(others_bytes <= self.config.bytes_max, f"holds {total} bytes")
        self._expect(len(self._signers) - bool(own) <= self.config.signers_max, "holds too many signers")

    def __len__(self) -> int:
        return sum(len(signer.entries) for signer in self._signers.values())

    @property
    def bytes_held(self) -> int:
        """Encoded size of all records held."""
        return self._bytes

    @staticmethod
    def _expect(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(f"broken view: {message}")

    def _admit(self, record: Record, now_s: float) -> _Entry | None:
        """The entry to put, None for stale, RecordRefused for the rest; the signature is checked last, as it costs."""
        if record.signer in self._forgotten:
            raise RecordRefused("forgotten", record.signer)
        if record.issued_at_s > now_s + self.config.skew_max_s:
            raise RecordRefused("future", f"issued {record.issued_at_s - now_s:.1f} s from now")
        if record.expires_at_s - record.issued_at_s > self.config.ttl_max_s + self.config.skew_max_s:
            raise RecordRefused("ttl", f"lives {record.expires_at_s - record.issued_at_s:.0f} s")
        if record.expires_at_s <= now_s:
            self.counts["expired"] += 1
            return None
        held = self._entry(record.key)
        if held is not None and record.seq < held.record.seq:
            self.counts["stale"] += 1
            return None
        entry = _Entry(record)
        if held is not None and entry.rank <= held.rank:
            self.counts["stale"] += 1
            return None
        if len(entry.data) > self.config.bytes_per_signer_max:
            raise RecordRefused("oversize", f"{len(entry.data)} bytes")
        if not self._verify(record):
            raise RecordRefused("signature", f"not signed by {record.signer}")
        if record.signer == self.owner:
            return entry
        if record.signer not in self._signers and len(self._signers) >= self.config.signers_max:
            raise RecordRefused("signers_full", f"already {len(self._signers)} signers are held")
        if self._bytes + len(entry.data) > self.config.bytes_max:
            raise RecordRefused("view_full", f"already {self._bytes} bytes are held")
        return entry

    def _put(self, entry: _Entry) -> _Entry | None:
        """File `entry`; returns what it replaced."""
        record = entry.record
        signer = self._signers.get(record.signer)
        if signer is None:
            signer = self._signers[record.signer] = _Signer(hash64(record.signer.encode()))
        old = signer.entries.get(record.key)
        signer.entries[record.key] = entry
        grown = len(entry.data) - (len(old.data) if old else 0)
        signer.bytes += grown
        self._bytes += grown
        signer.changed()
        return old

    def _drop(self, entry: _Entry) -> None:
        signer = self._signers[entry.record.signer]
        del signer.entries[entry.record.key]
        signer.bytes -= len(entry.data)
        self._bytes -= len(entry.data)
        signer.changed()
        if not signer.entries:
            del self._signers[entry.record.signer]

    def _trim(self, name: PeerId) -> list[_Entry]:
        """Keep the longest run of newest entries within the signer's share; drop and return all older ones.

        Rank is by seq, which a signer never reuses across its keys, so what was dropped stays dominated.
        """
        signer = self._signers[name]
        config = self.config
        if (
            len(signer.entries) <= config.records_per_signer_max
            and signer.bytes <= config.bytes_per_signer_max
        ):
            return []
        size = 0
        out: list[_Entry] = []
        for index, entry in enumerate(sorted(signer.entries.values(), key=lambda e: e.rank, reverse=True)):
            size += len(entry.data)
            if index >= config.records_per_signer_max or size > config.bytes_per_signer_max:
                out.append(entry)
        for entry in out:
            self._drop(entry)
        self.counts["over_share"] += len(out)
        return out

    def _bounded(self, entries: list[_Entry], pivot: int) -> tuple[Record, ...]:
        """By signer from `pivot`, newest first; cut at `delta_bytes_max`, but never empty for something."""
        size = 0
        out: list[Record] = []
        newest = sorted(entries, key=lambda e: e.rank, reverse=True)
        for entry in sorted(newest, key=lambda e: (self._signers[e.record.signer].id - pivot) & _MASK):
            size += len(entry.data)
            if out and size > self.config.delta_bytes_max:
                break
            out.append(entry.record)
        return tuple(out)

    def _scoped(self, scope: frozenset[int], now_s: float) -> Iterator[_Entry]:
        for signer in self._signers.values():
            if signer.id in scope:
                yield from signer.live(now_s)

    def _live(self, now_s: float) -> Iterator[Record]:
        for signer in self._signers.values():
            yield from (entry.record for entry in signer.live(now_s))

    def _holds(self, entry: _Entry) -> bool:
        return self._entry(entry.record.key) is entry

    def _entry(self, key: Key) -> _Entry | None:
        signer = self._signers.get(key[2])
        return None if signer is None else signer.entries.get(key)
