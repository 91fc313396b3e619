"""Attention of grouped query heads, each session's rows with its own cache.

Where it can, torch's fused attention does the work; soft caps and sinks need the scores themselves, and those
are computed for so many queries at a time that memory stays bounded. Knows nothing of batching policy or
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model_shards.config import ModelConfig
from model_shards.kv import SessionKv
from model_shards.linear import AnyLinear, HeadNorms
from model_shards.lowrank import Tuned

SCORES_MAX = 1 << 24  # scores held at once, over all heads


@dataclass(slots=True)
class Rows:
    """``count`` consecutive positions of one session, at rows [offset, offset + count) of the batch.

    Where there are ``branches``, they are rows of a window whose first one stands at ``base``, and each is computed
    as a step of its own. Their keys and values go to the cache's rows from ``position`` on, and row i sees what is
    before ``base`` and the rows ``base + row`` of ``branches[i]``, which ends with itself."""

    kv: SessionKv
    position: int
    count: int
    offset: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    base: int = 0
    branches: Sequence[Sequence[int]] = ()


@dataclass(slots=True)
class Batch:
    """The sessions of one pass, and for each of the model's ropes the rows (cos, sin), each [N, 1, dim], of
    their positions; ``tuned`` where any row has an adapter."""

    rows: list[Rows]
    rotary: list[tuple[torch.Tensor, torch.Tensor]]
    tuned: Tuned | None = None

    def tuned_at(self, layer: int) -> Tuned | None:
        """What adapters add to the parts of ``layer``."""
        return None if self.tuned is None else self.tuned.at(layer)


def mask_of(rows: Rows, first: int, window: int | None) -> torch.Tensor:
    """[n, end - first], True where a query may look: not ahead, not beyond the window. Shared by like
    layers."""
    mask = rows.masks.get(window)
    if mask is None:
        device, end = rows.kv.device, rows.position + rows.count
        queries = torch.arange(rows.position, end, device=device)[:, None]
        keys = torch.arange(first, end, device=device)[None, :]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        rows.masks[window] = mask
    return mask


def seen_in_turn(rows: Rows, layer: int, window: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [T, kv_heads, width] that each row of a window sees, in the order and number that a step of its
    own would find in the cache: the same kernel then gives the same bits."""

    def least(position: int) -> int:
        return 0 if window is None else max(0, position + 1 - window)

    first, base = least(rows.base), rows.base
    whole = rows.kv.read(layer, first, rows.position + rows.count)
    for branch in rows.branches:
        start, straight = least(base + len(branch) - 1), _straight(branch)
        end = base + straight
        if straight == len(branch):
            keys, values = (part[start - first : end - first] for part in whole)
        else:
            rest = branch[max(straight, start - base) :]
            beside = torch.tensor([base + row - first for row in rest], device=rows.kv.device)
            keys, values = (
                torch.cat((part[start - first : max(start, end) - first], part.index_select(0, beside)))
                for part in whole
            )
        yield keys, values


def _straight(branch: Sequence[int]) -> int:
    """How many of its rows, from row 0 on, lie one behind another."""
    if isinstance(branch, range):
        return len(branch)
    return next((at for at, row in enumerate(branch) if row != at), len(branch))


def query_blocks(count: int, scores_a_query: int) -> Iterator[slice]:
    """``count`` queries in pieces whose scores number at most SCORES_MAX (one query at least)."""
    size = max(1, SCORES_MAX // scores_a_query)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def weigh(
    scores: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax in float32 of ``scores`` [..., n, T] where ``mask`` [n, T] allows. A sink (broadcast to [..., 1,
    1]) takes its share of the weight and gives nothing (arXiv 2309.17453, learnt)."""
    bent = scores.float().masked_fill(~mask, -torch.inf)
    if sinks is None:
        return torch.softmax(bent, -1).to(dtype)
    with_sink = torch.cat((bent, sinks.expand(*bent.shape[:-1], 1)), -1)
    return torch.softmax(with_sink, -1)[..., :-1].to(dtype)


def per_session(batch: Batch, attend: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
    """``attend(rows, *their part of given)`` of every session, one below another."""
    if len(batch.rows) == 1:
        return attend(batch.rows[0], *given)
    mixed = [
        attend(rows, *(tensor[rows.offset : rows.offset + rows.count] for tensor in given))
        for rows in batch.rows
    ]
    return torch.cat(mixed)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [N, heads, dim] turned by their positions' rows (see `rope.py`)."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; optional head norms, sliding
    window, soft cap on the scores (arXiv 2408.00118) and a learnt sink a head."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        qkv: AnyLinear,
        out: AnyLinear,
        norms: HeadNorms | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.norms = norms
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.group = config.heads // config.kv_heads
        self.window = config.windows[layer]
        self.rope = config.layer_ropes[layer]
        self.rotary_dim = config.rope.dim
        self.scale = config.attention_scale  # None: 1 / sqrt(head_dim)
        self.cap = config.attention_cap
        self.sinks = sinks.view(self.kv_heads, self.group, 1, 1) if sinks is not None else None
        self._qk_width = (config.heads + config.kv_heads) * config.head_dim

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, hidden] -> [N, hidden]; appends the rows' keys and values to each session's cache."""
        count = x.shape[0]
        fused, tuned = self.qkv(x), batch.tuned_at(self.layer)
        if tuned is not None:
            tuned.add("qkv", x, fused)
        qk = fused[:, : self._qk_width].view(count, self.heads + self.kv_heads, self.head_dim)
        v = fused[:, self._qk_width :].view(count, self.kv_heads, self.head_dim)
        if self.norms is not None:
            qk = self.norms(qk)
        if self.rope is not None:
            qk = self._rotate(qk, *batch.rotary[self.rope])
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        mixed = per_session(batch, self._attend, q, k, v)
        given = self.out(mixed)
        if tuned is not None:
            tuned.add("out", mixed, given)
        return given

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.qkv, self.out

    def _rotate(self, qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dim = self.rotary_dim
        if dim == self.head_dim:
            return rotate(qk, cos, sin)
        return torch.cat((rotate(qk[..., :dim], cos, sin), qk[..., dim:]), dim=-1)

    def _attend(self, rows: Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim], k and v [n, kv_heads, head_dim] -> [n, heads * head_dim]."""
        rows.kv.write(self.layer, rows.position, k, v)
        if rows.branches:
            seen = enumerate(seen_in_turn(rows, self.layer, self.window))
            return torch.cat([self._attend_one(q[at : at + 1], *pair) for at, pair in seen])
        end = rows.position + rows.count
        first = 0 if self.window is None else max(0, rows.position + 1 - self.window)
        keys, values = rows.kv.read(self.layer, first, end)
        if rows.count == 1:
            return self._attend_one(q, keys, values)
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        if self.cap is not None or self.sinks is not None:
            return self._attend_plainly(q, keys[0], values[0], mask_of(rows, first, self.window))
        heads = q.transpose(0, 1).unsqueeze(0)
        causal = rows.position == 0 and (self.window is None or rows.count <= self.window)
        mask = None if causal else mask_of(rows, first, self.window)
        mixed = F.scaled_dot_product_attention(
            heads, keys, values, mask, is_causal=causal, scale=self.scale, enable_gqa=self.group > 1
        )
        return mixed.squeeze(0).transpose(0, 1).reshape(rows.count, -1)

    def _attend_one(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One position that sees all of ``keys`` and ``values`` [T, kv_heads, head_dim] -> [1, heads * head_dim]."""
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        if self.cap is not None or self.sinks is not None:
            every = torch.ones(1, keys.shape[2], dtype=torch.bool, device=keys.device)
            return self._attend_plainly(q, keys[0], values[0], every)
        # The heads of a group stand in for a sequence, so keys are read once and no mask is made.
        grouped = q.reshape(1, self.kv_heads, self.group, self.head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, scale=self.scale).reshape(1, -1)

    def _attend_plainly(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention by its scores, bent by ``cap * tanh(score / cap)``; keys and values [kv_heads, T,
        head_dim]."""
        scale = self.scale if self.scale is not None else self.head_dim**-0.5
        keys, values = keys.unsqueeze(1).transpose(2, 3), values.unsqueeze(1)
        found = []
        for part in query_blocks(q.shape[0], self.heads * keys.shape[-1]):
            grouped = q[part].transpose(0, 1).reshape(self.kv_heads, self.group, -1, self.head_dim)
            scores = torch.matmul(grouped, keys) * scale
            if self.cap is not None:
                scores = torch.tanh(scores / self.cap) * self.cap
            mixed = torch.matmul(weigh(scores, mask[part], q.dtype, self.sinks), values).flatten(0, 1)
            found.append(mixed.transpose(0, 1).flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found)
