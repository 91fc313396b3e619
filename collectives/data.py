"""The bytes of one tag: an exchange at a time, its frames over data links, and the results that must stay servable.

One writer and one reader a link; a frame says which epoch it is of, so that what is early waits and what is late is
dropped. It does what the chain orders and tells it what came of it; it decides nothing.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from collectives.agreement import Ballot, Declaration, Event, Held, Reduced, Stuck, Value
from collectives.audit import Auditor
from collectives.config import RunConfig
from collectives.data_links import SERVICE, Claim, Purpose, introduce, window_for
from collectives.errors import CollectiveError, NonFinite, RemoteFault
from collectives.given import Input
from collectives.reduce import Exchange, FrameRefused, Result, Statement
from collectives.reduce.frames import KEY_BYTES
from collectives.reduce.layout import Layout
from collectives.reduce.memory import fresh
from collectives.reduce.outbox import Traffic
from collectives.values import RETRY_S, fetch_value, value_digest
from collectives.whole import Whole
from p2p import Link, P2pError

if TYPE_CHECKING:
    from collectives.run import Run
    from collectives.service import Collectives

log = logging.getLogger("shoal.collectives")

_EPOCH = struct.Struct("!Q")
_KEY_AT = 16
_LOOK_S = 0.25
_EARLY_WAIT_S = 0.5
_OPEN_WITHIN_S = 5.0
_OPEN_PAUSE_MAX_S = 1.0  # two that cannot dial one another, as clients cannot, try for nothing
UNSOLICITED_BYTES_MAX = 8 << 20
STALL_MIN_S = 2.0
FINISH_STALL_S = 1.0
KEYS_MAX = 1024


class _Line:
    """What is kept of one peer: the life of its link, if there is one, and when its frames came."""

    def __init__(self) -> None:
        self.scope: trio.CancelScope | None = None
        self.link: Link | None = None
        self.ended = trio.Event()
        self.kick = trio.Event()
        self.keeper = False
        self.marks = (0, 0)
        self.moved_s = -math.inf
        self.gap_s = 0.0

    def wake(self) -> None:
        self.kick.set()


class Plane:
    """One tag's. `run` must be running; `tell` takes events for the chain."""

    def __init__(self, service: Collectives, run: Run, tag: str) -> None:
        self.tell: Callable[[Event], None] = lambda event: None
        self.own_fault: Callable[[int, CollectiveError], None] = lambda nonce, error: None
        self._service = service
        self._config: RunConfig = run.config
        self._me = run.me
        self._run_id = run.run_id
        self._tag = tag
        self._uplink = run.uplink
        self._claim = Claim()
        self._input: Input | None = None
        self._exchange: Exchange | None = None
        self._epoch = 0
        self._ballot: Ballot | None = None
        self._reported = False
        self._began_s = 0.0
        self._wholes: dict[bytes, Whole] = {}
        self._fetches: dict[bytes, trio.CancelScope] = {}
        self._lines: dict[str, _Line] = {}
        self._linked: set[str] = set()
        self._touched: set[str] = set()  # frames of this epoch came from them, and may have been lost here
        self._keys: set[bytes] = set()  # of this epoch's declarations so far
        self._changed = trio.Event()
        self._gated = False
        self._finishing: Value | None = None
        self._whole_here = trio.Event()
        self._drained = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.auditor: Auditor | None = None
        if run.config.reduce.audit:
            sign = partial(Statement.sign, identity=service.identity)
            self.auditor = Auditor(run, service.rpc, tag, sign, self._trouble, self._after, self._not_finite)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self.auditor is not None:
                self.auditor.start(nursery)
            await self._look_for_stalls()

    # ---- what the caller gives

    def open_attempt(self, given: Input) -> None:
        """What the attempt `given.nonce` contributes; only read."""
        self._input = given

    def close_attempt(self, nonce: int) -> None:
        """The attempt is over: its tensors are the caller's again. An exchange that others may still need for a
        moment goes on only with what it has already made."""
        if self._input is not None and self._input.nonce == nonce:
            self._input = None
            if self.auditor is not None:
                self.auditor.end()
        if self._exchange is not None and (not self._exchange.done or self._exchange.drained):
            self._close_exchange()

    def moved_bytes(self) -> int:
        """Of the reduction under way."""
        exchange = self._exchange
        return 0 if exchange is None or exchange.done else exchange.bytes_sent + exchange.bytes_received + 1

    def bandwidth_bps(self) -> float:
        """What this node can send, by its limit or by what traffic showed; 0 where nothing is known."""
        if self._config.uplink_bps:
            return self._config.uplink_bps
        seen = [r.bandwidth_bps for r in self._service.links.report() if r.bandwidth_bps]
        return self._claim.of(max(seen, default=0.0))

    # ---- orders of the chain

    def reduce(self, declaration: Declaration) -> None:
        """Start, or rebase."""
        given = self._input
        member = declaration.member(self._me)
        if given is None or member is None or member.nonce != given.nonce:
            return
        self._ballot = declaration.ballot
        key = declaration.key[:KEY_BYTES]
        try:
            if self._goes_on(declaration):
                self._rebase(given, declaration)
            else:
                self._begin(given, declaration)
        except NonFinite as error:
            self.own_fault(given.nonce, error)
            return
        self._keys.add(key)
        if self.auditor is not None and self._exchange is not None:
            self.auditor.begin(self._exchange, declaration)
        self._reported = False
        self._began_s = trio.current_time()
        for peer in declaration.peers:
            if peer != self._me:
                self._need(peer)
        self._after()
        self._tell_changed()

    def _goes_on(self, declaration: Declaration) -> bool:
        """Whether the present exchange is of the same attempt."""
        old = self._exchange
        if old is None or self._epoch != declaration.epoch or old.codec.name != declaration.codec:
            return False
        mine, new = old.declaration.member(self._me), declaration.member(self._me)
        return mine is not None and new is not None and mine.nonce == new.nonce

    def _rebase(self, given: Input, declaration: Declaration) -> None:
        """Go on with what is held. A whole result that may have been voted for keeps its memory."""
        exchange = self._exchange
        if exchange is None or exchange.declaration.key == declaration.key:
            return
        if any(whole.result is exchange.result for whole in self._wholes.values()):
            exchange.result = Result(given.layout, given.tensors)
        self._divert()
        before = set(exchange.peers)
        exchange.rebase(declaration)
        for peer in (set(exchange.peers) - before) & self._touched:
            exchange.relinked(peer)  # what it sent before it was a member was dropped here

    def _begin(self, given: Input, declaration: Declaration) -> None:
        """Start afresh; what came for this epoch before and is not here any more is asked for again."""
        self._close_exchange()
        if self._epoch != declaration.epoch:
            self._keys.clear()
            self._touched.clear()
            # The epoch before is decided. Whoever missed it transfers the state: its result makes room for the next.
            self._wholes = {
                digest: whole for digest, whole in self._wholes.items() if whole.epoch >= declaration.epoch
            }
        self._epoch = declaration.epoch
        self._linked.clear()
        if given.out is not None:
            # An older result may live in the memory that is about to be written: nobody must be served from it.
            self._wholes = {
                digest: whole for digest, whole in self._wholes.items() if not whole.shares(given.out)
            }
        exchange = self._exchange = Exchange(
            self._me,
            given.tensors,
            declaration,
            self._config.reduce,
            layout=given.layout,
            out=given.out,
            feedback=given.feedback,
            beside_bytes=2 * (len(declaration.peers) - 1) * self._window_bytes(given.layout, declaration),
        )
        for peer in self._touched & set(exchange.peers):
            exchange.relinked(peer)

    def abandon(self, ballot: Ballot) -> None:
        """Stop reducing; a result that was reported stays."""
        if self._ballot == ballot:
            self._ballot = None  # what is held stays for the next declaration, until the attempt is closed

    def fetch(self, value: Value, holders: tuple[str, ...]) -> None:
        """Get these bytes from any of the holders; goes on until they are here or released."""
        digest, epoch = value.digest, value.declaration.epoch
        if digest in self._wholes:
            self.tell(Held(epoch, digest))
            return
        if self._nursery is None:
            return
        self._finishing, self._whole_here = value, trio.Event()
        self._keep_decided()
        if digest in self._wholes:
            self.tell(Held(epoch, digest))
            return
        old = self._fetches.pop(digest, None)
        if old is not None:
            old.cancel()
        scope = self._fetches[digest] = trio.CancelScope()
        self._nursery.start_soon(self._fetch, value, holders, scope)

    async def _fetch(self, value: Value, holders: tuple[str, ...], scope: trio.CancelScope) -> None:
        digest, declaration = value.digest, value.declaration
        like = None if self._input is None else self._input.tensors
        with scope:
            await self._finish_alone(value)
            while digest not in self._wholes:
                try:
                    result = await fetch_value(
                        self._service.rpc, self._run_id, self._tag, value, self._config.reduce, holders, like
                    )
                except RemoteFault as problem:
                    log.info("epoch %d: %s; trying on", declaration.epoch, problem)
                    await trio.sleep(RETRY_S)
                    continue
                self._wholes[digest] = Whole(
                    result, declaration.epoch, Traffic(bytes_in=result.layout.tensor_bytes)
                )
            self.tell(Held(declaration.epoch, digest))
        if self._fetches.get(digest) is scope:
            del self._fetches[digest]

    async def _finish_alone(self, value: Value) -> None:
        """The reduction that is under way gives these very bytes: as long as it gets on, nothing is quicker."""
        marks, since_s = -1, trio.current_time()
        while trio.current_time() - since_s < FINISH_STALL_S:
            exchange = self._exchange
            if exchange is None or exchange.done or exchange.declaration.key != value.declaration.key:
                return
            if exchange.bytes_received != marks:
                marks, since_s = exchange.bytes_received, trio.current_time()
            with trio.move_on_after(_LOOK_S):
                await self._whole_here.wait()

    async def drain(self, deadline_s: float) -> None:
        """Until the others have been given all they need from here, or nobody takes it any more, or the deadline."""
        sent, since_s = -1, trio.current_time()
        while trio.current_time() < min(deadline_s, since_s + FINISH_STALL_S):
            exchange = self._exchange
            if exchange is None or exchange.drained:
                return
            if exchange.bytes_sent != sent:
                sent, since_s = exchange.bytes_sent, trio.current_time()
            self._drained = trio.Event()
            with trio.move_on_after(_LOOK_S):
                await self._drained.wait()

    def release(self, digest: bytes) -> None:
        """These bytes need not be kept, nor fetched."""
        if self._finishing is not None and self._finishing.digest == digest:
            self._finishing = None
        self._wholes.pop(digest, None)
        scope = self._fetches.pop(digest, None)
        if scope is not None:
            scope.cancel()

    def whole(self, digest: bytes) -> Whole | None:
        """The result with this digest, if it is here."""
        return self._wholes.get(digest)

    def on_health(self, peer: str, trusted: bool) -> None:
        """The failure detector changed its mind."""
        line = self._lines.get(peer)
        if line is not None and not trusted and line.scope is not None:
            line.wake()

    def cut(self, peer: str) -> None:
        """Nothing more goes to `peer`, nor comes from it."""
        line = self._lines.get(peer)
        if line is not None and line.scope is not None:
            line.scope.cancel()

    def _close_exchange(self) -> None:
        if self._exchange is not None:
            self._divert()
            self._exchange.close()
            self._exchange = None

    def _divert(self) -> None:
        """What is still coming in is not written to the result any more."""
        for line in self._lines.values():
            if line.link is not None:
                line.link.divert()

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- what came of it

    def _after(self) -> None:
        """Whatever the exchange did last may have woken writers, finished it, or shown that it cannot finish."""
        exchange = self._exchange
        if exchange is None:
            return
        for peer in exchange.woken():
            line = self._lines.get(peer)
            if line is not None:
                line.wake()
        if self._gated:
            self._gated = False
            self._tell_changed()
        self._keep_decided()
        if self._reported or self._ballot is None:
            return
        if exchange.done:
            digest = self._keep(exchange)
            if self.auditor is not None and not self.auditor.passed(exchange):
                return  # others may decide on it all the same, and then it is here
            self._reported = True
            self.tell(Reduced(self._ballot, digest))
        elif exchange.refused:
            self._reported = True
            for why in sorted(set(exchange.refused.values())):
                culprits = frozenset(peer for peer, one in exchange.refused.items() if one == why)
                self.tell(Stuck(self._ballot, culprits, why))

    def _keep(self, exchange: Exchange) -> bytes:
        """The result of an exchange that is done, for whoever asks; returns its digest."""
        digest = value_digest(exchange.declaration, exchange.digest)
        if digest not in self._wholes:
            self._wholes[digest] = Whole(exchange.result, self._epoch, exchange.traffic)
        return digest

    def _keep_decided(self) -> None:
        """A majority may decide while the rest is still under way here: what was decided on is kept once it is whole,
        though nobody asks for this member's vote any more."""
        exchange, value = self._exchange, self._finishing
        if (
            exchange is not None
            and value is not None
            and exchange.done
            and exchange.declaration.key == value.declaration.key
        ):
            self._finishing = None
            if value_digest(exchange.declaration, exchange.digest) == value.digest:
                self._keep(exchange)
            self._whole_here.set()

    def _trouble(self, peers: Sequence[str], why: str) -> None:
        """The audit cannot go on with these."""
        if self._ballot is not None:
            self.tell(Stuck(self._ballot, frozenset(peers), why))

    def _not_finite(self, error: NonFinite) -> None:
        if self._input is not None:
            self.own_fault(self._input.nonce, error)

    @contextmanager
    def _own_faults(self) -> Iterator[None]:
        """Tensors that were no numbers any more when they were wanted end the caller's attempt, and nothing else."""
        try:
            yield
        except NonFinite as error:
            self._not_finite(error)

    async def _look_for_stalls(self) -> None:
        """Whoever owes a contribution and sends nothing for much longer than it ever took is reported."""
        while True:
            await trio.sleep(_LOOK_S)
            exchange, ballot = self._exchange, self._ballot
            if exchange is None or ballot is None or exchange.done or self._reported:
                continue
            now_s = trio.current_time()
            for peer in exchange.peers:
                line = self._need(peer)
                marks = exchange.progress(peer)
                if marks != line.marks:
                    line.marks, line.moved_s = marks, now_s
            silent = frozenset(
                peer
                for peer in exchange.waiting_for()
                if now_s - max(self._lines[peer].moved_s, self._began_s) > self._stall_s(exchange, peer)
            )
            if silent:
                self._began_s = now_s  # once a while is enough
                log.info("epoch %d waits for %s", self._epoch, sorted(silent))
                self.tell(Stuck(ballot, silent, "silent"))

    def _stall_s(self, exchange: Exchange, peer: str) -> float:
        """How long a peer that is alive may send nothing: by what was seen of it, and patient while nothing was.
        Deaths are the failure detector's to tell, and it is quicker."""
        gap_s, most_s = self._lines[peer].gap_s, self._config.link_silence_s
        learnt_s = min(max(STALL_MIN_S, 8 * gap_s), most_s) if gap_s else most_s
        # Results are late when their owner waits itself: it will say for whom.
        return learnt_s * (1 if exchange.lacks_inputs else 3)

    # ---- links

    def _need(self, peer: str) -> _Line:
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line()
        if not line.keeper and self._me < peer and self._nursery is not None:
            line.keeper = True
            self._nursery.start_soon(self._keep_link, peer, line)
        return line

    async def _keep_link(self, peer: str, line: _Line) -> None:
        """Open a link, and another one whenever it breaks, while the peer is needed."""
        pause_s = self._config.resend_link_s
        try:
            while self._exchange is not None and peer in self._exchange.peers:
                window_bytes = self._window_bytes(self._exchange.layout, self._exchange.declaration)
                try:
                    async with self._service.links.open(
                        peer, SERVICE, deadline_s=_OPEN_WITHIN_S, window_bytes=window_bytes
                    ) as link:
                        await introduce(link, Purpose(self._run_id, self._tag))
                        pause_s = self._config.resend_link_s
                        await self.use(peer, link)
                except P2pError as problem:
                    log.debug("no data link to %s: %s", peer, problem)
                    await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _OPEN_PAUSE_MAX_S)
        finally:
            line.keeper = False

    def _window_bytes(self, layout: Layout, declaration: Declaration) -> int:
        return window_for(layout.tensor_bytes, len(declaration.peers) - 1)

    async def use(self, peer: str, link: Link) -> None:
        """Carry frames over `link` until it ends; a newer link to the same peer takes its place."""
        line = self._lines.setdefault(peer, _Line())
        while line.scope is not None:
            # To its end, not only told to: whose frame is being sent, and so must stay as it is, is known by peer.
            line.scope.cancel()
            await line.ended.wait()
        with trio.CancelScope() as scope:
            line.scope, line.link, line.ended = scope, link, trio.Event()
            self._relink(peer)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, peer, line, link)
                    nursery.start_soon(self._tell_gone, link)
                    await self._read(peer, line, link)
                    nursery.cancel_scope.cancel()
            except* P2pError as problems:
                log.debug("the data link to %s ended: %s", peer, problems.exceptions[0])
            finally:
                line.scope = line.link = None
                line.ended.set()
                with self._own_faults():
                    if self._exchange is not None:
                        self._exchange.dropped(peer)
                self._after()

    def _relink(self, peer: str) -> None:
        exchange = self._exchange
        if exchange is not None and peer in exchange.peers and peer in self._linked:
            exchange.relinked(peer)
            self._after()

    async def _write(self, peer: str, line: _Line, link: Link) -> None:
        while True:
            line.kick = trio.Event()
            exchange = self._exchange
            if exchange is not None and peer in exchange.peers:
                self._linked.add(peer)
                frame = None
                with self._own_faults():
                    frame = exchange.next_frame(peer)
                self._after()  # the frame before has left: what waited for its memory may have ended the reduction
                if frame is not None:
                    await self._uplink.take(len(frame.header) + _EPOCH.size + frame.payload_bytes)
                    await link.send(_EPOCH.pack(self._epoch) + frame.header, frame.payload)
                    continue
                if exchange.done and exchange.drained:
                    self._drained.set()
                    if self._input is None:
                        self._close_exchange()
            exchange = frame = None  # their memory may go while this waits
            await line.kick.wait()

    async def _read(self, peer: str, line: _Line, link: Link) -> None:
        def sink(header: bytes, payload_bytes: int) -> memoryview | None:
            exchange = self._current(peer, header)
            if exchange is not None:
                return exchange.buffer_for(peer, memoryview(header)[_EPOCH.size :], payload_bytes)
            if payload_bytes > UNSOLICITED_BYTES_MAX:
                raise FrameRefused(peer, "size", f"{payload_bytes} bytes that nobody asked for")
            return fresh(payload_bytes)

        try:
            while True:
                while not self._may_read(peer) and link.failure is None:
                    self._gated = True
                    await self._changed.wait()
                header, payload = await link.receive(sink)
                await self._early(peer, header, link)
                exchange = self._current(peer, header)
                if _EPOCH.unpack_from(header)[0] == self._epoch:
                    self._touched.add(peer)
                if exchange is None:
                    continue
                now_s = trio.current_time()
                if line.moved_s > self._began_s:
                    line.gap_s = max(0.98 * line.gap_s, now_s - line.moved_s)
                line.moved_s = now_s
                with self._own_faults():
                    exchange.arrived(peer, memoryview(header)[_EPOCH.size :], payload)
                del exchange, payload
                self._after()
        except FrameRefused as fault:
            log.warning("the data link is closed: %s", fault)
            if self._ballot is not None and self._exchange is not None and peer in self._exchange.peers:
                self.tell(Stuck(self._ballot, frozenset((peer,)), "mismatch"))

    def _may_read(self, peer: str) -> bool:
        exchange = self._exchange
        return exchange is None or peer not in exchange.peers or exchange.wants_frames(peer)

    def _current(self, peer: str, header: bytes) -> Exchange | None:
        """The exchange that this frame is for, if it is the present one."""
        if len(header) <= _EPOCH.size:
            raise FrameRefused(peer, "malformed", f"a header of {len(header)} bytes")
        exchange = self._exchange
        if exchange is None or _EPOCH.unpack_from(header)[0] != self._epoch or peer not in exchange.peers:
            return None
        return exchange

    async def _early(self, peer: str, header: bytes, link: Link) -> None:
        """A frame of an epoch that has not begun here waits; one of a declaration that is not known yet waits a
        moment, because the order to rebase is on its way."""
        until_s = math.inf
        key = bytes(header[_EPOCH.size + _KEY_AT :])
        while link.failure is None and len(header) > _EPOCH.size:
            epoch = _EPOCH.unpack_from(header)[0]
            if epoch < self._epoch or (epoch == self._epoch and key in self._keys):
                return
            if epoch == self._epoch:
                until_s = min(until_s, trio.current_time() + _EARLY_WAIT_S)
                if trio.current_time() >= until_s:
                    if len(self._keys) < KEYS_MAX:
                        self._keys.add(
                            key
                        )  # a declaration that was never ours: waited for once, not for each frame
                    return
            with trio.move_on_at(until_s):
                await self._changed.wait()

    async def _tell_gone(self, link: Link) -> None:
        """Whoever waits for a change looks at its link too."""
        await link.gone.wait()
        self._tell_changed()
