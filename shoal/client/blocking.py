"""The blocking client: `Client` and its streams."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from shoal.client import light
from shoal.client.answers import Answer, Model, Piece
from shoal.client.asking import Ask, Messages, Prompt, chat_ask, text_ask
from shoal.client.documents import Simple, embed_simple, models_of, rows_of
from shoal.client.exchange import Call, Exchange, Interrupted
from shoal.client.gateways import Gateways, found
from shoal.client.reading import Events
from shoal.client.wire import CONNECT_S, READ_BYTES, Broken, Wire, bounded, key_headers


class _Connection:
    """A socket around a Wire. Its methods raise Broken; times in seconds."""

    def __init__(self, wire: Wire, silence_s: float, end_s: float | None) -> None:
        self._wire, self._silence_s, self._end_s = wire, silence_s, end_s
        try:
            plain = socket.create_connection((wire.host, wire.port), self._patience_s(CONNECT_S))
        except OSError as problem:
            raise Broken(f"cannot connect: {problem.strerror or problem}") from None
        try:
            self._socket = self._secured(plain) if wire.secure else plain
            self._socket.settimeout(self._patience_s(silence_s))
            self._socket.sendall(wire.opening)
        except OSError as problem:
            plain.close()
            raise Broken(str(problem)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def read(self) -> list[bytes]:
        """What of the body came next; at its end `wire.ended`."""
        self._socket.settimeout(self._patience_s(self._silence_s))
        try:
            return self._wire.push(self._socket.recv(READ_BYTES))
        except TimeoutError:
            raise Broken("no sign of life") from None
        except OSError as problem:
            raise Broken(problem.strerror or str(problem)) from None

    def rest(self) -> bytes:
        """The whole body."""
        parts: list[bytes] = []
        while not self._wire.ended:
            bounded(parts, self.read())
        return b"".join(parts)

    def _patience_s(self, silence_s: float) -> float:
        left_s = silence_s if self._end_s is None else self._end_s - time.monotonic()
        return max(0.001, min(silence_s, left_s))

    def _secured(self, plain: socket.socket) -> socket.socket:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=self._wire.host)


class Stream:
    """A streamed answer: iterate over its pieces; `answer()` is the whole. Close it (`with`) to cancel it."""

    def __init__(self, exchange: Exchange, headers: Mapping[str, str], silence_s: float) -> None:
        self._exchange = exchange
        self._headers = headers
        self._silence_s = silence_s
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; the mesh stops computing."""
        self._pieces.close()

    def answer(self) -> Answer:
        """Read what is left and return the whole. Raises ShoalError."""
        for _ in self._pieces:
            pass
        return self._exchange.answer(time.monotonic())

    def _run(self) -> Generator[Piece]:
        exchange = self._exchange
        while exchange.finish is None:
            call = exchange.call(time.monotonic())
            try:
                wait_s = yield from self._one(call)
            except (Interrupted, Broken) as problem:
                wait_s = exchange.broke(str(problem), time.monotonic())
            if wait_s:
                time.sleep(wait_s)

    def _one(self, call: Call) -> Generator[Piece, None, float]:
        """One call: yields pieces, returns how long to wait before the next one."""
        exchange, events = self._exchange, Events()
        end_s = None if call.left_s is None else time.monotonic() + call.left_s
        wire = Wire("POST", call.url, {**self._headers, **call.headers}, call.body)
        with _Connection(wire, self._silence_s, end_s) as connection:
            while not (wire.ended or events.done):
                exchange.left_s(time.monotonic())
                data = connection.read()
                if wire.status is not None and wire.status >= 400:
                    body = b"".join(data) + connection.rest()
                    return exchange.refused(wire.status, body, wire.retry_after, time.monotonic())
                for event in events.push(b"".join(data)):
                    piece = exchange.document(event, time.monotonic())
                    if piece is not None:
                        yield piece
        return exchange.ended(time.monotonic()) or 0.0


class Client:
    """A mesh, asked through one node of it or several. Its methods raise ShoalErrors (`shoal.errors`).

        with Client() as shoal:
            print(shoal.chat("embedded", "Tell me about tides"))
            for piece in shoal.stream_chat("embedded", "And about the moon?"):
                print(piece.text, end="")

    Without addresses: those in SHOAL_GATEWAYS, else the node that runs on this computer. With several, an answer goes
    on at the next one where a gateway dies, from the token it had come to. `silence_s`: a gateway that says nothing for
    so long counts as dead (nodes send a sign of life every 5 s). `timeout_s` of a call is for the whole answer.
    """

    def __init__(self, *gateways: str, api_key: str | None = None, silence_s: float = 20.0) -> None:
        self._gateways: Gateways = found(gateways)
        self._headers = key_headers(api_key)
        self._silence_s = silence_s
        self._own: light.LightPeer | None = None

    @classmethod
    def join(cls, invite: str, *, data_dir: str | None = None, wait_s: float = 60.0) -> Client:
        """A client with a node of its own that joins the mesh of `invite` and hosts nothing; closing ends it.

        Its identity stays in `data_dir` (default: `sdk` in Shoal's data directory), so that the same computer is one
        member however often it comes. Raises ShoalError.
        """
        own = light.LightPeer.start(invite, data_dir, wait_s)
        client = cls(own.api)
        client._own = own
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the node that `join` started."""
        if self._own is not None:
            self._own.stop()

    def chat(
        self, model: str, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """The answer to a chat: a text, or messages as OpenAI has them. `options` are the request's fields
        (max_tokens, temperature, top_p, seed, stop, response_format, ...), and `priority`."""
        return self._stream(chat_ask(model, messages, options), timeout_s).answer()

    def stream_chat(
        self, model: str, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> Stream:
        """As `chat`, piece by piece."""
        return self._stream(chat_ask(model, messages, options), timeout_s)

    def complete(
        self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Answer:
        """The continuation of a text, or of token ids."""
        return self._stream(text_ask(model, prompt, options), timeout_s).answer()

    def stream(self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> Stream:
        """As `complete`, piece by piece."""
        return self._stream(text_ask(model, prompt, options), timeout_s)

    def embed(
        self, model: str, texts: str | Sequence[str], *, pooling: str | None = None, timeout_s: float = 60.0
    ) -> list[list[float]]:
        """A vector of unit length for each text."""
        return rows_of(self._simple("POST", "/v1/embeddings", embed_simple(model, texts, pooling), timeout_s))

    def models(self) -> list[Model]:
        """The models of the mesh, ready or not."""
        return models_of(self._simple("GET", "/v1/models", None, 10.0))

    def mesh(self) -> dict[str, Any]:
        """The node's view of the mesh."""
        return self._simple("GET", "/mesh", None, 10.0)

    def _stream(self, ask: Ask, timeout_s: float | None) -> Stream:
        exchange = Exchange(self._gateways, ask, time.monotonic(), timeout_s=timeout_s)
        return Stream(exchange, self._headers, self._silence_s)

    def _simple(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        asked = Simple(self._gateways, time.monotonic(), timeout_s)
        while True:
            address, left_s = asked.call(time.monotonic())
            wire = Wire(method, address + path, self._headers, body)
            try:
                with _Connection(wire, left_s, time.monotonic() + left_s) as connection:
                    data = connection.rest()
            except Broken as problem:
                wait_s = asked.broke(str(problem), time.monotonic())
            else:
                document, wait_s = asked.answered(wire.status or 0, data, wire.retry_after, time.monotonic())
                if document is not None:
                    return document
            time.sleep(wait_s)
