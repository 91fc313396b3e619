"""The KV cache: one pool of equal blocks, lent to sessions layer by layer.

A block holds the keys and values of ``BLOCK_TOKENS`` positions of one layer, so that a session pays only for
the layers it uses. Blocks are handed out in contiguous runs where there are any, and then attention reads
them in place; a scattered session is gathered instead, with the same values. The pool never exceeds its
bytes: admission says NoRoom. Knows nothing of what attention does with the rows.
"""

from __future__ import annotations

import torch

from model_shards.errors import LocalFault, NoRoom, ResourceLimit

BLOCK_TOKENS = 16
RETRY_AFTER_S = 1.0


class KvPool:
    """Keys and values, each [blocks * BLOCK_TOKENS, kv_heads, head_dim] in the compute dtype."""

    def __init__(
        self, bytes_max: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_bytes = 2 * BLOCK_TOKENS * kv_heads * head_dim * dtype.itemsize
        self.blocks = max(0, bytes_max) // self.block_bytes
        shape = (self.blocks * BLOCK_TOKENS, kv_heads, head_dim)
        try:
            self.k = torch.empty(shape, dtype=dtype, device=device)
            self.v = torch.empty(shape, dtype=dtype, device=device)
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


class SessionKv:
    """One session's rows for layers [start, end). ``length`` is how many positions are filled in every
    layer."""

    def __init__(self, pool: KvPool, start: int, end: int, tokens_max: int) -> None:
        self.start = start
        self.end = end
        self.tokens_max = tokens_max
        self.length = 0
        self.device = pool.k.device
        self._pool = pool
        self._blocks = pool.take(end - start, -(-tokens_max // BLOCK_TOKENS))
        self._layers = [_layer_rows(pool, blocks) for blocks in self._blocks]

    @property
    def block_count(self) -> int:
        return sum(len(blocks) for blocks in self._blocks)

    def write(self, layer: int, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores rows [n, kv_heads, head_dim] for positions from ``position`` on; ``length`` is advanced
        apart."""
        keys, values, slots = self._layers[layer - self.start]
        if slots is None:
            keys[position : position + k.shape[0]] = k
            values[position : position + v.shape[0]] = v
        else:
            at = slots[position : position + k.shape[0]]
            keys.index_copy_(0, at, k)
            values.index_copy_(0, at, v)

    def read(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [end - first, kv_heads, head_dim] of positions [first, end); views where rows are
        contiguous."""
        keys, values, slots = self._layers[layer - self.start]
        if slots is None:
            return keys[first:end], values[first:end]
        at = slots[first:end]
        return keys.index_select(0, at), values.index_select(0, at)

    def release(self) -> None:
        """Gives every block back. The session must not be used again."""
        for blocks in self._blocks:
            self._pool.give(blocks)
        self._blocks, self._layers = [], []


def _layer_rows(pool: KvPool, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    first = blocks[0]
    if blocks == list(range(first, first + len(blocks))):
        rows = slice(first * BLOCK_TOKENS, (first + len(blocks)) * BLOCK_TOKENS)
        return pool.k[rows], pool.v[rows], None
    numbers = torch.tensor(blocks, device=pool.k.device)
    slots = numbers[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=pool.k.device)
    return pool.k, pool.v, slots.reshape(-1)
