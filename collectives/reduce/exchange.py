"""A reduction from one member's point of view: frames in, frames out, tensors at the end. No I/O, no clock.

`Exchange` routes: which frame goes to whom next, what an arriving one is good for, and what changes when the
membership does. Adding up is Collector's business, bytes are the codecs', who owns what is the plan's.

How a shell drives it, from one thread at a time:

- For each peer of `peers` one writer: `next_frame(peer)` until None, then wait until `woken()` names the peer. Asking
  for the next frame says that the last one has left: its payload may be memory that is about to be written.
- For each peer one reader: while `wants_frames(peer)`, read; `buffer_for` gives the payload's buffer; `arrived` takes
  the frame, payload included (it owns that memory). After each, look at `woken()`, `refused` and `done`. The buffer may
  be memory of the result: before `rebase` and `close` see to it that nothing is written to buffers given before.
- When a link breaks, `dropped(peer)`; when there is a new one, `relinked(peer)` on both sides.
- When the membership changes, `rebase(declaration)`. Frames of the past are ignored, those of the future asked for.
- `done` says that the whole result is here; others may still need frames: go on until `drained`, at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from blake3 import blake3

from collectives.agreement import Declaration
from collectives.codecs import Codec, CodecFault, codec
from collectives.reduce.collect import Collector, leaf_of
from collectives.reduce.combine import SUM_SLAB
from collectives.reduce.contribution import Contribution, encoded
from collectives.reduce.errors import FrameRefused, MisuseError
from collectives.reduce.feedback import Feedback
from collectives.reduce.frames import (
    IDENT_MASK,
    KEY_BYTES,
    Frame,
    Header,
    Kind,
    frame_of,
    header_of,
    pack_wants,
    unpack_wants,
    want_bytes,
)
from collectives.reduce.hold import BufferPool, Hold, Source
from collectives.reduce.layout import Layout
from collectives.reduce.outbox import Outbox, Traffic
from collectives.reduce.plan import ReducePlan, plan_reduce
from collectives.reduce.result import HASH_BYTES, Result
from collectives.reduce.robust import outliers
from collectives.reduce.settings import DEFAULTS, ExchangeSettings

SLAB_BYTES = 2 * 1024 * 1024


class Exchange:
    """`tensors` (any dtype, device, contiguity) are read, never written. LayoutError, PlanError, UnknownCodec."""

    def __init__(
        self,
        me: str,
        tensors: Sequence[torch.Tensor],
        declaration: Declaration,
        settings: ExchangeSettings = DEFAULTS,
        *,
        layout: Layout | None = None,
        out: Sequence[torch.Tensor] | None = None,
        feedback: Feedback | None = None,
        beside_bytes: int = 0,
    ) -> None:
        """`beside_bytes`: what links and others keep in memory for this reduction, of its allowance."""
        self.me = me
        self._beside_bytes = beside_bytes
        self.settings = settings
        self.layout = layout if layout is not None else Layout.of(tensors)
        self.codec: Codec = codec(declaration.codec)
        self.result = Result(self.layout, tensors, out)
        self._chunk_bytes = self.codec.bytes_for(min(self.layout.chunk_elements, self.layout.elements))
        slab_bytes = SLAB_BYTES if self.layout.tensor_bytes >= 16 * SLAB_BYTES else 0
        pool = BufferPool(self._chunk_bytes, max(1, slab_bytes // max(1, self._chunk_bytes)))
        self._hold = Hold(pool, self._budget(len(declaration.members)))
        self._own = Contribution(self.layout, tensors, self.codec, feedback)
        self._collector = Collector(self.layout, self.codec, self._hold, self._own, settings)
        self._work = np.empty(min(self.layout.chunk_elements, self.layout.elements), np.float32)
        self.traffic = Traffic()  # with all peers, those of before included
        self._boxes: dict[str, Outbox] = {}
        self._past: set[bytes] = set()
        self._strangers_ok: set[str] = set()
        self._encoded: dict[int, memoryview] = {}
        self._given: dict[int, bytes] = {}
        self._later: dict[int, Callable[[], None]] = {}
        self._placed: dict[int, object] = {}
        self._woken: set[str] = set()
        self._adopt(declaration)

    # What the shell asks.

    @property
    def plan(self) -> ReducePlan:
        """The present plan."""
        return self._plan

    @property
    def declaration(self) -> Declaration:
        """The present declaration."""
        return self._declaration

    @property
    def peers(self) -> tuple[str, ...]:
        """The other members that frames go to or come from."""
        return tuple(self._boxes)

    @property
    def done(self) -> bool:
        """The whole result is here."""
        return self.result.done

    @property
    def drained(self) -> bool:
        """Nothing is left to send for now."""
        return all(box.empty() for box in self._boxes.values())

    @property
    def digest(self) -> bytes:
        """Of the result; MisuseError before `done`."""
        return self.result.digest

    @property
    def refused(self) -> dict[str, str]:
        """Members whose contributions cannot be used, and why: nonfinite, norm, mismatch. Without a rebase that leaves
        them out this exchange cannot finish."""
        return self._collector.refused

    @property
    def lacks_inputs(self) -> bool:
        """Whether this member itself waits for contributions, not only for results that others make."""
        return bool(self._collector.missing())

    @property
    def weights(self) -> dict[str, float]:
        """What each member weighs, after caps."""
        return {member.peer: member.weight for member in self._members}

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed out, all peers together."""
        return self.traffic.bytes_out

    @property
    def bytes_received(self) -> int:
        """Payload bytes taken in."""
        return self.traffic.bytes_in

    @property
    def held_bytes(self) -> int:
        """Bytes of others' contributions in memory."""
        return self._hold.bytes

    def progress(self, peer: str) -> tuple[int, int]:
        """(frames received from, payload bytes handed out for) `peer`: marks for the failure detector."""
        box = self._boxes[peer]
        return box.frames_in, box.bytes_out

    def woken(self) -> frozenset[str]:
        """Peers for whom there are new frames since this was last asked."""
        woken = frozenset(self._woken)
        self._woken.clear()
        return woken

    def wants_frames(self, peer: str) -> bool:
        """Whether to read from `peer` now: not from those who are ahead while memory is short."""
        return self._hold.has_room(peer) or self._collector.lags(peer)

    def waiting_for(self) -> frozenset[str]:
        """Whose contributions are lacking here, but for those who are not read from now; if none, those who owe
        results. Empty if done."""
        lacking = {peer for peer in self._collector.missing() if self.wants_frames(peer)}
        if not lacking:
            owed = [chunk for chunk in range(self.layout.chunks) if not self.result.has(chunk)]
            lacking = {self._members[self._giver(chunk)].peer for chunk in owed}
        return frozenset(lacking - {self.me})

    # Frames.

    def next_frame(self, peer: str) -> Frame | None:
        """The next frame for `peer`, or None. NonFinite if the caller's own values cannot be encoded."""
        box = self._boxes[peer]
        self._unpin(box)
        frame = self._pick(box, peer)
        if frame is not None:
            box.bytes_out += frame.payload_bytes
            self.traffic.bytes_out += frame.payload_bytes
        return frame

    def _pick(self, box: Outbox, peer: str) -> Frame | None:
        if box.wants is not None:
            payload = pack_wants(self.layout.chunks, *box.wants)
            box.wants = None
            return frame_of(Kind.WANT, 0, 0, self._key, [memoryview(payload)])
        while box.results:
            chunk = next(iter(box.results))
            del box.results[chunk]
            if self.result.has(chunk):
                return frame_of(Kind.RESULT, chunk, 0, self._key, [self._result_payload(box, chunk)])
        while box.partials:
            chunk = next(iter(box.partials))
            del box.partials[chunk]
            source = self._collector.partial(self._unit, chunk)
            out = np.empty(self.layout.size(chunk), np.float32)
            if self._collector.total(chunk, out):
                box.partials_sent.add((chunk, source.ident))
                payload_view = encoded(self.codec.result, out)
                return frame_of(Kind.PARTIAL, chunk, source.ident, self._key, [payload_view])
        if box.leaves:
            chunk = next(iter(box.leaves))
            del box.leaves[chunk]
            box.leaves_sent.add(chunk)
            return frame_of(Kind.LEAF, chunk, self._nonce, self._key, [self.contribution(chunk)])
        return None

    def buffer_for(self, peer: str, header: bytes | memoryview, payload_bytes: int) -> memoryview:
        """Where the payload of an arriving frame may go. FrameRefused before anything is allocated."""
        head = header_of(peer, header)
        if self._check(peer, head, payload_bytes) and head.kind == Kind.RESULT and head.key == self._key:
            place = self._place(peer, head.chunk)
            if place is not None:
                return place
        self._hold.arrives(peer, payload_bytes)
        return self._hold.pool.take(payload_bytes)

    def _place(self, peer: str, chunk: int) -> memoryview | None:
        """Where a result's bytes are the values themselves they go to where they belong, and are not copied."""
        if (
            self.codec.result.relative_error
            or self.result.has(chunk)
            or chunk in self._later
            or self._pinned(chunk)
            or self._members[self._giver(chunk)].peer != peer
        ):
            return None
        direct = self.result.vector.direct(*self.layout.span(chunk))
        if direct is None:
            return None
        place = self._placed[chunk] = direct.view(np.uint8)
        return place.data

    def arrived(self, peer: str, header: bytes | memoryview, payload: memoryview) -> None:
        """Takes a frame. FrameRefused if no honest member would send it."""
        self._hold.arrives(peer, 0)
        head = header_of(peer, header)
        known = self._check(peer, head, payload.nbytes)
        if not known:
            self._hold.pool.give(payload)
            return
        box = self._boxes[peer]
        box.frames_in += 1
        self.traffic.bytes_in += payload.nbytes
        match head.kind:
            case Kind.WANT:
                self._wanted(box, peer, head, payload)
                self._hold.pool.give(payload)
            case Kind.RESULT:
                self._take_result(box, peer, head, payload)
            case Kind.LEAF | Kind.PARTIAL:
                source = Source(head.kind == Kind.PARTIAL, peer, head.ident)
                if not self._collector.expects(source):
                    raise FrameRefused(peer, "flood", "values under too many names")
                if self._collector.accept(source, head.chunk, payload):
                    self._collected(head.chunk)

    def _check(self, peer: str, head: Header, payload_bytes: int) -> bool:
        """Whether the sender is a member; FrameRefused for frames that nobody may send."""
        if peer not in self._boxes and peer not in self._strangers_ok:
            raise FrameRefused(peer, "stranger", "not a member of this reduction")
        if head.kind == Kind.WANT:
            limit, exact = want_bytes(self.layout.chunks), True
        elif head.chunk >= self.layout.chunks:
            raise FrameRefused(peer, "malformed", f"chunk {head.chunk} of {self.layout.chunks}")
        else:
            kind = self.codec if head.kind == Kind.LEAF else self.codec.result
            limit, exact = kind.bytes_for(self.layout.size(head.chunk)), kind.fixed
        if payload_bytes > limit or (exact and payload_bytes != limit):
            raise FrameRefused(
                peer, "size", f"{head.kind.name} of chunk {head.chunk}: {payload_bytes} bytes, not {limit}"
            )
        return peer in self._boxes

    # What happens to chunks.

    def _collected(self, chunk: int) -> None:
        """Everything for `chunk` is here."""
        root = self._plan.root(chunk)
        if root != self._number:
            self._queue_partial(self._members[root].peer, chunk)
        elif self._pinned(chunk):
            self._later[chunk] = lambda: self._make_result(chunk)
        else:
            self._make_result(chunk)

    def _queue_partial(self, peer: str, chunk: int) -> None:
        box = self._boxes[peer]
        if (chunk, self._collector.partial(self._unit, chunk).ident) in box.partials_sent:
            self._collector.settle(chunk)
        elif self._collector.sound(
            chunk
        ):  # now, and not when it is sent, so that `arrived` shows who is to blame
            box.partials[chunk] = None
            self._woken.add(peer)

    def _make_result(self, chunk: int) -> None:
        start, end = self.layout.span(chunk)
        direct = self.result.vector.direct(start, end)
        out = direct if direct is not None else self._work[: end - start]
        if not self._collector.mean(chunk, out):
            return
        final = self.codec.result
        if final.relative_error == 0:
            self.result.put(chunk, None if direct is not None else out)
        else:
            data = encoded(final, out)
            final.decode(data, end - start, torch.from_numpy(out))
            self.result.put(chunk, None if direct is not None else out)
            if not final.stable:
                self._encoded[chunk] = data
        self._spread(chunk)

    def _spread(self, chunk: int) -> None:
        """Queues the result of `chunk` for those who get it from this member."""
        for number in self._takers(chunk):
            peer = self._members[number].peer
            self._boxes[peer].results[chunk] = None
            self._woken.add(peer)

    def _takers(self, chunk: int) -> list[int]:
        plan, me = self._plan, self._number
        takers: list[int] = []
        if plan.root(chunk) == me:
            for unit, numbers in enumerate(plan.units):
                takers += numbers if unit == self._unit else [plan.head(unit, chunk)]
        elif plan.head(self._unit, chunk) == me:
            takers = list(plan.units[self._unit])
        return [number for number in takers if number != me]

    def _giver(self, chunk: int) -> int:
        """From whom this member gets the result of `chunk`."""
        plan = self._plan
        root = plan.root(chunk)
        head = plan.head(self._unit, chunk)
        return root if head == self._number or plan.unit_of[root] == self._unit else head

    def _take_result(self, box: Outbox, peer: str, head: Header, payload: memoryview) -> None:
        if head.key != self._key:
            if head.key not in self._past and (head.key in box.early or len(box.early) < 4):
                box.early.setdefault(head.key, set()).add(head.chunk)
            self._hold.pool.give(payload)
            return
        chunk = head.chunk
        giver = self._members[self._giver(chunk)].peer
        if peer != giver:
            raise FrameRefused(peer, "unwanted", f"the result of chunk {chunk} comes from {giver}")
        if self.result.has(chunk) or chunk in self._later:
            self._hold.pool.give(payload)
        elif self._pinned(chunk):
            self._later[chunk] = lambda: self._apply(peer, chunk, payload)
        else:
            self._apply(peer, chunk, payload)

    def _apply(self, peer: str, chunk: int, payload: memoryview) -> None:
        size = self.layout.size(chunk)
        final = self.codec.result
        start, end = self.layout.span(chunk)
        direct = self.result.vector.direct(start, end)
        out = direct if direct is not None else self._work[:size]
        if payload.obj is not self._placed.pop(chunk, None):
            try:
                final.decode(payload, size, torch.from_numpy(out))
            except CodecFault:
                self._collector.refused[peer] = "mismatch"
                return
        self.result.put(chunk, None if direct is not None else out)
        if self.settings.audit:
            self._given[chunk] = blake3(payload).digest()
        takers = self._takers(chunk)
        if takers and not final.stable:
            self._encoded[chunk] = memoryview(bytes(payload))
        self._hold.pool.give(payload)
        if takers:
            self._spread(chunk)

    def _result_payload(self, box: Outbox, chunk: int) -> memoryview:
        exact = self.codec.result.relative_error == 0
        if exact and self.result.vector.direct(*self.layout.span(chunk)) is not None:
            box.pinned = chunk
        return self._encoded_result(chunk)

    def _encoded_result(self, chunk: int) -> memoryview:
        kept = self._encoded.get(chunk)
        if kept is not None:
            return kept
        return encoded(self.codec.result, self.result.vector.read(*self.layout.span(chunk)))

    # For audits.

    def contribution(self, chunk: int) -> memoryview:
        """What this member gives of `chunk`, encoded: the same bytes whenever it is asked."""
        return self._own.encoded(chunk)

    def roots(self) -> dict[str, list[int]]:
        """The chunks that each member makes the result of, rising; only those who make any."""
        return {
            member.peer: chunks
            for number, member in enumerate(self._members)
            if (chunks := np.flatnonzero(self._plan.roots == number).tolist())
        }

    def given_hashes(self, peer: str) -> bytes:
        """With `audit`, 32 bytes for each chunk that `peer` is root of: of the results it gave to this member, encoded.
        MisuseError before they are there."""
        chunks = self.roots().get(peer, [])
        if not all(chunk in self._given for chunk in chunks):
            raise MisuseError(f"results of {peer} are missing")
        return b"".join([self._given[chunk] for chunk in chunks])

    def result_hashes(self) -> bytes:
        """32 bytes for each chunk this member is root of: of the results it gave out, encoded. MisuseError before they
        are there."""
        roots = np.flatnonzero(self._plan.roots == self._number).tolist()
        if not all(self.result.has(chunk) for chunk in roots):
            raise MisuseError("results that this member is to make are missing")
        return b"".join([blake3(self._encoded_result(chunk)).digest() for chunk in roots])

    # When things change.

    def rebase(self, declaration: Declaration) -> None:
        """Goes on under another declaration of the same round with what is held. MisuseError if this member is not in
        it with the same nonce, or if its codec is another one."""
        if declaration.codec != self.codec.name:
            raise MisuseError(f"the codec changed from {self.codec.name} to {declaration.codec}")
        member = declaration.member(self.me)
        if member is None or member.nonce & IDENT_MASK != self._nonce:
            raise MisuseError(f"{self.me} is not in the new declaration with the values it has offered")
        self._past.add(self._key)
        self.result.begin()
        for chunks in (self._encoded, self._given, self._later, self._placed):
            chunks.clear()
        self._adopt(declaration)

    def dropped(self, peer: str) -> None:
        """The link to `peer` is gone; its last frame is not being sent any more, and none is coming."""
        self._hold.arrives(peer, 0)
        box = self._boxes.get(peer)
        if box is not None:
            self._unpin(box)

    def relinked(self, peer: str) -> None:
        """There is a new link to `peer`, and what was under way is lost: asks for all that is lacking."""
        leaves, partials = self._collector.missing().get(peer, (set(), set()))
        results = {
            chunk
            for chunk in range(self.layout.chunks)
            if not self.result.has(chunk) and self._members[self._giver(chunk)].peer == peer
        }
        self._want(peer, leaves, partials, results)

    def committed(self, peer: str, hashes: bytes) -> None:
        """With `audit`: the hashes of `peer`'s contribution, chunk by chunk, as it has signed them. Its values are not
        added up before. Nothing is done if they are known already: the first ones count."""
        if len(hashes) != HASH_BYTES * self.layout.chunks:
            raise FrameRefused(peer, "size", f"{len(hashes)} bytes of hashes for {self.layout.chunks} chunks")
        member = self._declaration.member(peer)
        if member is not None:
            for chunk in self._collector.commit(leaf_of(member), hashes):
                self._collected(chunk)

    def close(self) -> None:
        """Frees everything but the result."""
        self._hold.relax()
        self._hold.discard(())
        self._hold.pool.clear()
        self._encoded.clear()
        self._later.clear()
        self._placed.clear()
        self._work = self._work[:0].copy()
        self._own.close()
        self._boxes.clear()

    def _adopt(self, declaration: Declaration) -> None:
        settings = self.settings
        members = settings.weighed(declaration.members)
        effective = replace(declaration, members=members)
        layout = self.layout
        plan = plan_reduce(effective, layout.elements, layout.chunk_elements, flat=not settings.groups)
        if self.me not in plan.number:
            raise MisuseError(f"{self.me} is no member of the declaration")
        self._plan = plan
        self._declaration = declaration
        self._members = plan.members
        self._key = declaration.key[:KEY_BYTES]
        self._number = plan.number[self.me]
        self._unit = plan.unit_of[self._number]
        self._nonce = plan.members[self._number].nonce & IDENT_MASK
        before = self._boxes
        self._strangers_ok |= set(before)
        others = [member.peer for member in plan.members if member.peer != self.me]
        self._boxes = {peer: before.get(peer) or Outbox() for peer in others}
        for peer in before.keys() - self._boxes.keys():
            self._hold.arrives(peer, 0)
        self._hold.bytes_max = self._budget(len(plan.members))
        ready = self._collector.adopt(plan, self._number)
        self._set_norms(plan)
        self._queue_leaves()
        for peer, (leaves, partials) in self._collector.lost().items():
            self._want(peer, leaves, partials, set())
        for peer, box in self._boxes.items():
            early = box.early.pop(self._key, None)
            if early:
                self._want(peer, set(), set(), early)
        for chunk in ready:
            self._collected(chunk)
        self._woken.update(self._boxes)

    def _set_norms(self, plan: ReducePlan) -> None:
        settings = self.settings
        slack = 1 + 2 * self.codec.relative_error + settings.norm_slack
        claimed = {m.peer: m.norm for m in plan.members if m.norm > 0 or settings.norm_factor is not None}
        self._collector.norm_limits = {peer: norm * slack for peer, norm in claimed.items()}
        if settings.norm_factor is not None:
            for peer in outliers(claimed, settings.norm_factor) - {self.me}:
                self._collector.refused[peer] = "norm"

    def _queue_leaves(self) -> None:
        """Own values that nobody has been given yet, to whom the plan says."""
        for box in self._boxes.values():
            box.results.clear()
            box.partials.clear()
            box.leaves.clear()
        if self._members[self._number].weight == 0:
            return
        for chunk in range(self.layout.chunks):
            to = self._plan.leaf_to(self._number, chunk)
            if to != self._number:
                box = self._boxes[self._members[to].peer]
                if chunk not in box.leaves_sent:
                    box.leaves[chunk] = None

    def _want(self, peer: str, leaves: set[int], partials: set[int], results: set[int]) -> None:
        if not (leaves or partials or results):
            return
        box = self._boxes[peer]
        had = box.wants or (set(), set(), set())
        box.wants = (had[0] | leaves, had[1] | partials, had[2] | results)
        self._woken.add(peer)

    def _wanted(self, box: Outbox, peer: str, head: Header, payload: memoryview) -> None:
        """`peer` asks again."""
        box.asked += 1
        if box.asked > self.settings.wants_max:
            raise FrameRefused(peer, "flood", f"asked {box.asked} times for things it was sent")
        leaves, partials, results = unpack_wants(self.layout.chunks, payload)
        box.leaves.update(dict.fromkeys(leaves))
        # Whoever asks may know a later declaration: what it lost must not count as sent once that one comes here.
        box.leaves_sent.difference_update(leaves)
        lost = set(partials)
        box.partials_sent = {sent for sent in box.partials_sent if sent[0] not in lost}
        if head.key == self._key:
            for chunk in partials:
                self._wanted_partial(box, peer, chunk)
            takers = {chunk: self._takers(chunk) for chunk in results}
            number = self._plan.number[peer]
            box.results.update(
                dict.fromkeys(c for c in results if number in takers[c] and self.result.has(c))
            )
        self._woken.add(peer)

    def _wanted_partial(self, box: Outbox, peer: str, chunk: int) -> None:
        root, head = self._plan.root(chunk), self._plan.head(self._unit, chunk)
        if self._members[root].peer != peer or head != self._number or self._unit not in self._plan.heads:
            return
        if self._collector.again(chunk):
            self._queue_partial(peer, chunk)
        for other, (lost, _) in self._collector.lost().items():
            self._want(other, lost, set(), set())

    def _budget(self, members: int) -> int:
        """Bytes for others' contributions, those that are coming in included: what the result, links, encoded frames
        and scratch leave of the allowance, and never less than a chunk of everybody, which is what it takes to go on.
        More than about 30 members with tensors of less than some 100 MiB therefore need more than the allowance."""
        spare = int((self.settings.extra_ratio - 1) * self.layout.tensor_bytes)
        scratch = 4 * (4 * self.layout.chunk_elements + min(SUM_SLAB, self.layout.chunk_elements))
        sent = (members - 1) * self._chunk_bytes if self.codec.relative_error else 0
        return max(spare - self._beside_bytes - sent - scratch, members * self._chunk_bytes)

    def _pinned(self, chunk: int) -> bool:
        return any(box.pinned == chunk for box in self._boxes.values())

    def _unpin(self, box: Outbox) -> None:
        chunk, box.pinned = box.pinned, None
        if chunk is not None and chunk in self._later and not self._pinned(chunk):
            self._later.pop(chunk)()
