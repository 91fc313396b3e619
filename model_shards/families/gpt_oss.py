"""GPT-OSS: attention sinks, windows on every other layer, biased experts with clamped gates, MXFP4 (arXiv
2508.10925)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_shards.families.base import (
    Family,
    Ropes,
    Routing,
    TensorSpec,
    attention_tensors,
    layer_kinds,
    norm_tensors,
)
from model_shards.fields import Fields
from model_shards.rope import read_rope

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

THETA = 150000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _traits(fields: Fields, layers: int) -> dict[str, Any]:
    bias = fields.flag("attention_bias", True)
    experts = fields.integer("num_local_experts", 1, 4096, 128)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "sinks": True,
        "wide_norms": True,
        "experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, experts, min(4, experts)),
        "expert_width": fields.integer("intermediate_size", 1, 1 << 20),
        "sparse": (True,) * layers,
        "routing": Routing(kind="softmax_of_top"),
        "swiglu_limit": fields.number("swiglu_limit", 1e-6, 1e6, 7.0),
        "swiglu_alpha": fields.number("swiglu_alpha", 1e-6, 1e6, 1.702),
    }


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    if fields.present("sliding_window") and not fields.has("sliding_window"):
        return (None,) * layers
    window = fields.integer("sliding_window", 1, 1 << 28, 128)
    slides = layer_kinds(fields, layers)
    if slides is None:
        slides = tuple(layer % 2 == 0 for layer in range(layers))
    return tuple(window if slide else None for slide in slides)


def _ropes(fields: Fields, head_dim: int, max_positions: int, layers: int) -> Ropes:
    given = fields.has("rope_scaling") or fields.has("rope_parameters")
    scaling = None if given else Fields(YARN)
    return (read_rope(fields, head_dim, max_positions, scaling, theta=THETA),), (0,) * layers


def _layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    at, hidden, count = f"model.layers.{layer}.", config.hidden, config.experts
    both = 2 * config.expert_width
    experts = at + "mlp.experts."
    return (
        *norm_tensors(config, layer),
        *attention_tensors(config, layer),
        TensorSpec(at + "self_attn.sinks", (config.heads,), "sinks", wide=True),
        TensorSpec(at + "mlp.router.weight", (count, hidden), "router.weight", plain=True),
        TensorSpec(at + "mlp.router.bias", (count,), "router.bias"),
        TensorSpec(experts + "gate_up_proj", (count * both, hidden), "experts.gate_up", stack=count),
        TensorSpec(experts + "gate_up_proj_bias", (count, both), "experts.gate_up.bias", plain=True),
        TensorSpec(experts + "down_proj", (count * hidden, config.expert_width), "experts.down", stack=count),
        TensorSpec(experts + "down_proj_bias", (count, hidden), "experts.down.bias", plain=True),
    )


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    max_positions=131072,
    traits=_traits,
    head_dim=64,
    norm_eps=1e-5,
    windows=_windows,
    ropes=_ropes,
    layout=_layout,
)
