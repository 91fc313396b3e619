"""Multi-head latent attention (arXiv 2405.04434, 2.1): keys and values of all heads come from one small latent.

Only the latent and one rotated key a position are cached. For few queries the up-projection is moved to the
query and the result (the paper's absorption), so that the cache is read as it lies; for many it is cheaper to
expand keys and values of every head for the call. Which way depends on a step's shape only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model_shards.attention import (
    Batch,
    Rows,
    mask_of,
    per_session,
    query_blocks,
    rotate,
    seen_in_turn,
    weigh,
)
from model_shards.config import ModelConfig
from model_shards.errors import LocalFault
from model_shards.families.base import LatentShape
from model_shards.linear import AnyLinear, Linear, RmsNorm


class LatentAttention:
    """``down`` makes the compressed query (where there is one), the latent and the rotated key of a row
    [q_rank + kv_rank + rope_dim, hidden]; ``q`` the query heads of the compressed query, or of the row itself;
    ``kv_b`` [heads * (nope_dim + v_dim), kv_rank] keys and values of a latent."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        down: AnyLinear,
        q: AnyLinear,
        kv_b: AnyLinear,
        out: AnyLinear,
        q_norm: RmsNorm | None,
        kv_norm: RmsNorm,
    ) -> None:
        if config.latent is None or not isinstance(kv_b, Linear):
            raise LocalFault("latent attention needs its widths and an unquantised up-projection")
        self.layer = layer
        self.shape: LatentShape = config.latent
        self.heads = config.heads
        self.down, self.q, self.kv_b, self.out = down, q, kv_b, out
        self.q_norm, self.kv_norm = q_norm, kv_norm
        self.rope = config.layer_ropes[layer]
        self.scale = config.attention_scale or config.head_dim**-0.5
        ups = kv_b.weight.view(self.heads, self.shape.nope_dim + self.shape.v_dim, self.shape.kv_rank)
        self._key_up, self._value_up = ups[:, : self.shape.nope_dim], ups[:, self.shape.nope_dim :].mT

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, hidden] -> [N, hidden]; appends the rows' latents and rotated keys to each session's cache."""
        shape, below, tuned = self.shape, self.down(x), batch.tuned_at(self.layer)
        if tuned is not None:
            tuned.add("latent", x, below)
        latent, key = below[:, -shape.kv_rank - shape.rope_dim : -shape.rope_dim], below[:, -shape.rope_dim :]
        source = x if self.q_norm is None else self.q_norm(below[:, : shape.q_rank])
        flat = self.q(source)
        if tuned is not None:
            tuned.add("q", source, flat)
        queries = flat.view(x.shape[0], self.heads, -1)
        still, turned = queries[..., : shape.nope_dim], queries[..., shape.nope_dim :]
        key = key.unsqueeze(1)
        if self.rope is not None:
            cos, sin = batch.rotary[self.rope]
            turned, key = rotate(self._halves(turned), cos, sin), rotate(self._halves(key), cos, sin)
        latent = self.kv_norm(latent).unsqueeze(1)
        mixed = per_session(batch, self._attend, still, turned, latent, key)
        given = self.out(mixed)
        if tuned is not None:
            tuned.add("out", mixed, given)
        return given

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.down, self.q, self.kv_b, self.out

    def _halves(self, heads: torch.Tensor) -> torch.Tensor:
        """Neighbouring pairs as two halves. Queries and keys alike: their products stay what they were."""
        if not self.shape.interleaved:
            return heads
        return heads.view(*heads.shape[:-1], -1, 2).mT.flatten(-2)

    def _attend(
        self,
        rows: Rows,
        still: torch.Tensor,
        turned: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
    ) -> torch.Tensor:
        """still [n, heads, nope_dim], turned [n, heads, rope_dim], latent [n, 1, kv_rank], key [n, 1,
        rope_dim] -> [n, heads * v_dim]."""
        rows.kv.write(self.layer, rows.position, latent, key)
        if rows.branches:
            parts = []
            for at, (latents, keys) in enumerate(seen_in_turn(rows, self.layer, None)):
                every = torch.ones(1, latents.shape[0], dtype=torch.bool, device=latents.device)
                parts.append(self._attend_to(still[at : at + 1], turned[at : at + 1], latents, keys, every))
            return torch.cat(parts)
        latents, keys = rows.kv.read(self.layer, 0, rows.position + rows.count)
        return self._attend_to(still, turned, latents, keys, mask_of(rows, 0, None))

    def _attend_to(
        self,
        still: torch.Tensor,
        turned: torch.Tensor,
        latents: torch.Tensor,
        keys: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The same over ``latents`` [T, 1, kv_rank] and ``keys`` [T, 1, rope_dim] where ``mask`` [n, T] allows."""
        latents, keys = latents.squeeze(1), keys.squeeze(1)
        count, found = still.shape[0], []
        expand = self._expanding_pays(count)
        ups = values = latents.new_empty(0)
        if expand:
            both = F.linear(latents, self.kv_b.weight).view(latents.shape[0], self.heads, -1).transpose(0, 1)
            ups, values = both[..., : self.shape.nope_dim], both[..., self.shape.nope_dim :]
        for part in query_blocks(count, self.heads * latents.shape[0]):
            query = still[part].transpose(0, 1)
            if expand:
                scores = torch.matmul(query, ups.mT)
            else:
                scores = torch.matmul(torch.bmm(query, self._key_up), latents.mT)
            scores = (scores + torch.matmul(turned[part].transpose(0, 1), keys.mT)) * self.scale
            weights = weigh(scores, mask[part], still.dtype)
            if expand:
                mixed = torch.bmm(weights, values)
            else:
                mixed = torch.bmm(torch.matmul(weights, latents), self._value_up)
            found.append(mixed.transpose(0, 1).flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _expanding_pays(self, queries: int) -> bool:
        """Multiplications a cached position and head: kv_rank * (nope + v) once to expand it, against what a
        query pays more for wide products."""
        shape = self.shape
        narrow = shape.nope_dim + shape.v_dim
        return queries * (2 * shape.kv_rank - narrow) > shape.kv_rank * narrow
