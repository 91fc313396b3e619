"""The listening side: sockets, connection limits, stalled readers, and a prompt stop.

HTTP itself is hypercorn's trio worker; one of its connection handlers runs for each accepted stream. It
knows nothing of what the application answers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from starlette.applications import Starlette

from node.api.answers import dump
from node.api.config import ServerConfig
from node.api.problems import ApiProblem
from node.errors import ListenProblem

log = logging.getLogger("shoal.http")
TURN_AWAY_S = 1.0
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class _Connection:
    """An accepted stream whose `send_all` gives up on a reader that takes nothing for `stall_s`.

    hypercorn shields its sending from cancellation, so the limit and the close on stop have to sit beneath
    it.
    """

    def __init__(
        self, stream: trio.SocketStream, stall_s: float, closed: Callable[[_Connection], None]
    ) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._closed = closed
        self.socket = stream.socket

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(self._stall_s) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            self.close()
            raise trio.BrokenResourceError("the client stopped reading")

    async def receive_some(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once; whoever waits on the stream gets ClosedResourceError."""
        self.socket.close()
        self._closed(self)


class _Handler(TCPServer):  # type: ignore[misc]  # hypercorn is not typed for us
    """hypercorn's handler of one connection, which otherwise keeps a client that left for the whole idle time."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


class _Server:
    """Accepts, limits and, at the end, closes connections."""

    def __init__(self, app: Starlette, config: ServerConfig) -> None:
        self._config = config
        self._app = app
        self._wrapped = ASGIWrapper(app)
        self._context = WorkerContext(None)
        self._connections: set[_Connection] = set()
        self._stop = trio.Event()
        self._hypercorn = Config()
        self._hypercorn.errorlog = log
        self._hypercorn.accesslog = None
        self._hypercorn.include_server_header = False
        self._hypercorn.keep_alive_timeout = config.idle_s
        self._hypercorn.keep_alive_max_requests = 1_000_000
        self._hypercorn.h11_max_incomplete_size = config.header_bytes_max

    async def accept(self, listeners: list[trio.SocketListener], nursery: trio.Nursery) -> None:
        """Take connections until cancelled; their handlers run in `nursery`, which outlives this."""
        try:
            await trio.serve_listeners(self._handle, listeners, handler_nursery=nursery)
        finally:
            self._stop.set()

    async def connections(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """Hold the connections' nursery, shielded, until `accept` ended; then stop within `stop_grace_s`."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as closer:
                async with trio.open_nursery() as nursery:
                    task_status.started(nursery)
                    await self._stop.wait()
                    self._app.state.stopping.set()
                    await self._context.terminated.set()
                    nursery.cancel_scope.deadline = trio.current_time() + self._config.stop_grace_s
                    closer.start_soon(self._close_all_at, nursery.cancel_scope.deadline)
                closer.cancel_scope.cancel()

    async def _close_all_at(self, deadline: float) -> None:
        await trio.sleep_until(deadline)
        for connection in tuple(self._connections):
            connection.close()

    async def _handle(self, stream: trio.SocketStream) -> None:
        connection = _Connection(stream, self._config.send_stall_s, self._connections.discard)
        self._connections.add(connection)
        try:
            if len(self._connections) > self._config.connections_max:
                await _turn_away(connection)
                return
            server = _Handler(self._wrapped, self._hypercorn, self._context, ConnectionState({}), connection)
            await server.run()
        except Exception:  # a bug in one connection must not end the others
            log.exception("an HTTP connection failed")
        finally:
            connection.close()


async def serve_http(
    app: Starlette,
    host: str,
    port: int,
    *,
    config: ServerConfig | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` (made by build_app) until cancelled; reports the URL that clients on this computer can use.

    Raises ListenProblem where the address cannot be bound. When cancelled, open requests end with an error
    and every connection is closed within `stop_grace_s`. Serves one run: an app that was stopped stays
    stopped.
    """
    server = _Server(app, config or ServerConfig())
    listeners = await _listen(host, port)
    bound = listeners[0].socket.getsockname()[1]
    shown = WILDCARDS.get(host, host)
    async with trio.open_nursery() as nursery:
        connections = await nursery.start(server.connections)
        nursery.start_soon(server.accept, listeners, connections)
        task_status.started(f"http://[{shown}]:{bound}" if ":" in shown else f"http://{shown}:{bound}")


async def _turn_away(connection: _Connection) -> None:
    """Say that there is no room, and read what the client sends so that it sees the answer and no reset."""
    message = "this node serves as many connections as it may; try again in a moment"
    problem = ApiProblem(503, message, kind="server_error", code="too_many_connections", retry_after_s=1.0)
    body = dump(problem.body())
    head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += f"retry-after: 1\r\ncontent-length: {len(body)}\r\n\r\n"
    with trio.move_on_after(TURN_AWAY_S), contextlib.suppress(trio.BrokenResourceError):
        await connection.send_all(head.encode() + body)
        await connection.send_eof()
        while await connection.receive_some(1 << 16):
            continue


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        # "localhost" may mean two addresses, and port 0 would give each a port of its own.
        return list(await trio.open_tcp_listeners(port, host="127.0.0.1" if host == "localhost" else host))
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            reason = "another program uses this port; choose another with --api HOST:PORT"
        elif problem.errno in (errno.EACCES, errno.EPERM):
            reason = "this needs more rights; choose a port above 1023 with --api HOST:PORT"
        else:
            reason = problem.strerror or str(problem)
        raise ListenProblem(host, port, reason) from None
