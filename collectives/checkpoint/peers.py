"""Copies of a state among peers: pieces are placed on holders, and the state is made again from any k of them.

A holder checks every piece against the signed description, and so does whoever fetches: who sends something else, has
lost its piece or falls silent is named and done without. It does not know when a copy is worth making.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from collectives.checkpoint.copies import (
    DESCRIPTION_BYTES_MAX,
    STRIPE_BYTES,
    STRIPE_BYTES_MAX,
    Cutter,
    Description,
    Held,
    Joiner,
    Pantry,
    decode_description,
)
from collectives.errors import BadContribution, CheckpointProblem, PiecesLost, ResourceLimit
from collectives.state import Snapshot
from p2p import Call, CallFailed, Identity, Method, P2pError, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.checkpoint")
COPIES_TOLD_MAX = 64
ASK_S = 5.0
PIECE_S = 30.0
STRIPES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class OpenPiece:
    """I give you piece `index` of this copy, stripe by stripe."""

    description: bytes
    index: int


@dataclass(frozen=True, slots=True)
class PutPiece:
    digest: bytes
    index: int
    stripe: int
    data: Tensor


@dataclass(frozen=True, slots=True)
class ClosePiece:
    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Kept:
    """`whole`: nothing more is needed."""

    whole: bool


@dataclass(frozen=True, slots=True)
class AskCopies:
    """Which copies of this run have you whole pieces of? `name` "" means any."""

    run: str
    name: str


@dataclass(frozen=True, slots=True)
class CopyLine:
    name: str
    epoch: int
    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Copies:
    lines: tuple[CopyLine, ...]


@dataclass(frozen=True, slots=True)
class AskDescription:
    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Described:
    encoded: bytes


@dataclass(frozen=True, slots=True)
class AskPiece:
    digest: bytes
    index: int
    stripe: int


@dataclass(frozen=True, slots=True)
class Piece:
    data: Tensor


OPEN = Method(
    "collectives/copy/open",
    OpenPiece,
    Kept,
    body_bytes_max=DESCRIPTION_BYTES_MAX,
    deadline_s=60.0,
    lane="bulk",
)
PUT = Method(
    "collectives/copy/put", PutPiece, Kept, body_bytes_max=4096, payload_bytes_max=STRIPE_BYTES_MAX,
    deadline_s=PIECE_S, lane="bulk",
)  # fmt: skip
CLOSE = Method("collectives/copy/close", ClosePiece, Kept, deadline_s=60.0)
LIST = Method("collectives/copy/list", AskCopies, Copies, deadline_s=ASK_S)
DESCRIBE = Method(
    "collectives/copy/describe", AskDescription, Described, body_bytes_max=DESCRIPTION_BYTES_MAX,
    deadline_s=60.0, lane="bulk",
)  # fmt: skip
GET = Method(
    "collectives/copy/get", AskPiece, Piece, body_bytes_max=4096, payload_bytes_max=STRIPE_BYTES_MAX,
    deadline_s=PIECE_S, lane="bulk",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """Who holds a piece of the copy now, and why others do not."""

    epoch: int
    k: int
    held: tuple[str, ...]
    without: Mapping[str, str]

    @property
    def enough(self) -> bool:
        return len(self.held) >= self.k


@dataclass(frozen=True, slots=True)
class Restored:
    """`bad`: which holders lied or had nothing, and was done without."""

    snapshot: Snapshot
    meta: dict[str, Any]
    description: Description
    bad: Mapping[str, str] = field(default_factory=dict)


class CopyService:
    """One a node: answers for its `pantry`, places copies and makes states of them."""

    def __init__(self, rpc: Rpc, identity: Identity, pantry: Pantry) -> None:
        self.pantry = pantry
        self.me = str(identity.peer_id)
        self._rpc = rpc
        self._identity = identity
        rpc.serve(OPEN, self._open)
        rpc.serve(PUT, self._put)
        rpc.serve(CLOSE, self._close)
        rpc.serve(LIST, self._list)
        rpc.serve(DESCRIBE, self._describe)
        rpc.serve(GET, self._get)

    # ---- to place

    async def place(
        self,
        run: str,
        name: str,
        snapshot: Snapshot,
        meta: Mapping[str, Any],
        holders: Sequence[str],
        k: int | None = None,
        stripe_bytes: int = STRIPE_BYTES,
    ) -> Placed:
        """A piece of the snapshot to each holder (this node may be one); any `k` of them, half by default, will do.
        Slow holders set the pace, those that fail are left out."""
        holders = tuple(holders)
        k = max(1, len(holders) // 2) if k is None else k
        cutter = Cutter(self._identity, run, name, snapshot, meta, holders, k, stripe_bytes)
        description = await trio.to_thread.run_sync(cutter.describe)
        digest, encoded = description.digest(), description.encode()
        without: dict[str, str] = {}
        whole: set[str] = set()

        async def give(holder: str, method: Any, ask: Any) -> None:
            try:
                answer = await self._give(holder, method, ask)
            except (P2pError, ResourceLimit, CheckpointProblem, BadContribution) as problem:
                log.info("%s takes no piece of the copy of %s: %s", holder, run, problem)
                without[holder] = str(problem)
            else:
                if answer.whole:
                    whole.add(holder)

        def waiting() -> list[tuple[int, str]]:
            return [(i, h) for i, h in enumerate(holders) if h not in without and h not in whole]

        async with trio.open_nursery() as nursery:
            for index, holder in enumerate(holders):
                nursery.start_soon(give, holder, OPEN, OpenPiece(encoded, index))
        pieces = cutter.pieces()
        for stripe in range(description.stripes):
            if not waiting():
                break
            made = await trio.to_thread.run_sync(next, pieces)
            async with trio.open_nursery() as nursery:
                for index, holder in waiting():
                    data = Tensor("uint8", (len(made[index]),), made[index])
                    nursery.start_soon(give, holder, PUT, PutPiece(digest, index, stripe, data))
        async with trio.open_nursery() as nursery:
            for index, holder in waiting():
                nursery.start_soon(give, holder, CLOSE, ClosePiece(digest, index))
        return Placed(snapshot.epoch, k, tuple(h for h in holders if h in whole), without)

    async def _give(self, holder: str, method: Any, ask: Any) -> Kept:
        if holder != self.me:
            answer: Kept = await self._rpc.call(holder, method, ask)
            return answer
        if isinstance(ask, OpenPiece):
            return await self._opened(self.me, ask)
        if isinstance(ask, PutPiece):
            return await self._taken(self.me, ask)
        return await self._closed(self.me, ask)

    # ---- to make it again

    async def copies(self, run: str, peers: Sequence[str], name: str = "") -> dict[str, tuple[CopyLine, ...]]:
        """What each peer that answers says it holds, this node included."""
        found = {self.me: self._lines(run, name)}

        async def ask(peer: str) -> None:
            try:
                found[peer] = (await self._rpc.call(peer, LIST, AskCopies(run, name))).lines
            except P2pError as problem:
                log.info("%s does not say what it holds of %s: %s", peer, run, problem)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                if peer != self.me:
                    nursery.start_soon(ask, peer)
        return {peer: lines[:COPIES_TOLD_MAX] for peer, lines in found.items()}

    async def restore(
        self, run: str, name: str, peers: Sequence[str], *, epoch_min: int = 0, bytes_max: int = 1 << 40
    ) -> Restored:
        """The newest state of which enough pieces are to be had. Raises PiecesLost, naming who lied."""
        holders: dict[bytes, dict[str, int]] = {}
        epochs: dict[bytes, int] = {}
        for peer, lines in (await self.copies(run, peers, name)).items():
            for line in lines:
                if line.name == name and line.epoch >= epoch_min:
                    holders.setdefault(line.digest, {})[peer] = line.index
                    epochs[line.digest] = max(epochs.get(line.digest, 0), line.epoch)
        bad: dict[str, str] = {}
        for digest in sorted(holders, key=lambda one: (-epochs[one], one)):
            fetch = _Fetch(self, run, name, digest, holders[digest], bad, bytes_max)
            try:
                snapshot, description = await fetch.run()
                return Restored(snapshot, json.loads(description.meta), description, bad)
            except (PiecesLost, BadContribution, ValueError) as problem:
                log.info("a copy of %s cannot be made whole: %s", run, problem)
        raise PiecesLost(f"no copy of {name!r} of the run {run!r} can be made from {len(peers)} peers", bad)

    async def piece(self, peer: str, digest: bytes, index: int, stripe: int) -> bytes | memoryview:
        """A piece of a stripe, unchecked. Raises P2pError, BadContribution."""
        if peer != self.me:
            return (await self._rpc.call(peer, GET, AskPiece(digest, index, stripe))).data.data
        one = self.pantry.get(digest, index)
        part = None if one is None else one.part(stripe)
        if part is None:
            raise BadContribution(peer, "mismatch", "it is not here any more")
        return part

    async def description(self, peer: str, digest: bytes, index: int) -> Description:
        """Of a copy that `peer` has a piece of, checked. Raises P2pError, BadContribution."""
        if peer == self.me:
            one = self.pantry.get(digest, index)
            if one is None:
                raise BadContribution(peer, "mismatch", "it is not here any more")
            return one.description
        ask = AskDescription(digest, index)
        found = decode_description((await self._rpc.call(peer, DESCRIBE, ask)).encoded, peer)
        if found.digest() != digest:
            raise BadContribution(peer, "mismatch", f"{peer} described another copy")
        return found

    # ---- served

    async def _open(self, call: Call, ask: OpenPiece) -> Kept:
        return await self._answer(self._opened, call, ask)

    async def _put(self, call: Call, ask: PutPiece) -> Kept:
        return await self._answer(self._taken, call, ask)

    async def _close(self, call: Call, ask: ClosePiece) -> Kept:
        return await self._answer(self._closed, call, ask)

    async def _answer(self, work: Any, call: Call, ask: Any) -> Kept:
        try:
            kept: Kept = await work(str(call.peer), ask)
        except (ResourceLimit, CheckpointProblem) as problem:
            raise RpcRefusal("full", str(problem)) from None
        except BadContribution as problem:
            raise RpcRefusal("bad", str(problem)) from None
        return kept

    async def _opened(self, peer: str, ask: OpenPiece) -> Kept:
        description = decode_description(ask.description, peer)
        index = ask.index
        if description.owner != peer or not 0 <= index < len(description.holders):
            raise BadContribution(peer, "mismatch", "this piece is not yours to give")
        if description.holders[index] != self.me:
            raise BadContribution(peer, "mismatch", "this piece is for another holder")
        await trio.lowlevel.checkpoint()
        return Kept(self.pantry.open(description, index).whole)

    async def _taken(self, peer: str, ask: PutPiece) -> Kept:
        one = self._mine(peer, ask.digest, ask.index)
        if not 0 <= ask.stripe < one.description.stripes:
            raise BadContribution(peer, "mismatch", "there is no such stripe")
        put = partial(self.pantry.put, one, ask.stripe, bytes(ask.data.data))
        if not await trio.to_thread.run_sync(put):
            raise BadContribution(peer, "mismatch", "this is not the piece that was described")
        return Kept(one.whole)

    async def _closed(self, peer: str, ask: ClosePiece) -> Kept:
        one = self._mine(peer, ask.digest, ask.index)
        if not one.whole:
            try:
                await trio.to_thread.run_sync(self.pantry.close, one)
            except CheckpointProblem:
                self.pantry.drop(one)
                raise
        return Kept(True)

    def _mine(self, peer: str, digest: bytes, index: int) -> Held:
        one = self.pantry.get(digest, index)
        if one is None or one.description.owner != peer:
            raise BadContribution(peer, "mismatch", "this piece was not announced")
        return one

    async def _list(self, call: Call, ask: AskCopies) -> Copies:
        await trio.lowlevel.checkpoint()
        return Copies(self._lines(ask.run, ask.name))

    def _lines(self, run: str, name: str) -> tuple[CopyLine, ...]:
        held = self.pantry.held(run, name or None)[:COPIES_TOLD_MAX]
        return tuple(CopyLine(h.description.name, h.description.epoch, h.digest, h.index) for h in held)

    async def _describe(self, call: Call, ask: AskDescription) -> Described:
        await trio.lowlevel.checkpoint()
        return Described(self._whole(ask.digest, ask.index).description.encode())

    async def _get(self, call: Call, ask: AskPiece) -> Piece:
        one = self._whole(ask.digest, ask.index)
        if not 0 <= ask.stripe < one.description.stripes:
            raise RpcRefusal("absent", "there is no such stripe")
        try:
            part = await trio.to_thread.run_sync(one.part, ask.stripe)
        except OSError as error:
            raise RpcRefusal("absent", f"the piece cannot be read: {error.strerror}") from None
        if part is None or not one.description.is_piece(one.index, ask.stripe, part):
            self.pantry.drop(one)  # the disk has lost it: it is not offered again
            raise RpcRefusal("absent", "the piece is not whole any more")
        return Piece(Tensor("uint8", (len(part),), part))

    def _whole(self, digest: bytes, index: int) -> Held:
        one = self.pantry.get(digest, index)
        if one is None or not one.whole:
            raise RpcRefusal("absent", "this piece is not kept here")
        return one


class _Fetch:
    """One copy being made whole. `bad` is added to."""

    def __init__(
        self,
        service: CopyService,
        run: str,
        name: str,
        digest: bytes,
        holders: Mapping[str, int],
        bad: dict[str, str],
        bytes_max: int,
    ) -> None:
        self._service, self._run, self._name = service, run, name
        self._digest, self._holders = digest, dict(holders)
        self._bad, self._bytes_max = bad, bytes_max

    async def run(self) -> tuple[Snapshot, Description]:
        description = await self._description()
        joiner = Joiner(description)
        for first in range(0, description.stripes, STRIPES_AT_ONCE):
            window = range(first, min(first + STRIPES_AT_ONCE, description.stripes))
            found: dict[int, Any] = {}

            async def fetch(stripe: int, found: dict[int, Any] = found) -> None:
                found[stripe] = await self._stripe(description, stripe)

            async with trio.open_nursery() as nursery:
                for stripe in window:
                    nursery.start_soon(fetch, stripe)
            for stripe in window:
                if found[stripe] is None:
                    raise PiecesLost(
                        f"{description.k} pieces are needed and {len(self._good(description))} are left",
                        self._bad,
                    )
                joiner.feed(await trio.to_thread.run_sync(_decoded, description, found[stripe], stripe))
        return await trio.to_thread.run_sync(joiner.finish), description

    async def _description(self) -> Description:
        for peer, index in sorted(self._holders.items()):
            try:
                found = await self._service.description(peer, self._digest, index)
            except (P2pError, BadContribution) as problem:
                self._blame(peer, problem)
                continue
            if (found.run, found.name) != (self._run, self._name) or found.nbytes > self._bytes_max:
                raise PiecesLost(f"{peer} holds another copy, or one of {found.nbytes} bytes")
            return found
        raise PiecesLost("nobody describes the copy", self._bad)

    def _good(self, description: Description) -> dict[int, str]:
        """A holder for each piece, of those that were never caught."""
        return {
            index: peer
            for peer, index in sorted(self._holders.items())
            if peer not in self._bad and 0 <= index < len(description.holders)
        }

    async def _stripe(self, description: Description, stripe: int) -> dict[int, bytes | memoryview] | None:
        """k pieces of a stripe, checked; None when there are not enough holders left."""
        pieces: dict[int, bytes | memoryview] = {}

        async def get(index: int, peer: str) -> None:
            try:
                data = await self._service.piece(peer, self._digest, index, stripe)
            except (P2pError, BadContribution, OSError) as problem:
                self._blame(peer, problem)
                return
            if description.is_piece(index, stripe, data):
                pieces[index] = data
            else:
                self._blame(peer, ValueError("it sent a wrong piece"))

        while len(pieces) < description.k:
            good = {i: peer for i, peer in self._good(description).items() if i not in pieces}
            wanted = sorted(good)[: description.k - len(pieces)]
            if len(wanted) < description.k - len(pieces):
                return None
            async with trio.open_nursery() as nursery:
                for index in wanted:
                    nursery.start_soon(get, index, good[index])
        return pieces

    def _blame(self, peer: str, problem: Exception) -> None:
        if isinstance(problem, CallFailed) and problem.code == "busy":
            problem = ValueError("it was busy")
        log.warning("%s is done without: %s", peer, problem)
        self._bad[peer] = str(problem)


def _decoded(description: Description, pieces: Mapping[int, Any], stripe: int) -> memoryview:
    return description.code.decode(pieces, description.stripe_size(stripe)).data
