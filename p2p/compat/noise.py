# mypy: disallow-subclassing-any=False
"""Noise with one socket call a batch instead of two a packet, and a bounded handshake.

py-libp2p 0.8.1 reads each packet in two exact reads and writes packet by packet; its cipher does
3.5 GB/s and its framing a fraction of that. This keeps the library's handshake and identity check
and replaces only what moves bytes afterwards. It does not know yamux. It can go when the
library buffers its reads (NoisePacketReadWriter) and joins its writes.
"""

from __future__ import annotations

from collections.abc import Awaitable

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession

_READ_BYTES = 256 << 10


class BufferedNoiseReadWriter(NoiseTransportReadWriter):
    """Same bytes on the wire as the library's; reads ahead and writes a batch at once."""

    def __init__(self, conn: IRawConnection, noise_state: object) -> None:
        super().__init__(conn, noise_state)
        self._raw = conn
        # The library's own `encrypt` takes only bytes, which costs a copy of every packet.
        self._seal = self.noise_state.noise_protocol.cipher_state_encrypt
        self._open = self.noise_state.noise_protocol.cipher_state_decrypt
        self._buffer = bytearray()
        self._start = 0

    async def write_msg(self, msg: bytes, prefix_encoded: bool = False) -> None:
        view = memoryview(msg)
        parts: list[bytes] = []
        for start in range(0, len(view), MAX_PLAINTEXT_LENGTH):
            sealed = self._seal.encrypt_with_ad(None, view[start : start + MAX_PLAINTEXT_LENGTH])
            parts.append(len(sealed).to_bytes(2, "big"))
            parts.append(sealed)
        await self._raw.write(b"".join(parts))

    async def read_msg(self, prefix_encoded: bool = False) -> bytes:
        """The next packet's plaintext. Raises ConnectionClosedError at the end of the stream."""
        await self._fill(2)
        length = int.from_bytes(self._buffer[self._start : self._start + 2], "big")
        await self._fill(2 + length)
        begin = self._start + 2
        sealed = bytes(memoryview(self._buffer)[begin : begin + length])
        self._start = begin + length
        return bytes(self._open.decrypt_with_ad(None, sealed))

    async def _fill(self, wanted: int) -> None:
        while len(self._buffer) - self._start < wanted:
            if self._start:
                del self._buffer[: self._start]
                self._start = 0
            chunk = await self._raw.read(_READ_BYTES)
            if not chunk:
                raise ConnectionClosedError("the peer closed the connection")
            self._buffer += chunk


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
    session.way = getattr(getattr(raw, "stream", None), "way", None)
    return session
