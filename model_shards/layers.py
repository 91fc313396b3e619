"""The parts of a decoder layer, over rows of several sessions at once.

Norms and linear maps see all rows [N, hidden] together; attention sees each session's rows with its own
cache. Plain objects instead of torch modules: a decode step of a small model is mostly call overhead. Knows
nothing of batching policy, sampling or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model_shards.config import ModelConfig
from model_shards.kv import SessionKv


@dataclass(slots=True)
class Rows:
    """``count`` consecutive positions of one session, at rows [offset, offset + count) of the batch."""

    kv: SessionKv
    position: int
    count: int
    offset: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """The sessions of one pass, and the rotary rows (cos, sin), each [N, 1, dim], of their positions."""

    rows: list[Rows]
    cos: torch.Tensor
    sin: torch.Tensor


class Linear:
    """y = x @ weight.T + bias; weight [out, in], x [N, in]."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class RmsNorm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), reduced in float32."""

    __slots__ = ("eps", "shape", "weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self.shape = tuple(weight.shape[-1:])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, optional head norms and sliding
    window."""

    def __init__(
        self, config: ModelConfig, layer: int, qkv: Linear, out: Linear, norms: torch.Tensor | None
    ) -> None:
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.norms = norms  # [heads + kv_heads, head_dim]: query heads' weights, then key heads'
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.group = config.heads // config.kv_heads
        self.window = config.windows[layer]
        self.eps = config.norm_eps
        self.rotary_dim = config.rope.dim
        self._qk_width = (config.heads + config.kv_heads) * config.head_dim

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, hidden] -> [N, hidden]; appends the rows' keys and values to each session's cache."""
        count = x.shape[0]
        fused = self.qkv(x)
        qk = fused[:, : self._qk_width].view(count, self.heads + self.kv_heads, self.head_dim)
        v = fused[:, self._qk_width :].view(count, self.kv_heads, self.head_dim)
        if self.norms is not None:
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps) * self.norms
        qk = self._rotate(qk, batch)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if len(batch.rows) == 1:
            return self.out(self._attend(batch.rows[0], q, k, v))
        mixed = [
            self._attend(rows, q[a : a + rows.count], k[a : a + rows.count], v[a : a + rows.count])
            for rows in batch.rows
            for a in (rows.offset,)
        ]
        return self.out(torch.cat(mixed))

    def _rotate(self, qk: torch.Tensor, batch: Batch) -> torch.Tensor:
        dim = self.rotary_dim
        if dim == self.head_dim:
            return torch.addcmul(qk * batch.cos, qk.roll(dim // 2, -1), batch.sin)
        turned = qk[..., :dim]
        turned = torch.addcmul(turned * batch.cos, turned.roll(dim // 2, -1), batch.sin)
        return torch.cat((turned, qk[..., dim:]), dim=-1)

    def _attend(self, rows: Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim], k and v [n, kv_heads, head_dim] -> [n, heads * head_dim]."""
        rows.kv.write(self.layer, rows.position, k, v)
        end = rows.position + rows.count
        first = 0 if self.window is None else max(0, rows.position + 1 - self.window)
        keys, values = rows.kv.read(self.layer, first, end)
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        if rows.count == 1:
            # One position: the heads of a group stand in for a sequence, so keys are read once and no mask is made.
            grouped = q.view(1, self.kv_heads, self.group, self.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values).reshape(1, -1)
        heads_first = q.transpose(0, 1).unsqueeze(0)
        causal = rows.position == 0 and (self.window is None or rows.count <= self.window)
        mask = None if causal else self._mask(rows, first, end)
        mixed = F.scaled_dot_product_attention(
            heads_first, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.group > 1
        )
        return mixed.squeeze(0).transpose(0, 1).reshape(rows.count, -1)

    def _mask(self, rows: Rows, first: int, end: int) -> torch.Tensor:
        """[n, end - first], True where a query may look: not ahead, not beyond the window. Shared by like
        layers."""
        mask = rows.masks.get(self.window)
        if mask is None:
            device = rows.kv.device
            queries = torch.arange(rows.position, end, device=device)[:, None]
            keys = torch.arange(first, end, device=device)[None, :]
            mask = keys <= queries
            if self.window is not None:
                mask &= keys > queries - self.window
            rows.masks[self.window] = mask
        return mask


class Mlp:
    """Gated feed-forward (SwiGLU, arXiv 2002.05202); gate and up are one matrix [2 * intermediate,
    hidden]."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.shape[0] // 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        return self.down(F.silu(both[:, : self.width]).mul_(both[:, self.width :]))


class DecoderLayer:
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attn_norm: RmsNorm, attention: Attention, mlp_norm: RmsNorm, mlp: Mlp) -> None:
        self.attn_norm = attn_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = x + self.attention(self.attn_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))

    def linears(self) -> tuple[Linear, ...]:
        return self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down


def build_layer(config: ModelConfig, layer: int, parts: dict[str, torch.Tensor]) -> DecoderLayer:
    """A layer from its parameters by part name (see `families/base.py`)."""
    norms = None
    if config.qk_norm:
        queries = parts["q_norm"].expand(config.heads, -1)
        norms = torch.cat((queries, parts["k_norm"].expand(config.kv_heads, -1)))
    qkv = Linear(parts["qkv.weight"], parts.get("qkv.bias"))
    out = Linear(parts["out.weight"], parts.get("out.bias"))
    mlp = Mlp(
        Linear(parts["gate_up.weight"], parts.get("gate_up.bias")),
        Linear(parts["down.weight"], parts.get("down.bias")),
    )
    return DecoderLayer(
        RmsNorm(parts["attn_norm"], config.norm_eps),
        Attention(config, layer, qkv, out, norms),
        RmsNorm(parts["mlp_norm"], config.norm_eps),
        mlp,
    )
