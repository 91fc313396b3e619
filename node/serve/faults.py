"""Faults of a chain of stages: found inside exception groups and told to whoever waits.

Pure functions over exceptions; they log nothing and retry nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from model_shards import ModelError
from node.errors import GatewayError, Overloaded, StageLost
from node.serve.compute import Abandoned
from p2p import CallFailed, PeerLost, RemoteFault, RpcRefusal


def leaves(problem: BaseException) -> Iterator[BaseException]:
    """The exceptions inside nested groups."""
    if isinstance(problem, BaseExceptionGroup):
        for inner in problem.exceptions:
            yield from leaves(inner)
    else:
        yield problem


def raise_as_gateway_error(problem: BaseException, first: str) -> None:
    """What a broken chain means to the client; anything that is not the mesh's doing is raised as it is."""
    for leaf in leaves(problem):
        if isinstance(leaf, GatewayError):
            raise leaf from None
        if isinstance(leaf, CallFailed) and leaf.code == "busy":
            raise Overloaded(leaf.retry_after_s or 1.0) from None
        if isinstance(leaf, CallFailed):
            raise StageLost((leaf.detail or {}).get("peer", leaf.peer), leaf.message) from None
        if isinstance(leaf, PeerLost):
            raise StageLost(leaf.peer, str(leaf)) from None
        if isinstance(leaf, RemoteFault):
            raise StageLost(first, str(leaf)) from None
    raise problem


def raise_single(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the one exception inside a group by itself; a group of several as it is."""
    found = list(leaves(group))
    if len(found) == 1:
        raise found[0] from None
    raise group


def refusal_of(problem: BaseException) -> RpcRefusal | None:
    """What to tell the stage before (and through it the gateway) about the first fault in `problem`."""
    for leaf in leaves(problem):
        if isinstance(leaf, RpcRefusal):
            return leaf
        if isinstance(leaf, CallFailed):
            return RpcRefusal(
                leaf.code, leaf.message, leaf.retry_after_s, detail=leaf.detail or {"peer": leaf.peer}
            )
        if isinstance(leaf, PeerLost):
            return RpcRefusal("unavailable", str(leaf), detail={"peer": leaf.peer})
        if isinstance(leaf, RemoteFault):
            return RpcRefusal("unavailable", str(leaf))
        if isinstance(leaf, ModelError | Abandoned):
            return RpcRefusal("invalid", str(leaf))
    return None
