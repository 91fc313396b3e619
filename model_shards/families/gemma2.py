"""Gemma 2: norms of 1 + weight before and after each block, scaled embedding, soft caps, alternating
windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_shards.families.base import (
    Family,
    TensorSpec,
    attention_tensors,
    layer_kinds,
    mlp_tensors,
)
from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig


def gemma_traits(fields: Fields, _layers: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    bias = fields.flag("attention_bias", False)
    hidden = fields.integer("hidden_size", 1, 1 << 20)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": hidden**0.5,
        "attention_scale": fields.number("query_pre_attn_scalar", 1e-3, 1e6, 256.0) ** -0.5,
    }


def _cap(fields: Fields, name: str, default: float) -> float | None:
    if fields.present(name) and not fields.has(name):
        return None
    return fields.number(name, 1e-3, 1e6, default)


def _traits(fields: Fields, layers: int) -> dict[str, Any]:
    return {
        **gemma_traits(fields, layers),
        "attention_cap": _cap(fields, "attn_logit_softcapping", 50.0),
        "logit_cap": _cap(fields, "final_logit_softcapping", 30.0),
    }


def gemma_windows(fields: Fields, layers: int, full_every: int) -> tuple[int | None, ...]:
    """Every ``full_every``-th layer sees everything, the others a window, unless `layer_types` says."""
    window = fields.integer("sliding_window", 1, 1 << 28, 4096)
    slides = layer_kinds(fields, layers)
    if slides is None:
        slides = tuple(bool((layer + 1) % full_every) for layer in range(layers))
    return tuple(window if slide else None for slide in slides)


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    return gemma_windows(fields, layers, 2)


def gemma_layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """A layer with norms before and after attention and feed-forward."""
    at, width = f"model.layers.{layer}.", (config.hidden,)
    return (
        TensorSpec(at + "input_layernorm.weight", width, "attn_norm"),
        TensorSpec(at + "post_attention_layernorm.weight", width, "attn_post_norm"),
        TensorSpec(at + "pre_feedforward_layernorm.weight", width, "mlp_norm"),
        TensorSpec(at + "post_feedforward_layernorm.weight", width, "mlp_post_norm"),
        *attention_tensors(config, layer),
        *mlp_tensors(config, layer),
    )


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    max_positions=8192,
    traits=_traits,
    head_dim=256,
    tied=True,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    windows=_windows,
    layout=gemma_layout,
)
