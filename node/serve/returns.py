"""Tokens on their way back: the last stage of a session delivers them to whoever waits for that session here.

A node may wait twice for one session (as its gateway and as its first stage). Offers for sessions nobody waits for are
refused, so that a stranger cannot make this node hold tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from node.serve.protocol import RETURN, Guesses, ReturnOpen, Role, TokenOut
from p2p import Call, Channel, Rpc, RpcRefusal

TOKENS_BUFFERED = 256


class Returns:
    """Serves RETURN and hands each session's tokens to the task that expects them."""

    def __init__(self, rpc: Rpc) -> None:
        self._waiting: dict[tuple[str, Role, int], tuple[str, trio.MemorySendChannel[TokenOut]]] = {}
        self._back: dict[tuple[str, Role, int], Channel[TokenOut, Guesses]] = {}
        rpc.serve_channel(RETURN, self._serve)

    @contextlib.contextmanager
    def expect(
        self, session: str, role: Role, last: str, epoch: int = 0
    ) -> Iterator[trio.MemoryReceiveChannel[TokenOut]]:
        """Receive a session's tokens from its last stage, on peer `last` of the chain of `epoch`, for as long as the
        block lasts."""
        key = (session, role, epoch)
        if key in self._waiting:
            raise RpcRefusal("invalid", f"session {session} is already open here")
        send, receive = trio.open_memory_channel[TokenOut](TOKENS_BUFFERED)
        self._waiting[key] = last, send
        try:
            with send, receive:
                yield receive
        finally:
            del self._waiting[key]

    async def guess(self, session: str, guesses: Guesses, epoch: int = 0) -> None:
        """Tell the last stage of a session, which has returned tokens to its first stage here, what it is to check.
        Raises P2pError where it has left."""
        back = self._back.get((session, "stage", epoch))
        if back is None:
            raise RpcRefusal("unavailable", f"the last stage left session {session}")
        await back.send(guesses)

    def __len__(self) -> int:
        return len(self._waiting)

    async def _serve(self, call: Call, request: ReturnOpen, channel: Channel[TokenOut, Guesses]) -> None:
        key = request.session, request.role, request.epoch
        last, taker = self._waiting.get(key, ("", None))
        if taker is None or call.peer != last:
            raise RpcRefusal("not_found", f"nobody here waits for session {request.session}")
        self._back[key] = channel
        try:
            async for token in channel:
                try:
                    await taker.send(token)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
        finally:
            self._back.pop(key, None)
