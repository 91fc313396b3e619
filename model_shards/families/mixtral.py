"""Mixtral: a mixture of experts in every layer, top-k of a softmax, weights renormalised (arXiv
2401.04088)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model_shards.families.base import (
    Family,
    TensorSpec,
    attention_tensors,
    expert_tensors,
    norm_tensors,
)
from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig


def _traits(fields: Fields, layers: int) -> dict[str, Any]:
    experts = fields.integer("num_local_experts", 1, 4096, 8)
    return {
        "experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, experts, 2),
        "expert_width": fields.integer("intermediate_size", 1, 1 << 20),
        "expert_weights_sum_to_one": True,
        "sparse": (True,) * layers,
    }


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    window = fields.integer("sliding_window", 1, 1 << 28) if fields.has("sliding_window") else None
    return (window,) * layers


def _layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    at = f"model.layers.{layer}.block_sparse_moe."
    return (
        *norm_tensors(config, layer),
        *attention_tensors(config, layer),
        TensorSpec(at + "gate.weight", (config.experts, config.hidden), "router.weight", plain=True),
        *expert_tensors(config, at + "experts.", ("w1", "w3", "w2")),
    )


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    max_positions=131072,
    norm_eps=1e-5,
    traits=_traits,
    windows=_windows,
    layout=_layout,
)
