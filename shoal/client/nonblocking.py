"""The client for trio and asyncio: `AsyncClient` and its streams, on anyio."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from anyio.abc import ByteStream

from shoal.client import light
from shoal.client.answers import Answer, Model, Piece
from shoal.client.asking import Ask, Messages, Prompt, chat_ask, text_ask
from shoal.client.documents import Simple, embed_simple, models_of, rows_of
from shoal.client.exchange import Call, Exchange, Interrupted
from shoal.client.gateways import Gateways, found
from shoal.client.reading import Events
from shoal.client.wire import CONNECT_S, READ_BYTES, Broken, Wire, bounded, key_headers


async def _connect(wire: Wire, patience_s: float) -> ByteStream:
    """A connection over which the request has gone out. Raises Broken."""
    try:
        with anyio.fail_after(min(CONNECT_S, patience_s)):
            if wire.secure:
                stream: ByteStream = await anyio.connect_tcp(
                    wire.host, wire.port, tls=True, tls_standard_compatible=False
                )
            else:
                stream = await anyio.connect_tcp(wire.host, wire.port)
    except OSError as problem:  # a TimeoutError too
        raise Broken(f"cannot connect: {problem.strerror or problem or 'no answer'}") from None
    try:
        with anyio.fail_after(patience_s):
            await stream.send(wire.opening)
    except (OSError, anyio.BrokenResourceError):
        await anyio.aclose_forcefully(stream)
        raise Broken("it takes no request") from None
    except BaseException:  # cancelled: the connection must not outlive this call
        await anyio.aclose_forcefully(stream)
        raise
    return stream


async def _read(wire: Wire, stream: ByteStream, patience_s: float) -> list[bytes]:
    """What of the body came next. Raises Broken."""
    try:
        with anyio.fail_after(patience_s):
            data = await stream.receive(READ_BYTES)
    except anyio.EndOfStream:
        data = b""
    except TimeoutError:
        raise Broken("no sign of life") from None
    except (OSError, anyio.BrokenResourceError):
        raise Broken("the connection broke") from None
    return wire.push(data)


async def _rest(wire: Wire, stream: ByteStream, patience_s: float) -> bytes:
    parts: list[bytes] = []
    while not wire.ended:
        bounded(parts, await _read(wire, stream, patience_s))
    return b"".join(parts)


class AsyncStream:
    """A streamed answer: `async for` over its pieces, or `await stream.answer()` for the whole.

    Use it in `async with`, or call `aclose`, where it may be left before its end: that is what cancels it in the mesh.
    """

    def __init__(self, exchange: Exchange, headers: Mapping[str, str], silence_s: float) -> None:
        self._exchange = exchange
        self._headers = headers
        self._silence_s = silence_s
        self._open: tuple[Wire, ByteStream] | None = None
        self._events = Events()
        self._ready: list[Piece] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._ready:
            if self._exchange.finish is not None and self._open is None:
                raise StopAsyncIteration
            try:
                await self._on()
            except BaseException:  # whatever it was, the connection ends with it
                await self.aclose()
                raise
        return self._ready.pop(0)

    async def answer(self) -> Answer:
        """Read what is left and return the whole. Raises ShoalError."""
        async for _ in self:
            pass
        return self._exchange.answer(time.monotonic())

    async def aclose(self) -> None:
        """Stop reading; the mesh stops computing."""
        if self._open is not None:
            (_, stream), self._open = self._open, None
            await anyio.aclose_forcefully(stream)

    async def _on(self) -> None:
        """One step: open a connection, or read on, or end it. What it brings lies in `_ready`."""
        try:
            if self._open is None:
                await self._begin(self._exchange.call(time.monotonic()))
                return
            wait_s = await self._more(*self._open)
        except (Interrupted, Broken) as problem:
            wait_s = self._exchange.broke(str(problem), time.monotonic())
        if wait_s is not None:
            await self.aclose()
            await anyio.sleep(wait_s)

    async def _begin(self, call: Call) -> None:
        wire = Wire("POST", call.url, {**self._headers, **call.headers}, call.body)
        self._events = Events()
        self._open = wire, await _connect(wire, self._patience_s(call.left_s))

    async def _more(self, wire: Wire, stream: ByteStream) -> float | None:
        """Read on. Returns how long to wait before another call where this one is over, else None."""
        exchange = self._exchange
        patience_s = self._patience_s(exchange.left_s(time.monotonic()))
        data = await _read(wire, stream, patience_s)
        if wire.status is not None and wire.status >= 400:
            body = b"".join(data) + await _rest(wire, stream, patience_s)
            return exchange.refused(wire.status, body, wire.retry_after, time.monotonic())
        for event in self._events.push(b"".join(data)):
            piece = exchange.document(event, time.monotonic())
            if piece is not None:
                self._ready.append(piece)
        if not (wire.ended or self._events.done):
            return None
        return exchange.ended(time.monotonic()) or 0.0

    def _patience_s(self, left_s: float | None) -> float:
        return self._silence_s if left_s is None else min(self._silence_s, left_s)


class AsyncClient:
    """`Client` for trio and asyncio: the same calls, awaited. Streams are `async for`.

    async with AsyncClient() as shoal:
        print(await shoal.chat("embedded", "Tell me about tides"))
        async with shoal.stream_chat("embedded", "And about the moon?") as stream:
            async for piece in stream:
                print(piece.text, end="")
    """

    def __init__(self, *gateways: str, api_key: str | None = None, silence_s: float = 20.0) -> None:
        self._gateways: Gateways = found(gateways)
        self._headers = key_headers(api_key)
        self._silence_s = silence_s
        self._own: light.LightPeer | None = None

    @classmethod
    async def join(cls, invite: str, *, data_dir: str | None = None, wait_s: float = 60.0) -> AsyncClient:
        """As `Client.join`."""
        start = partial(light.LightPeer.start, invite, data_dir, wait_s)
        own = await anyio.to_thread.run_sync(start)
        client = cls(own.api)
        client._own = own
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the node that `join` started."""
        if self._own is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._own.stop)

    async def chat(
        self, model: str, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """As `Client.chat`."""
        return await self._whole(chat_ask(model, messages, options), timeout_s)

    def stream_chat(
        self, model: str, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> AsyncStream:
        """As `chat`, piece by piece."""
        return self._stream(chat_ask(model, messages, options), timeout_s)

    async def complete(
        self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """The continuation of a text, or of token ids."""
        return await self._whole(text_ask(model, prompt, options), timeout_s)

    def stream(
        self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> AsyncStream:
        """As `complete`, piece by piece."""
        return self._stream(text_ask(model, prompt, options), timeout_s)

    async def embed(
        self, model: str, texts: str | Sequence[str], *, pooling: str | None = None, timeout_s: float = 60.0
    ) -> list[list[float]]:
        """A vector of unit length for each text."""
        body = embed_simple(model, texts, pooling)
        return rows_of(await self._simple("POST", "/v1/embeddings", body, timeout_s))

    async def models(self) -> list[Model]:
        """The models of the mesh, ready or not."""
        return models_of(await self._simple("GET", "/v1/models", None, 10.0))

    async def mesh(self) -> dict[str, Any]:
        """The node's view of the mesh."""
        return await self._simple("GET", "/mesh", None, 10.0)

    async def _whole(self, ask: Ask, timeout_s: float | None) -> Answer:
        async with self._stream(ask, timeout_s) as stream:
            return await stream.answer()

    def _stream(self, ask: Ask, timeout_s: float | None) -> AsyncStream:
        exchange = Exchange(self._gateways, ask, time.monotonic(), timeout_s=timeout_s)
        return AsyncStream(exchange, self._headers, self._silence_s)

    async def _simple(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        asked = Simple(self._gateways, time.monotonic(), timeout_s)
        while True:
            address, left_s = asked.call(time.monotonic())
            wire = Wire(method, address + path, self._headers, body)
            try:
                async with await _connect(wire, left_s) as stream:
                    data = await _rest(wire, stream, left_s)
            except Broken as problem:
                wait_s = asked.broke(str(problem), time.monotonic())
            else:
                document, wait_s = asked.answered(wire.status or 0, data, wire.retry_after, time.monotonic())
                if document is not None:
                    return document
            await anyio.sleep(wait_s)
