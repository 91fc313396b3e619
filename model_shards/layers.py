"""The parts of a decoder layer, over rows of several sessions at once.

Norms and linear maps see all rows [N, hidden] together; attention sees each session's rows with its own
cache. Plain objects instead of torch modules: a decode step of a small model is mostly call overhead. Knows
nothing of batching policy, sampling or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from model_shards.config import ModelConfig
from model_shards.errors import LocalFault
from model_shards.kv import SessionKv
from model_shards.quant import QuantWeight
from model_shards.weights import Part


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
    """The sessions of one pass, and for each of the model's ropes the rows (cos, sin), each [N, 1, dim], of
    their positions."""

    rows: list[Rows]
    rotary: list[tuple[torch.Tensor, torch.Tensor]]


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


class QuantLinear:
    """A Linear over a quantised weight; the bias stays as it was."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: QuantWeight, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


AnyLinear = Linear | QuantLinear


def linear_over(weight: Part, bias: Part | None = None) -> AnyLinear:
    """The Linear of a loaded part, quantised or not."""
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise LocalFault("a bias is never quantised")
    return Linear(weight, bias) if isinstance(weight, torch.Tensor) else QuantLinear(weight, bias)


class RmsNorm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), reduced in float32.

    ``weight`` is float32. With an ``offset`` (Gemma's 1 + weight) the whole norm is computed in float32;
    without one the weight multiplies in the compute dtype, each as its reference does.
    """

    __slots__ = ("eps", "shape", "weight", "wide")

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype, offset: float = 0.0) -> None:
        self.wide = offset != 0.0 and dtype != torch.float32
        self.weight = weight + offset if offset else weight.to(dtype)
        self.eps = eps
        self.shape = tuple(weight.shape[-1:])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.wide:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class HeadNorms:
    """RMS norms of query and key heads in one go; ``weight`` [heads + kv_heads, head_dim], offset as in
    RmsNorm."""

    __slots__ = ("eps", "weight", "wide")

    def __init__(
        self, config: ModelConfig, q_norm: torch.Tensor, k_norm: torch.Tensor, dtype: torch.dtype
    ) -> None:
        weight = torch.cat((q_norm.expand(config.heads, -1), k_norm.expand(config.kv_heads, -1)))
        self.wide = config.norm_offset != 0.0
        self.weight = weight + config.norm_offset if self.wide else weight.to(dtype)
        self.eps = config.norm_eps

    def __call__(self, qk: torch.Tensor) -> torch.Tensor:
        """[N, heads + kv_heads, head_dim], unchanged in shape and dtype."""
        if self.wide:
            return (F.rms_norm(qk.float(), qk.shape[-1:], None, self.eps) * self.weight).to(qk.dtype)
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps) * self.weight


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; optional head norms, sliding
    window, and soft cap on the scores (arXiv 2408.00118)."""

    def __init__(
        self, config: ModelConfig, layer: int, qkv: AnyLinear, out: AnyLinear, norms: HeadNorms | None
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
        self._qk_width = (config.heads + config.kv_heads) * config.head_dim

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N, hidden] -> [N, hidden]; appends the rows' keys and values to each session's cache."""
        count = x.shape[0]
        fused = self.qkv(x)
        qk = fused[:, : self._qk_width].view(count, self.heads + self.kv_heads, self.head_dim)
        v = fused[:, self._qk_width :].view(count, self.kv_heads, self.head_dim)
        if self.norms is not None:
            qk = self.norms(qk)
        if self.rope is not None:
            qk = self._rotate(qk, *batch.rotary[self.rope])
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if len(batch.rows) == 1:
            return self.out(self._attend(batch.rows[0], q, k, v))
        mixed = [
            self._attend(rows, q[a : a + rows.count], k[a : a + rows.count], v[a : a + rows.count])
            for rows in batch.rows
            for a in (rows.offset,)
        ]
        return self.out(torch.cat(mixed))

    def _rotate(self, qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dim = self.rotary_dim
        if dim == self.head_dim:
            return torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin)
        turned = qk[..., :dim]
        turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin)
        return torch.cat((turned, qk[..., dim:]), dim=-1)

    def _attend(self, rows: Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim], k and v [n, kv_heads, head_dim] -> [n, heads * head_dim]."""
        rows.kv.write(self.layer, rows.position, k, v)
        end = rows.position + rows.count
        first = 0 if self.window is None else max(0, rows.position + 1 - self.window)
        keys, values = rows.kv.read(self.layer, first, end)
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        if self.cap is not None:
            return self._attend_capped(q, keys[0], values[0], self._mask(rows, first, end), self.cap)
        if rows.count == 1:
            # One position: the heads of a group stand in for a sequence, so keys are read once and no mask is made.
            grouped = q.view(1, self.kv_heads, self.group, self.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, scale=self.scale).reshape(1, -1)
        heads = q.transpose(0, 1).unsqueeze(0)
        causal = rows.position == 0 and (self.window is None or rows.count <= self.window)
        mask = None if causal else self._mask(rows, first, end)
        mixed = F.scaled_dot_product_attention(
            heads, keys, values, mask, is_causal=causal, scale=self.scale, enable_gqa=self.group > 1
        )
        return mixed.squeeze(0).transpose(0, 1).reshape(rows.count, -1)

    def _attend_capped(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cap: float
    ) -> torch.Tensor:
        """Plain attention with scores bent by ``cap * tanh(score / cap)``; keys and values [kv_heads, T,
        head_dim]."""
        grouped = q.transpose(0, 1).reshape(self.kv_heads, self.group, q.shape[0], self.head_dim)
        scale = self.scale if self.scale is not None else self.head_dim**-0.5
        scores = torch.matmul(grouped, keys.unsqueeze(1).transpose(2, 3)) * scale
        bent = torch.tanh(scores / cap) * cap
        weights = torch.softmax(bent.float().masked_fill(~mask, -torch.inf), -1).to(q.dtype)
        mixed = torch.matmul(weights, values.unsqueeze(1)).flatten(0, 1)
        return mixed.transpose(0, 1).reshape(q.shape[0], -1)

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


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Mlp:
    """Gated feed-forward (SwiGLU, arXiv 2002.05202); gate and up are one matrix [2 * intermediate,
    hidden]."""

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.shape[0] // 2
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        return self.down(self.activation(both[:, : self.width]).mul_(both[:, self.width :]))

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.gate_up, self.down


class Experts:
    """Mixture of gated feed-forwards: each row goes to the likeliest ``top`` of a softmax router (arXiv
    2101.03961).

    ``router`` [experts, hidden]; the experts are Mlps. Rows of one expert are computed together, experts in
    order.
    """

    def __init__(self, router: AnyLinear, experts: list[Mlp], top: int, sum_to_one: bool) -> None:
        self.router = router
        self.experts = experts
        self.top = top
        self.sum_to_one = sum_to_one

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk(torch.softmax(self.router(x).float(), -1), self.top, -1)
        if self.sum_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        mixed = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == expert)
            mixed.index_add_(0, rows, self.experts[expert](x[rows]) * weights[rows, place, None])
        return mixed

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.router, *(linear for expert in self.experts for linear in expert.linears())


class DecoderLayer:
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)); Gemma norms what is added,
    too."""

    def __init__(
        self,
        attn_norm: RmsNorm,
        attention: Attention,
        mlp_norm: RmsNorm,
        mlp: Mlp | Experts,
        post_norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        self.attn_norm = attn_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.post_norms = post_norms

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.post_norms is not None:
            after_attention, after_mlp = self.post_norms
            x = x + after_attention(self.attention(self.attn_norm(x), batch))
            return x + after_mlp(self.mlp(self.mlp_norm(x)))
        x = x + self.attention(self.attn_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.attention.qkv, self.attention.out, *self.mlp.linears()


def build_layer(
    config: ModelConfig, layer: int, parts: Mapping[str, Part], dtype: torch.dtype
) -> DecoderLayer:
    """A layer from its parameters by part name (see `families/base.py`)."""

    def plain(part: str) -> torch.Tensor:
        value = parts[part]
        if not isinstance(value, torch.Tensor):
            raise LocalFault(f"{part} is never quantised")
        return value

    def norm(part: str) -> RmsNorm:
        return RmsNorm(plain(part), config.norm_eps, dtype, config.norm_offset)

    norms = HeadNorms(config, plain("q_norm"), plain("k_norm"), dtype) if config.qk_norm else None
    qkv = linear_over(parts["qkv.weight"], parts.get("qkv.bias"))
    out = linear_over(parts["out.weight"], parts.get("out.bias"))
    post = (norm("attn_post_norm"), norm("mlp_post_norm")) if config.post_norms else None
    attention = Attention(config, layer, qkv, out, norms)
    return DecoderLayer(
        norm("attn_norm"), attention, norm("mlp_norm"), _feed_forward(config, layer, parts), post
    )


def _feed_forward(config: ModelConfig, layer: int, parts: Mapping[str, Part]) -> Mlp | Experts:
    if not config.sparse or not config.sparse[layer]:
        gate_up = linear_over(parts["gate_up.weight"], parts.get("gate_up.bias"))
        return Mlp(gate_up, linear_over(parts["down.weight"], parts.get("down.bias")), config.activation)
    gate_ups = _stacked(parts["experts.gate_up"], 2 * config.expert_width, config.experts)
    downs = _stacked(parts["experts.down"], config.hidden, config.experts)
    experts = [Mlp(*pair, config.activation) for pair in zip(gate_ups, downs, strict=True)]
    router = linear_over(parts["router"])
    return Experts(router, experts, config.experts_per_token, config.expert_weights_sum_to_one)


def _stacked(part: Part, rows: int, count: int) -> list[AnyLinear]:
    """The ``count`` matrices of ``rows`` rows that lie one below another in ``part``."""
    if isinstance(part, torch.Tensor):
        return [Linear(part[at * rows : (at + 1) * rows]) for at in range(count)]
    return [QuantLinear(part.block(at * rows, rows)) for at in range(count)]
