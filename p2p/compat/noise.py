# mypy: disallow-subclassing-any=False
"""Noise with one socket call a batch instead of two a packet, and a bounded handshake.

py-libp2p 0.8.1 reads each packet in two exact reads and writes packet by packet; its cipher does
3.5 GB/s and its framing a fraction of that. This keeps the library's handshake and identity check
and replaces only what moves bytes afterwards. It does not know yamux. It can go when the
library buffers its reads (NoisePacketReadWriter) and joins its writes.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession

from p2p.compat.tcp import MendedTcpStream

_PACKET_BYTES_MAX = 2 + 65535
_TAG_BYTES = 16
# Far less than is granted to a near peer at once, and still in the processor's caches when it is decrypted.
_READ_BYTES = 256 << 10


class BufferedNoiseReadWriter(NoiseTransportReadWriter):
    """Same bytes on the wire as the library's; reads ahead, writes a batch at once, and where the socket takes it,
    without waiting. Each direction's cipher counts its packets as Noise does (section 5.1: a nonce is the number of
    packets before it)."""

    def __init__(self, conn: IRawConnection, noise_state: object) -> None:
        super().__init__(conn, noise_state)
        self._raw = conn
        stream = getattr(conn, "stream", None)
        self._socket = stream if isinstance(stream, MendedTcpStream) else None
        protocol = self.noise_state.noise_protocol
        self._seal, self._sealed = _cipher(protocol.cipher_state_encrypt)
        self._open, self._opened = _cipher(protocol.cipher_state_decrypt)
        self._buffer = bytearray(_READ_BYTES + _PACKET_BYTES_MAX)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    # ---- out

    @property
    def is_direct(self) -> bool:
        """Whether `send_now` can send anything."""
        return self._socket is not None

    def seal(self, data: bytes | memoryview) -> memoryview:
        """The packets for `data`, which have to be sent whole and in this order."""
        view = memoryview(data)
        count = -(-len(view) // MAX_PLAINTEXT_LENGTH)
        sealed = memoryview(bytearray(len(view) + count * (2 + _TAG_BYTES)))
        at = 0
        for start in range(0, len(view), MAX_PLAINTEXT_LENGTH):
            plain = view[start : start + MAX_PLAINTEXT_LENGTH]
            length = len(plain) + _TAG_BYTES
            sealed[at : at + 2] = length.to_bytes(2, "big")
            self._seal.encrypt_into(_nonce(self._sealed), plain, None, sealed[at + 2 : at + 2 + length])
            self._sealed += 1
            at += 2 + length
        return sealed

    def send_now(self, sealed: memoryview) -> memoryview:
        """Send what the socket takes; what is left. Raises ConnectionClosedError."""
        while sealed and self._socket is not None:
            sent = self._socket.send_now(sealed)
            if not sent:
                break
            sealed = sealed[sent:]
        return sealed

    async def send(self, sealed: memoryview) -> None:
        await self._raw.write(sealed)

    async def write_msg(self, msg: bytes, prefix_encoded: bool = False) -> None:
        await self.send(self.seal(msg))

    # ---- in

    async def read_msg(self, prefix_encoded: bool = False) -> bytes:
        """The next packet's plaintext. Raises ConnectionClosedError at the end of the stream."""
        while (packet := self._next()) is None:
            await self._fill()
        return packet

    async def read_packets(self) -> list[bytes]:
        """The plaintexts of all whole packets that are there, at least one. Raises as `read_msg`."""
        packets: list[bytes] = []
        while True:
            if self._end - self._start > _TAG_BYTES:
                while (packet := self._next()) is not None:
                    packets.append(packet)
                    if self._start == self._end:
                        break
                if packets:
                    return packets
            await self._fill()

    def _next(self) -> bytes | None:
        start, there = self._start, self._end - self._start
        if there < 2:
            return None
        length = (self._buffer[start] << 8) | self._buffer[start + 1]
        if there < 2 + length:
            return None
        self._start = start + 2 + length
        plain = self._open.decrypt(_nonce(self._opened), self._view[start + 2 : self._start], None)
        self._opened += 1
        return plain

    async def _fill(self) -> None:
        """More bytes; what is left of a packet comes to the front first."""
        rest = self._end - self._start
        if not rest:
            self._start = self._end = 0
        elif self._start:
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        room = self._view[rest : rest + _READ_BYTES]
        if self._socket is not None:
            count = await self._socket.receive_into(room)
        else:
            chunk = await self._raw.read(len(room))
            count = len(chunk)
            room[:count] = chunk
        if not count:
            raise ConnectionClosedError("the peer closed the connection")
        self._end = rest + count


def _cipher(state: Any) -> tuple[ChaCha20Poly1305, int]:
    """A cipher with the key of the handshake, and the number of packets that it has seen."""
    return ChaCha20Poly1305(bytes(state.k)), int(state.n)


def _nonce(number: int) -> bytes:
    return b"\0\0\0\0" + number.to_bytes(8, "little")


class BufferedNoise(Transport):
    """The library's Noise XX, with a deadline on the handshake and buffered packets after it."""

    handshake_deadline_s = 5.0

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return await self._finish(super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return await self._finish(super().secure_outbound(conn, peer_id), conn)

    async def _finish(self, handshake: Awaitable[ISecureConn], conn: IRawConnection) -> ISecureConn:
        try:
            with trio.fail_after(self.handshake_deadline_s):
                return _buffered(await handshake, conn)
        except trio.TooSlowError:
            raise HandshakeFailure("the handshake took too long") from None
        except HandshakeFailure:
            raise
        except Exception as error:  # the cipher library raises anything for a stranger's bytes
            raise HandshakeFailure(f"{type(error).__name__}: {error}") from error


def _buffered(session: ISecureConn, raw: IRawConnection) -> ISecureConn:
    if not isinstance(session, SecureSession) or not isinstance(session.conn, NoiseTransportReadWriter):
        raise HandshakeFailure("the Noise library handed back an unexpected kind of session")
    session.conn = BufferedNoiseReadWriter(raw, session.conn.noise_state)
    session.packets = session.conn
    session.way = getattr(getattr(raw, "stream", None), "way", None)
    return session
