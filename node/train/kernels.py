"""Differentiable pieces of a layer with their gradients written out: a small model on a processor spends its time in
passes over memory, and each of these makes fewer of them than autograd would. Same numbers, to rounding.

Measured with one thread at 12 sequences of 64 and width 128: they halve a step's time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

# Beyond as many tokens the fused kernel's blocks pay; below it its backward takes ten times as long (torch 2.13, CPU).
PLAIN_TOKENS_MAX = 256


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps)).to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit, scale, weight = ctx.saved_tensors
        grad = grads[0]
        product = grad * unit
        for_weight = product.flatten(0, -2).sum(0)
        along = (product @ weight).div_(unit.shape[-1]).unsqueeze(-1)
        return (grad * weight).addcmul_(unit, along, value=-1).mul_(scale), for_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight [n], both of one dtype (arXiv 1910.07467)."""
    found: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return found


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        ctx.save_for_backward(both)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        grad = grads[0]
        out = torch.empty_like(both)
        for_gate, for_up = out.chunk(2, -1)
        share = torch.sigmoid(gate)
        active = gate * share
        torch.mul(grad, active, out=for_up)
        # silu' = s + g s (1 - s) = s + a - a s
        share.add_(active).addcmul_(active, torch.sigmoid(gate), value=-1)
        torch.mul(share.mul_(up), grad, out=for_gate)
        return out


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., gate and up] (arXiv 2002.05202)."""
    found: torch.Tensor = _SwiGlu.apply(both)  # type: ignore[no-untyped-call]
    return found


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    cap: float | None,
) -> torch.Tensor:
    """Causal attention: q [batch, heads, n, dim], k and v [batch, kv_heads, n, dim]. `mask` [n, n] bool where a query
    may look (None: at all before it). Scores are bent by cap * tanh(score / cap) where there is a cap."""
    group, count = q.shape[1] // k.shape[1], q.shape[2]
    if cap is None and (count > PLAIN_TOKENS_MAX or q.device.type != "cpu"):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
        )
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q * (scale or 1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(count, count, dtype=scores.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    return torch.softmax(scores + bias, -1, dtype=torch.float32).to(v.dtype) @ v
