"""The KV cache: one pool of equal blocks, lent to sessions layer by layer.

A block holds the keys and values of ``BLOCK_TOKENS`` positions of one layer, so that a session pays only for
the layers it uses. Blocks are handed out in contiguous runs where there are any, and then attention reads
them in place; a scattered session is gathered instead, with the same values. The pool never exceeds its
bytes: admission says NoRoom. Knows nothing of what attention does with the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model_shards.errors import LocalFault, NoRoom, ResourceLimit
from model_shards.kv_int8 import KV_QUANTS, SCALE_BYTES, decode, encode
from model_shards.parking import Parked, ParkingLot
from model_shards.prefix import Page, PrefixCache

BLOCK_TOKENS = 16
RETRY_AFTER_S = 1.0


def stored_shape(
    dtype: torch.dtype, key_width: int, value_width: int, quant: str
) -> tuple[torch.dtype, int, int]:
    """(dtype, key width, value width) of rows as they are stored."""
    if quant == "none":
        return dtype, key_width, value_width
    return torch.uint8, key_width + SCALE_BYTES, value_width + SCALE_BYTES


def kv_row_bytes(kv_shape: tuple[int, int, int], dtype: torch.dtype, quant: str = "none") -> int:
    """Bytes that one position of one layer takes in the cache; ``kv_shape`` is the config's."""
    heads, key_width, value_width = kv_shape
    stored, key_width, value_width = stored_shape(dtype, key_width, value_width, quant)
    return heads * (key_width + value_width) * stored.itemsize


class KvPool:
    """Keys [blocks * BLOCK_TOKENS, kv_heads, key_width] and values [.., value_width] in the compute ``dtype``, or as
    `kv_int8` stores them. Raises LocalFault for another ``quant``."""

    def __init__(
        self,
        bytes_max: int,
        kv_heads: int,
        key_width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
        quant: str = "none",
    ) -> None:
        if quant not in KV_QUANTS:
            raise LocalFault(f"kv_quant {quant!r}, expected one of {', '.join(KV_QUANTS)}")
        self.dtype, self.quantised = dtype, quant == "int8"
        stored, key_width, value_width = stored_shape(dtype, key_width, value_width, quant)
        self.block_bytes = BLOCK_TOKENS * kv_heads * (key_width + value_width) * stored.itemsize
        self.blocks = max(0, bytes_max) // self.block_bytes
        rows = self.blocks * BLOCK_TOKENS
        try:
            self.k = torch.empty(rows, kv_heads, key_width, dtype=stored, device=device)
            self.v = torch.empty(rows, kv_heads, value_width, dtype=stored, device=device)
        except RuntimeError as error:
            raise ResourceLimit(
                f"cannot allocate a KV cache of {bytes_max} bytes on {device}", 60.0
            ) from error
        self._runs: list[tuple[int, int]] = [(0, self.blocks)] if self.blocks else []
        self.free_blocks = self.blocks

    def take(self, layers: int, blocks_a_layer: int) -> list[list[int]]:
        """``blocks_a_layer`` block numbers for each of ``layers`` layers, or NoRoom with nothing taken."""
        wanted = layers * blocks_a_layer
        if wanted > self.free_blocks:
            raise NoRoom(
                f"{wanted} KV blocks wanted, {self.free_blocks} of {self.blocks} are free", RETRY_AFTER_S
            )
        return [self._take_layer(blocks_a_layer) for _ in range(layers)]

    def give(self, blocks: list[int]) -> None:
        """Returns blocks; giving one back twice is a LocalFault."""
        runs = [*self._runs, *((block, 1) for block in blocks)]
        runs.sort()
        joined: list[tuple[int, int]] = []
        for first, count in runs:
            if joined and first < sum(joined[-1]):
                raise LocalFault(f"KV block {first} was given back twice")
            if joined and first == sum(joined[-1]):
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((first, count))
        self._runs = joined
        self.free_blocks += len(blocks)

    def _take_layer(self, count: int) -> list[int]:
        for at, (first, length) in enumerate(self._runs):
            if length >= count:
                self._runs[at : at + 1] = [(first + count, length - count)] if length > count else []
                self.free_blocks -= count
                return list(range(first, first + count))
        taken: list[int] = []
        while len(taken) < count:
            first, length = self._runs.pop()
            used = min(length, count - len(taken))
            taken.extend(range(first, first + used))
            if used < length:
                self._runs.append((first + used, length - used))
        self.free_blocks -= count
        return taken


class KvCache:
    """The pool and its prefix pages: what is free is what nobody holds, cached or not."""

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self.pages = PrefixCache(BLOCK_TOKENS)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return self.pool.free_blocks + self.pages.idle_blocks

    def take(self, layers: int, blocks_a_layer: int) -> list[list[int]]:
        """Blocks as KvPool.take gives them, idle pages evicted as needed. Raises NoRoom with nothing lost."""
        wanted = layers * blocks_a_layer
        if wanted > self.free_blocks:
            raise NoRoom(
                f"{wanted} KV blocks wanted, {self.free_blocks} of {self.pool.blocks} are free", RETRY_AFTER_S
            )
        if wanted > self.pool.free_blocks:
            self.pool.give(self.pages.evict(wanted - self.pool.free_blocks))
        return self.pool.take(layers, blocks_a_layer)


class SessionKv:
    """One session's rows for layers [start, end). ``length`` is how many positions are filled in every layer;
    ``loose`` more rows after them belong to a window's guesses until `adopt` says which of them are right.

    Its blocks are those of the ``pages`` it holds, from position 0 on, then its own. Positions whose tokens
    are known become pages as soon as a block of them is full, and are never written again while anyone holds
    them.
    """

    def __init__(
        self,
        cache: KvCache,
        start: int,
        end: int,
        tokens_max: int,
        *,
        scope: str = "",
        prompt: Sequence[int] = (),
        reuse: Sequence[Page] = (),
        sharing: bool = True,
    ) -> None:
        self.start = start
        self.end = end
        self.tokens_max = tokens_max
        self.length = len(reuse) * BLOCK_TOKENS
        self.loose = 0
        self.device = cache.pool.k.device
        self._cache = cache
        self._scope = scope
        self._sharing = sharing
        self._known = list(prompt)
        self._held = list(reuse)
        self._parked: Parked | None = None
        cache.pages.acquire(self._held)
        try:
            own = cache.take(end - start, -(-tokens_max // BLOCK_TOKENS) - len(self._held))
        except NoRoom:
            cache.pages.release(self._held)
            raise
        self._table = [[page.blocks[at] for page in self._held] + own[at] for at in range(end - start)]
        self._map_layers()

    def write(self, layer: int, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keeps rows [n, kv_heads, width] for positions from ``position`` on; ``length`` is advanced apart."""
        if self._cache.pool.quantised:
            k, v = encode(k), encode(v)
        self.put(layer, position, k, v)

    def put(self, layer: int, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """As `write`, of rows as they are stored."""
        rows = self._layers[layer - self.start]
        if rows.blocks is None:
            rows.keys[position : position + k.shape[0]] = k
            rows.values[position : position + v.shape[0]] = v
        else:
            at = rows.slots(position, k.shape[0])
            rows.keys.index_copy_(0, at, k)
            rows.values.index_copy_(0, at, v)

    def read(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [end - first, kv_heads, width] of positions [first, end); views of contiguous rows that are
        stored as they are."""
        keys, values = self.get(layer, first, end)
        if self._cache.pool.quantised:
            return decode(keys, self._cache.pool.dtype), decode(values, self._cache.pool.dtype)
        return keys, values

    def get(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `read`, of rows as they are stored."""
        rows = self._layers[layer - self.start]
        if rows.blocks is None:
            return rows.keys[first:end], rows.values[first:end]
        skipped = first // BLOCK_TOKENS
        numbers = rows.blocks[skipped : -(-end // BLOCK_TOKENS)]
        at = slice(first - skipped * BLOCK_TOKENS, end - skipped * BLOCK_TOKENS)
        keys, values = (
            whole.view(-1, BLOCK_TOKENS, *whole.shape[1:]).index_select(0, numbers).flatten(0, 1)[at]
            for whole in (rows.keys, rows.values)
        )
        return keys, values

    def advance(self, count: int, tokens: Sequence[int] | None) -> None:
        """``count`` more positions are filled, of ``tokens`` where those and all before are seen here; full blocks
        become pages."""
        if tokens is not None and self._sharing and self.length <= len(self._known):
            self._known[self.length :] = tokens
        self.length += count
        self._share()

    def adopt(self, path: Sequence[int], tokens: Sequence[int] | None) -> None:
        """The loose rows of ``path`` (ascending, 1 for the first loose one) are the next positions, of ``tokens`` where
        those are seen here; the other loose rows are forgotten."""
        for at, row in enumerate(path, self.length):
            source = self.length - 1 + row
            if source != at:
                for layer in range(self.start, self.end):
                    self.put(layer, at, *self.get(layer, source, source + 1))
        self.loose = 0
        self.advance(len(path), tokens)

    def learn(self, tokens: Sequence[int]) -> None:
        """All tokens of the session, told to a stage that saw activations only. Ignored where they
        contradict."""
        if list(tokens[: len(self._known)]) == self._known:
            self._known = list(tokens)
            self._share()

    def rewind(self, position: int) -> None:
        """Forgets positions from ``position`` on. A page that others hold is replaced by a copy, which may
        need room: raises NoRoom with nothing changed."""
        kept = position // BLOCK_TOKENS
        shared = [at for at in range(kept, len(self._held)) if self._held[at].refs > 1]
        fresh = self._cache.take(self.end - self.start, len(shared)) if shared else []
        for at in range(kept, len(self._held)):
            if at not in shared:
                self._cache.pages.forget(self._held[at])
        for number, at in enumerate(shared):
            for layer, row in enumerate(self._table):
                self._copy_block(row[at], fresh[layer][number])
                row[at] = fresh[layer][number]
        self._cache.pages.release([self._held[at] for at in shared])
        del self._held[kept:]
        del self._known[position:]
        self.length, self.loose = position, 0
        if shared:
            self._map_layers()

    @property
    def parked(self) -> bool:
        """Whether its rows lie in a parking lot."""
        return self._parked is not None

    @property
    def blocks(self) -> int:
        """How many blocks its rows take where none are shared."""
        return (self.end - self.start) * -(-self.tokens_max // BLOCK_TOKENS)

    def park(self, lot: ParkingLot) -> None:
        """Moves its rows into ``lot`` and frees its blocks. Raises NoRoom with nothing changed."""
        count = self.length + self.loose
        filled = [rows for layer in range(self.start, self.end) for rows in self.get(layer, 0, count)]
        self._parked = lot.put(filled)
        self.release()

    def unpark(self, lot: ParkingLot) -> None:
        """Takes blocks again (shared with nobody) and brings its rows back, bit for bit. Raises NoRoom or OSError
        with nothing changed."""
        if self._parked is None:
            raise LocalFault("a session that is not parked cannot come back")
        own = self._cache.take(self.end - self.start, -(-self.tokens_max // BLOCK_TOKENS))
        self._table = own
        self._map_layers()
        try:
            rows = iter(lot.read(self._parked))
            for layer, (keys, values) in enumerate(zip(rows, rows, strict=True), self.start):
                self.put(layer, 0, keys.to(self.device), values.to(self.device))
        except OSError:
            self.release()
            raise
        lot.drop(self._parked)
        self._parked = None

    def release(self, lot: ParkingLot | None = None) -> None:
        """Lets go of every page, gives every block of its own back and forgets what is parked in ``lot``. The session
        must not be used again."""
        if self._parked is not None and lot is not None:
            lot.drop(self._parked)
            self._parked = None
        for row in self._table:
            self._cache.pool.give(row[len(self._held) :])
        self._cache.pages.release(self._held)
        self._table, self._held = [], []

    def _share(self) -> None:
        """Makes pages of full blocks whose tokens are known, as far as no one else's page stands in the
        way."""
        while (end := (len(self._held) + 1) * BLOCK_TOKENS) <= min(self.length, len(self._known)):
            at = len(self._held)
            tokens = self._known[end - BLOCK_TOKENS : end]
            parent = self._held[-1] if self._held else None
            page = self._cache.pages.add(self._scope, parent, tokens, [row[at] for row in self._table])
            if page is None:
                return
            self._held.append(page)

    def _copy_block(self, source: int, target: int) -> None:
        for rows in (self._cache.pool.k, self._cache.pool.v):
            blocks = rows.view(-1, BLOCK_TOKENS, *rows.shape[1:])
            blocks[target] = blocks[source]

    def _map_layers(self) -> None:
        self._layers: list[_LayerRows] = [_layer_rows(self._cache.pool, row) for row in self._table]


@dataclass(slots=True)
class _LayerRows:
    """Where a layer's rows are: ``keys`` and ``values`` in place if ``blocks`` is None, else pool and block
    numbers."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: torch.Tensor | None

    def slots(self, position: int, count: int) -> torch.Tensor:
        """Pool rows of ``count`` positions of a scattered session."""
        if self.blocks is None:
            raise LocalFault("a contiguous session is written in place")
        positions = torch.arange(position, position + count, device=self.keys.device)
        return self.blocks[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS


def _layer_rows(pool: KvPool, blocks: list[int]) -> _LayerRows:
    first = blocks[0]
    if blocks == list(range(first, first + len(blocks))):
        rows = slice(first * BLOCK_TOKENS, (first + len(blocks)) * BLOCK_TOKENS)
        return _LayerRows(pool.k[rows], pool.v[rows], None)
    return _LayerRows(pool.k, pool.v, torch.tensor(blocks, device=pool.k.device))
