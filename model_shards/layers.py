"""A decoder layer, built from its loaded parameters.

Knows which parts make which kind of attention and feed-forward, and how they are added up. The parts
themselves are in `linear.py`, `attention.py`, `latent.py` and `experts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model_shards.attention import Attention, Batch
from model_shards.config import ModelConfig
from model_shards.errors import LocalFault
from model_shards.experts import Experts, FeedForward, Router
from model_shards.integers import PackedInt8
from model_shards.latent import LatentAttention
from model_shards.linear import (
    AnyLinear,
    ClampedMlp,
    HeadNorms,
    Linear,
    Mlp,
    PackedLinear,
    QuantLinear,
    RmsNorm,
    linear_over,
)
from model_shards.packed import PackedStack, PackedWeight
from model_shards.weights import Part

LATENT_NORM_EPS = 1e-6  # the norms between the projections of latent attention ignore the config's


class DecoderLayer:
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)); Gemma norms what is added,
    too."""

    def __init__(
        self,
        attn_norm: RmsNorm,
        attention: Attention | LatentAttention,
        mlp_norm: RmsNorm,
        mlp: FeedForward,
        post_norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        self.attn_norm = attn_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.post_norms = post_norms

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        tuned = batch.tuned_at(self.attention.layer)
        if self.post_norms is not None:
            after_attention, after_mlp = self.post_norms
            x = x + after_attention(self.attention(self.attn_norm(x), batch))
            return x + after_mlp(self.mlp(self.mlp_norm(x), tuned))
        x = x + self.attention(self.attn_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x), tuned)

    def linears(self) -> tuple[AnyLinear, ...]:
        return *self.attention.linears(), *self.mlp.linears()


def build_layer(
    config: ModelConfig, layer: int, parts: Mapping[str, Part], dtype: torch.dtype
) -> DecoderLayer:
    """A layer from its parameters by part name (see `families/base.py`)."""
    return _Builder(config, layer, parts, dtype).layer()


@dataclass(slots=True)
class _Builder:
    config: ModelConfig
    number: int
    parts: Mapping[str, Part]
    dtype: torch.dtype

    def layer(self) -> DecoderLayer:
        sparse = self.config.sparse and self.config.sparse[self.number]
        return DecoderLayer(
            self._norm("attn_norm"),
            self._attention() if self.config.latent is None else self._latent_attention(),
            self._norm("mlp_norm"),
            self._experts() if sparse else self._mlp(""),
            (self._norm("attn_post_norm"), self._norm("mlp_post_norm")) if self.config.post_norms else None,
        )

    def _plain(self, part: str) -> torch.Tensor:
        value = self.parts[part]
        if not isinstance(value, torch.Tensor):
            raise LocalFault(f"{part} is never quantised")
        return value

    def _linear(self, name: str) -> AnyLinear:
        return linear_over(self.parts[name + ".weight"], self.parts.get(name + ".bias"))

    def _norm(self, part: str, eps: float | None = None) -> RmsNorm:
        config = self.config
        eps = config.norm_eps if eps is None else eps
        return RmsNorm(self._plain(part), eps, self.dtype, config.norm_offset, wide=config.wide_norms)

    def _attention(self) -> Attention:
        config, norms = self.config, None
        if config.qk_norm:
            norms = HeadNorms(config, self._plain("q_norm"), self._plain("k_norm"), self.dtype)
        sinks = self._plain("sinks") if config.sinks else None
        return Attention(config, self.number, self._linear("qkv"), self._linear("out"), norms, sinks)

    def _latent_attention(self) -> LatentAttention:
        return LatentAttention(
            self.config,
            self.number,
            self._linear("latent"),
            self._linear("q"),
            self._linear("kv_b"),
            self._linear("out"),
            self._norm("q_norm", LATENT_NORM_EPS) if "q_norm" in self.parts else None,
            self._norm("kv_norm", LATENT_NORM_EPS),
        )

    def _mlp(self, prefix: str) -> Mlp:
        return Mlp(self._linear(prefix + "gate_up"), self._linear(prefix + "down"), self.config.activation)

    def _experts(self) -> Experts:
        config = self.config
        gate_ups = self._stacked("experts.gate_up", 2 * config.expert_width)
        downs = self._stacked("experts.down", config.hidden)
        pairs = list(zip(gate_ups, downs, strict=True))
        experts: list[FeedForward]
        if config.swiglu_limit is not None:
            limit, alpha = config.swiglu_limit, config.swiglu_alpha
            experts = [ClampedMlp(*pair, limit, alpha) for pair in pairs]
        else:
            experts = [Mlp(*pair, config.activation) for pair in pairs]
        gate = self._linear("router")
        if not isinstance(gate, Linear):
            raise LocalFault("a router is never quantised")
        correction = self._plain("router.correction") if "router.correction" in self.parts else None
        top, to_one = config.experts_per_token, config.expert_weights_sum_to_one
        router = Router(gate, top, config.routing, to_one, correction)
        return Experts(router, experts, self._mlp("shared.") if config.shared_width else None)

    def _stacked(self, part: str, rows: int) -> list[AnyLinear]:
        """The experts' matrices of ``rows`` rows each, which lie one below another in ``part``; their biases
        are rows of ``part`` + ".bias"."""
        whole, count = self.parts[part], self.config.experts
        biases: list[torch.Tensor | None] = [None] * count
        if part + ".bias" in self.parts:
            biases = list(self._plain(part + ".bias"))
        if isinstance(whole, PackedStack):
            return [PackedLinear(weight, bias) for weight, bias in zip(whole.weights, biases, strict=True)]
        if isinstance(whole, PackedWeight | PackedInt8):
            raise LocalFault(f"{part} is never packed")
        if isinstance(whole, torch.Tensor):
            return [Linear(whole[at * rows : (at + 1) * rows], biases[at]) for at in range(count)]
        return [QuantLinear(whole.block(at * rows, rows), biases[at]) for at in range(count)]
