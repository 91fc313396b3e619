"""Rotary position embedding: the inverse frequencies of every scaling, and tables of cosines and sines.

Formulas: RoFormer (arXiv 2104.09864); linear: position interpolation (arXiv 2306.15595); dynamic: NTK-aware
scaling by sequence length; yarn: arXiv 2309.00071; longrope: arXiv 2402.13753; llama3: the Llama 3.1
reference code. They follow `transformers` term by term, in float32. Knows nothing of attention heads or
sessions; a position's row is a pure function of the config, the position and, for `dynamic` and `longrope`,
of the sequence length at the end of the step that computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from model_shards.fields import Fields

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# The rotation of these depends on how long the sequence is when a step is computed.
LENGTH_DEPENDENT = ("dynamic", "longrope")
_TABLE_ROWS = 512


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions are rotated. ``dim`` is the rotated part of a head; ``original_context`` in tokens."""

    kind: str
    theta: float
    dim: int
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    fields: Fields, head_dim: int, context_tokens: int, given: Fields | None = None, theta: float = 10000.0
) -> RopeConfig:
    """Reads `rope_parameters` (new) or `rope_scaling` and `rope_theta` (old), or ``given`` instead; ``theta``
    is the family's default. Raises ConfigError."""
    nested = given or fields.object("rope_scaling") or fields.object("rope_parameters") or Fields({})
    kind = nested.text("rope_type", nested.text("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in KINDS:
        raise nested.bad("rope_type" if nested.has("rope_type") else "type", f"one of {', '.join(KINDS)}")
    theta = nested.number("rope_theta", 1.0, 1e15, fields.number("rope_theta", 1.0, 1e15, theta))
    partial = nested.number(
        "partial_rotary_factor", 0.0, 1.0, fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    )
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise fields.bad("head_dim", f"an even rotated part of a head, not {dim}")
    if kind == "default":
        return RopeConfig(kind, theta, dim)
    return _read_scaling(fields, nested, RopeConfig(kind, theta, dim), context_tokens)


def _read_scaling(fields: Fields, nested: Fields, plain: RopeConfig, context_tokens: int) -> RopeConfig:
    kind = plain.kind
    original = nested.integer("original_max_position_embeddings", 1, 1 << 28, context_tokens)
    # Phi-3 keeps the length it was trained at beside the scaling, and that one counts.
    original = fields.integer("original_max_position_embeddings", 1, 1 << 28, original)
    if kind in ("linear", "dynamic"):
        original = context_tokens
    if kind == "dynamic" and plain.dim < 4:
        raise fields.bad("head_dim", "a rotated part of at least 4 with dynamic scaling")
    low, high = (
        nested.number("low_freq_factor", 1e-6, 1e6, 1.0),
        nested.number("high_freq_factor", 1e-6, 1e6, 4.0),
    )
    if kind == "llama3" and high <= low:
        raise nested.bad("high_freq_factor", f"more than low_freq_factor = {low:g}")
    if kind in ("yarn", "longrope") and not nested.has("factor"):
        factor = context_tokens / original
    else:
        factor = nested.number("factor", 1e-3, 1e6)
    long = kind == "longrope"
    return replace(
        plain,
        factor=factor,
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=nested.number("beta_fast", 0.0, 1e6, 32.0) or 32.0,
        beta_slow=nested.number("beta_slow", 0.0, 1e6, 1.0) or 1.0,
        mscale=nested.number("mscale", 0.0, 1e3, 0.0),
        mscale_all_dim=nested.number("mscale_all_dim", 0.0, 1e3, 0.0),
        attention_factor=nested.optional_number("attention_factor", 0.0, 1e3),
        truncate=nested.flag("truncate", True),
        short_factor=nested.numbers("short_factor", plain.dim // 2) if long else (),
        long_factor=nested.numbers("long_factor", plain.dim // 2) if long else (),
    )


def usable_context(rope: RopeConfig, max_positions: int) -> int:
    """Tokens the scaled model can hold: `max_position_embeddings` stretched by the scaling where that extends
    it."""
    if rope.kind in ("linear", "dynamic", "yarn"):
        return max(max_positions, int(rope.original_context * rope.factor))
    return max_positions


def inverse_frequencies(rope: RopeConfig, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2], float32, and the factor applied to cosines and sines.

    ``seq_len`` (tokens) matters to `dynamic` and `longrope`; at or below the original context it changes
    nothing.
    """
    if rope.kind == "dynamic":
        length = max(seq_len or 0, rope.original_context)
        stretch = (rope.factor * length / rope.original_context) - (rope.factor - 1)
        # float32 on purpose: the reference computes the base as a float32 tensor once the sequence has grown.
        base = rope.theta * torch.tensor(stretch, dtype=torch.float32) ** (rope.dim / (rope.dim - 2))
        return 1.0 / (base ** _exponents(rope.dim)), 1.0
    plain = 1.0 / (rope.theta ** _exponents(rope.dim))
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "longrope":
        return _longrope(rope, (seq_len or 0) > rope.original_context)
    return plain, 1.0


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / plain
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    scaled = torch.where(wavelength > longest, plain / rope.factor, plain)
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / span
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < shortest) * ~(wavelength > longest)
    return torch.where(between, blended, scaled)


def _longrope(rope: RopeConfig, long: bool) -> tuple[torch.Tensor, float]:
    factors = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
    inv_freq = 1.0 / (factors * rope.theta ** _exponents(rope.dim))
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.factor <= 1.0:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))


def _yarn(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    def turns_to_dim(turns: float) -> float:
        return (rope.dim * math.log(rope.original_context / (turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    low, high = turns_to_dim(rope.beta_fast), turns_to_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    periods = rope.theta ** _exponents(rope.dim)
    inv_freq = 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, scale(rope.mscale) / scale(rope.mscale_all_dim)
    return inv_freq, scale(1.0)


class RotaryTable:
    """Rows of cosines and signed sines for positions, in the compute dtype.

    A row holds ``[cos, cos]`` and ``[-sin, sin]`` so that rotating a head is ``x * cos + roll(x, dim / 2) *
    sin``. Rows are made in fixed groups, so a row's bits never depend on how far the table has grown.
    """

    def __init__(self, rope: RopeConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._rope = rope
        self._dtype = dtype
        self._device = device
        self._inv_freq, self._scale = inverse_frequencies(rope)
        self._cos = torch.empty(0, rope.dim, dtype=dtype, device=device)
        self._sin = torch.empty(0, rope.dim, dtype=dtype, device=device)

    def rows(self, position: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [count, 1, dim], for positions [position, position + count) of one step."""
        end = position + count
        if self._rope.kind in LENGTH_DEPENDENT and end > self._rope.original_context:
            inv_freq, scale = inverse_frequencies(self._rope, end)
            cos, sin = self._compute(position, count, inv_freq, scale)
            return cos.unsqueeze(1), sin.unsqueeze(1)
        if end > self._cos.shape[0]:
            self._grow(end)
        return self._cos[position:end].unsqueeze(1), self._sin[position:end].unsqueeze(1)

    def _grow(self, rows_min: int) -> None:
        have = self._cos.shape[0]
        wanted = max(rows_min, min(2 * have, have + 8192))
        groups = [
            self._compute(first, _TABLE_ROWS, self._inv_freq, self._scale)
            for first in range(have, wanted, _TABLE_ROWS)
        ]
        self._cos = torch.cat([self._cos, *(cos for cos, _ in groups)])
        self._sin = torch.cat([self._sin, *(sin for _, sin in groups)])

    def _compute(
        self, position: int, count: int, inv_freq: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(position, position + count, dtype=torch.float32)
        angles = positions[:, None] * inv_freq[None, :]
        cos, sin = angles.cos() * scale, angles.sin() * scale
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(self._device, self._dtype), sin.to(self._device, self._dtype)
