"""One link: whole messages, in order, to and from one peer, over whatever path there is at the moment.

Knows its two queues of records, the path that carries them (a generation of sockets, or a stream), and what happens
when that breaks: the next path begins where the peer's queue ends. It does not know how paths are made (`connect`), nor
other links (`links`).
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from p2p.errors import (
    DeadlineExceeded,
    EndOfChannel,
    LocalFault,
    P2pError,
    PeerLost,
    ProtocolViolation,
    RemoteFault,
)
from p2p.identity import PeerId
from p2p.links.carriers import Carrier
from p2p.links.inbox import Inbox, Sink
from p2p.links.keys import LinkKeys
from p2p.links.meter import Meter, Pace
from p2p.links.outbox import BEGINNING, INLINE_BYTES_MAX, RECORDS_AHEAD_MAX, Outbox, cut
from p2p.links.records import (
    ACK,
    BEGIN,
    ECHO,
    HEAD_BYTES,
    OVERHEAD_BYTES,
    PING,
    TAG_BYTES,
    WANTS_ECHO,
    Head,
    RecordRefused,
    open_record,
    read_head,
    seal,
)
from p2p.links.types import LinksConfig, PathName

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

BATCH_BYTES = 512 << 10
_READ_SLACK_BYTES = 512
_ALL = 1 << 62
_YIELD_BYTES = 1 << 20
_CLOSES_MAX = 10
_ECHO_EVERY_S = 0.25
_ECHOES_MAX = 64
_ACK_BYTES_MAX = 1 << 20
_ACK_RECORDS_MAX = RECORDS_AHEAD_MAX // 4
_PAIR = struct.Struct("!QQ")
_ONE = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Terms:
    """What both ends agreed on when the link was opened."""

    session: bytes
    service: str
    record_bytes: int
    send_window_bytes: int
    receive_window_bytes: int
    opener: bool


@dataclass(eq=False, slots=True)
class Path:
    """The carriers of one generation, in use."""

    generation: int
    carriers: list[Carrier]
    began_s: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    reason: str = ""
    rest: list[memoryview] = field(default_factory=list)
    heard_s: float = 0.0

    @property
    def name(self) -> PathName:
        return self.carriers[0].kind

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.scope.cancel()


class Link:
    """Made by `Links.open`, or given to a handler. One task may receive at a time; any number may send."""

    def __init__(self, peer: PeerId, terms: Terms, keys: LinkKeys, config: LinksConfig, meter: Meter) -> None:
        self.peer = peer
        self.service = terms.service
        self.terms = terms
        self.config = config
        self.keys = keys
        self.bytes_sent = 0
        self.bytes_received = 0
        self.path_now: Path | None = None
        self.failure: P2pError | None = None
        self.gone = trio.Event()
        self.changed = trio.Event()
        self.inbox = Inbox(
            keys.inward,
            terms.record_bytes,
            terms.receive_window_bytes,
            self._header_bytes_max(),
            config.payload_bytes_max,
        )
        self.outbox = Outbox(keys.outward, terms.record_bytes, terms.send_window_bytes)
        self._meter = meter
        self._ack_every_bytes = min(terms.receive_window_bytes // 2, _ACK_BYTES_MAX)
        self._unacked_bytes = 0
        self._acked_taken_bytes = 0
        self._acked_consumed = 0
        self._acked_end = False
        self._ack_due = False
        self._echoes: deque[int] = deque(maxlen=_ECHOES_MAX)
        self._echo: tuple[int, float] | None = None
        self._echo_last_s = -_ECHO_EVERY_S
        self._ping_due = False
        self._control_seq = 0
        self._unsealed: deque[memoryview] = deque()  # of the message that is being sent
        self._progress_s = 0.0
        self._sending = trio.StrictFIFOLock()
        self._room = trio.lowlevel.ParkingLot()
        self._work = trio.lowlevel.ParkingLot()
        self._arrivals = trio.lowlevel.ParkingLot()
        self._receiving = False
        self._closing = False

    def _header_bytes_max(self) -> int:
        return min(self.config.header_bytes_max, self.terms.record_bytes - BEGINNING.size)

    @property
    def path(self) -> PathName:
        """What carries the link now; "none" while a broken path is being replaced, and at its end."""
        return "none" if self.path_now is None else self.path_now.name

    # ---- sending

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        """Send one message; returns once all of it is sealed and most of it is on its way.

        The payload is the bytes of all its buffers, one after another; they may be changed when this returns. Waits
        while the peer does not receive. A cancelled send sends nothing, or lets the peer drop the beginning. Raises
        PeerLost, and LocalFault for what is beyond the limits.
        """
        pieces = [memoryview(one).cast("B") for one in payload if memoryview(one).nbytes]
        total = sum(len(one) for one in pieces)
        if len(header) > self._header_bytes_max():
            raise LocalFault(f"a header of {len(header)} bytes; at most {self._header_bytes_max()} are sent")
        if total > self.config.payload_bytes_max:
            raise LocalFault(f"a payload of {total} bytes; at most {self.config.payload_bytes_max} are sent")
        if self._sending.locked():
            await self._sending.acquire()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._sending.acquire_nowait()
        try:
            self._check()
            inline = b"".join(pieces) if total + len(header) <= INLINE_BYTES_MAX else b""
            if len(inline) + len(header) + BEGINNING.size > self.terms.record_bytes:
                inline = b""
            waited = await self._wait_for_room(BEGINNING.size + len(header) + len(inline))
            self.outbox.begin(header, inline, total, wants_echo=self._wants_echo())
            if total and not inline:
                waited = await self._send_parts(pieces) or waited
            self._send_now()
            self.bytes_sent += total + len(header)
            self._meter.bytes_sent += total + len(header)
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending.release()

    async def _send_parts(self, pieces: list[memoryview]) -> bool:
        """Until all is sealed, by whoever finds that the path and the window take more. Whether it waited."""
        self._unsealed.extend(cut(pieces, self.terms.record_bytes))
        waited = False
        try:
            self._send_now()
            while self._unsealed:
                waited = True
                await self._room.park()
                self._check()
            return waited
        finally:
            if self._unsealed:
                self._unsealed.clear()
                if self.failure is None:
                    self.outbox.abort()
                    self._send_now()

    async def _wait_for_room(self, plain_bytes: int) -> bool:
        """Until the peer's window takes a record, and the path has not too much to send already. Whether it waited."""
        outbox, waited = self.outbox, False
        while True:
            if outbox.unsent_bytes < BATCH_BYTES and outbox.room(plain_bytes):
                return waited
            self._send_now()
            if outbox.unsent_bytes >= BATCH_BYTES or not outbox.room(plain_bytes):
                waited = True
                await self._room.park()
                self._check()

    def _seal_more(self) -> None:
        """Pieces of the message that is being sent: what the window takes, and not far ahead of the path."""
        pieces, outbox = self._unsealed, self.outbox
        while pieces and outbox.unsent_bytes < BATCH_BYTES and outbox.room(len(pieces[0])):
            outbox.part(pieces.popleft())
            if not pieces:
                self._room.unpark_all()

    def _send_now(self) -> None:
        """What there is goes out from here, as far as the path takes it without waiting; a writer sees to the rest."""
        path = self.path_now
        if path is None or path.rest:
            return
        if len(path.carriers) > 1:
            self._work.unpark_all()
            return
        while pieces := self._due(_ALL):
            try:
                path.rest = path.carriers[0].send_now(pieces)
            except PeerLost as lost:
                path.end(str(lost))
                return
            if path.rest:
                self._work.unpark_all()
                return

    def _due(self, bytes_max: int) -> list[memoryview]:
        self._seal_more()
        return self._control() + self.outbox.take(bytes_max)

    def _wake_senders(self) -> None:
        """Not whoever has a message half sealed: its pieces are sealed where there is room for them."""
        if not self._unsealed:
            self._room.unpark_all()

    def _wants_echo(self) -> bool:
        now = trio.current_time()
        if self._echo is not None or now - self._echo_last_s < _ECHO_EVERY_S:
            return False
        self._echo = (self.outbox.next_seq, now)
        self._echo_last_s = now
        return True

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        if self._closing:
            raise LocalFault("this link was closed here")
        if self.inbox.has_ended:
            raise PeerLost(self.peer, f"{self.peer} closed the link")

    # ---- receiving

    async def receive(self, sink: Sink | None = None) -> tuple[bytes, memoryview]:
        """The next message: its header, and its payload.

        `sink(header, payload_bytes)` is called when a message with a payload begins, and may give the writable buffer,
        of exactly that size, into which the payload is decrypted; None lets the link allocate. A cancelled receive
        loses nothing: the next one goes on with the same message and buffer, which is not written to in between.
        Raises EndOfChannel at the clean end, PeerLost, or what the sink raises.
        """
        if self._receiving:
            raise LocalFault("another task receives from this link already")
        self._receiving = True
        try:
            return await self._receive(sink)
        finally:
            self._receiving = False
            self.inbox.unpost()

    def divert(self) -> None:
        """For whoever gave a buffer by a sink and needs it back now: it is not written to any more. The message comes
        all the same, in memory of its own."""
        self.inbox.divert()

    async def _receive(self, sink: Sink | None) -> tuple[bytes, memoryview]:
        inbox, parked = self.inbox, False
        self._progress_s = trio.current_time()
        await trio.lowlevel.checkpoint_if_cancelled()
        self._post(sink)
        while True:
            if inbox.sink_failure is not None:
                failure, inbox.sink_failure = inbox.sink_failure, None
                raise failure
            message = inbox.take()
            if message is not None:
                count = len(message[0]) + len(message[1])
                self.bytes_received += count
                self._meter.bytes_received += count
                if not parked:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return message
            if inbox.ended:
                raise EndOfChannel(f"{self.peer} has ended the link")
            if self.failure is not None:
                raise self.failure.with_traceback(None)
            await self._arrivals.park()
            parked = True

    def _post(self, sink: Sink | None) -> None:
        try:
            self.inbox.post(sink)
        except ProtocolViolation as violation:
            self.fail(violation)
        self._note_progress()

    # ---- the end

    async def aclose(self) -> None:
        """End the link: the peer receives what was sent, then EndOfChannel. Waits for its word, as long
        as there is progress."""
        if self._closing or self.failure is not None:
            await trio.lowlevel.checkpoint_if_cancelled()
            self.fail(PeerLost(self.peer, "this link was closed here"))
            return
        self._closing = True
        self._room.unpark_all()  # those who wait to send learn of it
        deadline = trio.current_time() + _CLOSES_MAX * self.config.close_deadline_s
        with trio.CancelScope(deadline=deadline, shield=True):
            async with self._sending:
                if self.failure is None:
                    self.outbox.end()
                self._send_now()
            received = -1
            while self.failure is None and received < self.outbox.received < self.outbox.next_seq:
                received = self.outbox.received
                with trio.move_on_after(self.config.close_deadline_s):
                    while self.failure is None and self.outbox.received == received:
                        await self._room.park()
        self.fail(PeerLost(self.peer, "this link was closed here"))

    def fail(self, failure: P2pError) -> None:
        """The link is over; whoever waits on it is told. What arrived whole can still be received."""
        if self.failure is None:
            self.failure = failure
            self.gone.set()
            self.notify()
            if self.path_now is not None:
                self.path_now.end("the link is over")
        self._arrivals.unpark_all()
        self._room.unpark_all()
        self._work.unpark_all()

    def notify(self) -> None:
        """The path or the link changed: wake whoever keeps it."""
        self.changed.set()
        self.changed = trio.Event()

    # ---- paths

    def adopt(self, generation: int, carriers: list[Carrier], position: int) -> Path:
        """A new path takes over, at the first record that the peer lacked. Raises ProtocolViolation. The caller then
        runs it by `run_path`."""
        self.outbox.rewind(position)
        now = trio.current_time()
        for carrier in carriers:
            carrier.tune()
        path = Path(generation, carriers, now, heard_s=now)
        old, self.path_now = self.path_now, path
        if old is not None:
            old.end("a better path took over")
        self._ack_due = True
        self._echo = None
        self._progress_s = now
        self.notify()
        return path

    async def run_path(self, path: Path) -> None:
        """Carry records until the path breaks or another takes over."""
        try:
            if self.failure is None and self.path_now is path:
                write = self._write if len(path.carriers) == 1 else self._write_stripe
                with path.scope:
                    async with trio.open_nursery() as nursery:
                        for carrier in path.carriers:
                            nursery.start_soon(self._guard, path, self._read, carrier)
                            nursery.start_soon(self._guard, path, write, carrier)
                        nursery.start_soon(self._watch, path)
        finally:
            self._note_loss(path)
            for carrier in path.carriers:
                carrier.close()
            if self.path_now is path:
                self.path_now = None
                if self.inbox.has_ended:
                    self.fail(PeerLost(self.peer, f"{self.peer} closed the link"))
                self.notify()

    async def _guard(
        self, path: Path, work: Callable[[Path, Carrier], Awaitable[None]], carrier: Carrier
    ) -> None:
        try:
            await work(path, carrier)
        except RecordRefused as refused:
            path.end(f"refused: {refused}")
        except ProtocolViolation as violation:
            self.fail(violation)
        except RemoteFault as fault:
            path.end(str(fault))
        except Exception:  # what a peer sends must never end more than its link
            logger.exception("the link to %s failed here", self.peer)
            self.fail(PeerLost(self.peer, "the link failed here"))

    async def _write(self, path: Path, carrier: Carrier) -> None:
        """The only carrier of a path: finish what `_send_now` could not, and do what it is woken for."""
        while True:
            if path.rest:
                await carrier.send(path.rest)
                path.rest = []
            self._send_now()
            self._wake_senders()
            if not path.rest:
                await self._work.park()

    async def _write_stripe(self, path: Path, carrier: Carrier) -> None:
        """One of several carriers: whoever is free takes the next record."""
        while True:
            pieces = self._due(self.terms.record_bytes)
            if pieces:
                self._wake_senders()
                await carrier.send(pieces)
            else:
                await self._work.park()

    async def _read(self, path: Path, carrier: Carrier) -> None:
        """Take records off one carrier. A read asks for little more than the record that is coming, so that it is
        decrypted while still in the processor's cache; where they come quickly it wakes up once for each."""
        record_bytes = self.terms.record_bytes
        buffer = memoryview(bytearray(record_bytes + OVERHEAD_BYTES + _READ_SLACK_BYTES))
        have, wanted, unyielded_bytes, least = 0, record_bytes + OVERHEAD_BYTES, 0, 1
        pace = Pace()
        while True:
            count = await carrier.receive_into(buffer[have : wanted + _READ_SLACK_BYTES], least)
            if not count:
                raise PeerLost(self.peer, "the path was closed by the peer")
            path.heard_s = trio.current_time()
            self._meter.inward.add(count, path.heard_s)
            pace.add(count, path.heard_s)
            have += count
            at = 0
            wanted, least = record_bytes + OVERHEAD_BYTES, 1
            while have - at >= HEAD_BYTES:
                head = read_head(buffer, at, record_bytes)
                end = at + HEAD_BYTES + head.length
                if end > have:
                    wanted = end - at
                    least = end - have if pace.quick else 1
                    break
                self._on_record(head, buffer[at:end], path.heard_s)
                at = end
                if self.inbox.ready is not None:
                    unyielded_bytes = -count
                    await (
                        trio.lowlevel.checkpoint()
                    )  # let the receiver ask for the next one, which saves a copy
            if at:
                buffer[: have - at] = buffer[at:have]
                have -= at
            unyielded_bytes += count
            if unyielded_bytes >= _YIELD_BYTES:
                unyielded_bytes = 0
                await trio.lowlevel.checkpoint()

    def _on_record(self, head: Head, record: memoryview, now: float) -> None:
        if head.kind >= ACK:
            self._on_control(head, record, now)
            return
        inbox = self.inbox
        inbox.arrived(head, record)
        self._progress_s = now
        if head.flags & WANTS_ECHO and head.kind == BEGIN:
            self._echoes.append(head.seq)
            self._work.unpark_all()
        self._unacked_bytes += len(record)
        self._note_progress()
        if inbox.ready is not None or inbox.ended or inbox.sink_failure is not None:
            self._arrivals.unpark_all()

    def _note_progress(self) -> None:
        """Tell the peer, now and then, what arrived (it keeps that no longer) and what was taken (its window)."""
        inbox = self.inbox
        if (
            self._unacked_bytes >= self._ack_every_bytes
            or inbox.taken_bytes - self._acked_taken_bytes >= self._ack_every_bytes
            or inbox.consumed - self._acked_consumed >= _ACK_RECORDS_MAX
            or (inbox.has_ended and not self._acked_end)
        ):
            self._unacked_bytes = 0
            self._acked_taken_bytes = inbox.taken_bytes
            self._acked_consumed = inbox.consumed
            self._acked_end = inbox.has_ended
            self._ack_due = True
            self._send_now()
            if inbox.has_ended:
                self._room.unpark_all()  # whoever sends learns of it

    def _on_control(self, head: Head, record: memoryview, now: float) -> None:
        if head.length - TAG_BYTES > _PAIR.size:
            raise RecordRefused(f"a control record of {head.length} bytes")
        plain = open_record(self.keys.inward, head, record)
        if head.kind == ACK and len(plain) == _PAIR.size:
            received, consumed = _PAIR.unpack(plain)
            count = self.outbox.acknowledged(received, consumed)
            if count:
                self._meter.outward.add(count, now)
                if self.outbox.next_seq - self.outbox.received < 2:  # the path ran dry: the pause is ours
                    self._meter.outward.pause()
            self._send_now()
            self._wake_senders()
        elif head.kind == ECHO and len(plain) == _ONE.size:
            if self._echo is not None and self._echo[0] == _ONE.unpack(plain)[0]:
                self._meter.add_rtt(now - self._echo[1])
                self._echo = None
        elif head.kind == PING and len(plain) == _ONE.size:
            self._echoes.append(_ONE.unpack(plain)[0])
            self._ack_due = True
            self._work.unpark_all()
        else:
            raise ProtocolViolation(f"a control record of kind {head.kind} and {len(plain)} bytes")

    def _control(self) -> list[memoryview]:
        """The control records that are due."""
        due = []
        if self._ack_due:
            self._ack_due = False
            due.append(self._seal_control(ACK, _PAIR.pack(self.inbox.received, self.inbox.consumed)))
        while self._echoes:
            due.append(self._seal_control(ECHO, _ONE.pack(self._echoes.popleft())))
        if self._ping_due:
            self._ping_due = False
            due.append(self._seal_control(PING, _ONE.pack(self._echo[0] if self._echo else 0)))
        return due

    def _seal_control(self, kind: int, plain: bytes) -> memoryview:
        head = Head(kind, 0, 0, len(plain) + TAG_BYTES, self._control_seq)
        self._control_seq += 1
        record = memoryview(bytearray(HEAD_BYTES + head.length))
        seal(self.keys.outward, head, plain, record)
        return record

    async def _watch(self, path: Path) -> None:
        """Ask where an answer is due, give the path up when none comes, and the link when a message does not go on."""
        every_s = self.config.stall_deadline_s / 4
        while True:
            await trio.sleep(every_s)
            if self.outbox.idle and not self.inbox.in_message:
                continue
            now = trio.current_time()
            silent_s, stalled_s = now - path.heard_s, now - self._progress_s
            if silent_s >= self.config.stall_deadline_s:
                path.end(f"nothing came for {silent_s:.1f} s")
            elif self.inbox.in_message and stalled_s >= self.config.stall_deadline_s:
                self.fail(PeerLost(self.peer, f"{self.peer} stalled in mid-message for {stalled_s:.1f} s"))
            elif silent_s >= every_s:
                self._ping_due = True
                self._send_now()

    def _note_loss(self, path: Path) -> None:
        for carrier in path.carriers:
            loss = carrier.loss()
            if loss is not None:
                self._meter.loss = loss

    # ---- asked by Links

    async def wait_open(self, deadline: float) -> None:
        """Until the first path carries the link. Raises what made it fail, or DeadlineExceeded."""
        with trio.CancelScope(deadline=deadline):
            while self.path_now is None:
                if self.failure is not None:
                    raise self.failure.with_traceback(None)
                await self.changed.wait()
            return
        raise DeadlineExceeded(f"no path to {self.peer} carried a link in time")

    def sample_loss(self) -> None:
        if self.path_now is not None:
            self._note_loss(self.path_now)


__all__ = ["Link", "Path", "Terms"]
