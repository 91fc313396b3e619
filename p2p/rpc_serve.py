"""Between the mesh and our handlers: the one boundary where whatever a handler raises becomes an answer.

Knows which exceptions mean what to a caller. It does not know streams, or when handlers are cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from p2p.errors import CallFailed, EndOfChannel, PeerLost, RemoteFault, ResourceLimit, RpcRefusal
from p2p.frames import Refusal
from p2p.messages import codec_of
from p2p.rpc_lane import Channel, Port, decode_or_fail
from p2p.rpc_types import Call, Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A method with its handler; `channel` tells which of the two kinds it is."""

    method: Method[Any, Any]
    handler: Callable[..., Awaitable[Any]]
    channel: bool


async def answer(served: Served, port: Port) -> Refusal | None:
    """The boundary between the mesh and our handlers: whatever a handler raises ends its own call only, and the node
    goes on. Queues the answer, or returns what to tell the caller instead."""
    method = served.method
    call = Call(port.lane.peer, port.state.deadline)
    try:
        received = port.lane.core.take(port.state)
        if received is None:
            return Refusal("invalid", "a call without a request")
        request = decode_or_fail(port, codec_of(method.request), received)
        if served.channel:
            upstream = None if method.upstream is None else codec_of(method.upstream)
            channel: Channel[Any, Any] = Channel(port, upstream, codec_of(method.reply), method.limits)
            await served.handler(call, request, channel)
        else:
            reply = await served.handler(call, request)
            port.queue(codec_of(method.reply).encode(reply), method.limits)
        return None
    except Exception as problem:  # handlers are anyone's code; what is not understood is logged whole
        refusal = refusal_of(problem)
        if refusal is None:
            logger.exception("the handler of %s failed for %s", method.name, call.peer)
            refusal = Refusal("internal", f"the handler of {method.name} failed")
        return refusal


def _leaves(problem: BaseException) -> Iterator[BaseException]:
    if isinstance(problem, BaseExceptionGroup):
        for inner in problem.exceptions:
            yield from _leaves(inner)
    else:
        yield problem


def refusal_of(problem: BaseException) -> Refusal | None:
    """What a handler's failure means to its caller; None for a fault of our own.

    Within a group a refusal counts first; a single fault of our own makes the whole group one.
    """
    leaves = list(_leaves(problem))
    for leaf in leaves:
        if isinstance(leaf, RpcRefusal):
            return Refusal(leaf.code, leaf.message, leaf.retry_after_s, leaf.detail)
    if not all(isinstance(leaf, RemoteFault | ResourceLimit | EndOfChannel) for leaf in leaves):
        return None
    leaf = leaves[0]
    if isinstance(leaf, EndOfChannel):
        return Refusal("invalid", str(leaf))
    if isinstance(leaf, ResourceLimit):
        return Refusal("busy", str(leaf), leaf.retry_after_s)
    detail = {"cause": type(leaf).__name__}
    if isinstance(leaf, CallFailed):
        return Refusal(
            "unavailable", str(leaf), leaf.retry_after_s, {"peer": leaf.peer} | detail | leaf.detail
        )
    if isinstance(leaf, PeerLost):
        detail["peer"] = leaf.peer
    return Refusal("unavailable", str(leaf), None, detail)
