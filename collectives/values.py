"""Results that were decided, for members that missed their bytes: served by digest, fetched by chunks from holders.

Every chunk is checked by its hash, the hashes and the layout by the digest that was voted on, so that it does not
matter who serves them. It knows nothing of rounds, and keeps nothing itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import trio
from blake3 import blake3

from collectives.agreement import Declaration, Value
from collectives.errors import CollectiveError, RemoteFault
from collectives.reduce import ExchangeSettings, Layout, Result, digest_of
from collectives.reduce.evidence import layout_name
from collectives.reduce.result import HASH_BYTES
from p2p import Call, Method, P2pError, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.collectives")

CHUNK_BYTES_MAX = 64 << 20
TENSORS_MAX = 1 << 17
ELEMENTS_MAX = 1 << 42
REQUESTS_AT_ONCE = 4
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class AskValue:
    """`index` -1 asks for the head."""

    run: str
    tag: str
    digest: bytes
    index: int


@dataclass(frozen=True, slots=True)
class ValueHead:
    """Shapes and dtypes of the tensors, elements a chunk, 32 bytes of hash for each chunk."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    chunk_elements: int
    hashes: bytes


@dataclass(frozen=True, slots=True)
class ValueChunk:
    data: Tensor


HEAD = Method(
    "collectives/value/head", AskValue, ValueHead, body_bytes_max=16 << 20, deadline_s=30.0, lane="bulk"
)
CHUNK = Method(
    "collectives/value/chunk", AskValue, ValueChunk, body_bytes_max=4096, payload_bytes_max=CHUNK_BYTES_MAX,
    deadline_s=60.0, lane="bulk",
)  # fmt: skip


def value_digest(declaration: Declaration, result: bytes) -> bytes:
    """What is voted on: these bytes (`result`: their digest) as the mean over this declaration, and over no other."""
    return blake3(b"shoal value 1\0" + declaration.key + result).digest()


Lookup = Callable[[str, str, bytes], Result | None]


class ValueServer:
    """Answers for all runs of a node; `lookup(run, tag, digest)` finds a whole result."""

    def __init__(self, rpc: Rpc, lookup: Lookup) -> None:
        self._lookup = lookup
        rpc.serve(HEAD, self._head)
        rpc.serve(CHUNK, self._chunk)

    def _find(self, ask: AskValue) -> Result:
        result = self._lookup(ask.run, ask.tag, ask.digest)
        if result is None:
            raise RpcRefusal("absent", "this result is not held here")
        return result

    async def _head(self, call: Call, ask: AskValue) -> ValueHead:
        await trio.lowlevel.checkpoint()
        result = self._find(ask)
        layout = result.layout
        dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in layout.dtypes)
        return ValueHead(layout.shapes, dtypes, layout.chunk_elements, result.hashes)

    async def _chunk(self, call: Call, ask: AskValue) -> ValueChunk:
        await trio.lowlevel.checkpoint()
        result = self._find(ask)
        if not 0 <= ask.index < result.layout.chunks:
            raise RpcRefusal("absent", f"the result has {result.layout.chunks} chunks")
        data = b"".join(result.payload(ask.index))
        return ValueChunk(Tensor("uint8", (len(data),), data))


async def fetch_value(
    rpc: Rpc,
    run: str,
    tag: str,
    value: Value,
    settings: ExchangeSettings,
    holders: Sequence[str],
    like: Sequence[torch.Tensor] | None,
) -> Result:
    """The whole result of `value`, from the first holders that have it. Raises collectives' RemoteFault when none
    of them gives all of it. `like`: tensors whose devices the result's shall have."""
    digest, declaration = value.digest, value.declaration
    for peer in holders:
        try:
            head = await rpc.call(peer, HEAD, AskValue(run, tag, digest, -1))
            layout = _layout(peer, head, declaration.layout, settings)
            if (
                len(head.hashes) != HASH_BYTES * layout.chunks
                or value_digest(declaration, digest_of(layout, head.hashes)) != digest
            ):
                raise RemoteFault(f"{peer} lists hashes that are not those of the decided result")
            result, hashes = Result(layout, like), head.hashes
        except (P2pError, CollectiveError) as problem:
            log.info("no decided result from %s: %s", peer, problem)
            continue
        others = [peer, *(other for other in holders if other != peer)]
        await _collect(rpc, run, tag, digest, result, hashes, others)
        if result.done:
            return result
    raise RemoteFault(f"none of {len(holders)} holders gives the decided result")


def _layout(peer: str, head: ValueHead, name: bytes, settings: ExchangeSettings) -> Layout:
    """RemoteFault for anything but the layout that was declared."""
    dtypes = [getattr(torch, name, None) for name in head.dtypes]
    sizes = [size for shape in head.shapes for size in shape]
    if (
        len(head.shapes) > TENSORS_MAX
        or not all(isinstance(dtype, torch.dtype) for dtype in dtypes)
        or any(size < 0 for size in sizes)
        or sum(math.prod(shape) for shape in head.shapes) > ELEMENTS_MAX
        or head.chunk_elements < 1
    ):
        raise RemoteFault(f"{peer} describes a result that cannot be")
    layout = Layout(head.shapes, [dtype for dtype in dtypes if dtype is not None], head.chunk_elements)
    if layout_name(layout, settings) != name:
        raise RemoteFault(f"{peer} describes another layout than the one that was declared")
    return layout


async def _collect(
    rpc: Rpc, run: str, tag: str, digest: bytes, result: Result, hashes: bytes, holders: Sequence[str]
) -> None:
    """As much as the holders give; `result.done` tells whether that was all."""
    missing = list(range(result.layout.chunks))

    async def work(peer: str, scope: trio.CancelScope) -> None:
        while missing:
            index = missing.pop()
            try:
                answer = await rpc.call(peer, CHUNK, AskValue(run, tag, digest, index))
                result.accept(peer, index, memoryview(answer.data.data), hashes)
            except (P2pError, CollectiveError) as problem:
                log.info("%s gives no more of the decided result: %s", peer, problem)
                missing.append(index)
                scope.cancel()
                return

    for peer in holders:
        async with trio.open_nursery() as nursery:
            for _ in range(REQUESTS_AT_ONCE):
                nursery.start_soon(work, peer, nursery.cancel_scope)
        missing = [index for index in range(result.layout.chunks) if not result.has(index)]
        if result.done:
            return
