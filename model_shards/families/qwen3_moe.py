"""Qwen3-MoE: Qwen3 with experts in most layers; dense ones are named or fall between
`decoder_sparse_step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_shards.families.base import (
    Family,
    TensorSpec,
    attention_tensors,
    expert_tensors,
    mlp_tensors,
    norm_tensors,
)
from model_shards.families.qwen3 import qwen3_traits
from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig


def _traits(fields: Fields, layers: int) -> dict[str, Any]:
    experts = fields.integer("num_experts", 1, 4096, fields.integer("num_local_experts", 1, 4096, 128))
    step = fields.integer("decoder_sparse_step", 1, 1 << 16, 1)
    dense = fields.integers("mlp_only_layers", 0, 1 << 16)
    return {
        **qwen3_traits(fields, layers),
        "experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, experts, min(8, experts)),
        "expert_width": fields.integer("moe_intermediate_size", 1, 1 << 20, 768),
        "expert_weights_sum_to_one": fields.flag("norm_topk_prob", False),
        "sparse": tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
    }


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    if not fields.flag("use_sliding_window", False):
        return (None,) * layers
    return (fields.integer("sliding_window", 1, 1 << 28, 4096),) * layers


def _layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    shared = (*norm_tensors(config, layer), *attention_tensors(config, layer))
    if not config.sparse[layer]:
        return (*shared, *mlp_tensors(config, layer))
    at = f"model.layers.{layer}.mlp."
    return (
        *shared,
        TensorSpec(at + "gate.weight", (config.experts, config.hidden), "router.weight", plain=True),
        *expert_tensors(config, at + "experts.", ("gate_proj", "up_proj", "down_proj")),
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    max_positions=32768,
    traits=_traits,
    windows=_windows,
    layout=_layout,
)
