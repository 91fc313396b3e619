"""Phi-3 and Phi-4-mini: Llama whose checkpoint already fuses qkv and gate-up; long contexts by LongRoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model_shards.families.base import Family, TensorSpec, norm_tensors
from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    window = fields.integer("sliding_window", 1, 1 << 28) if fields.has("sliding_window") else None
    return (window,) * layers


def _layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    at, hidden, wide = f"model.layers.{layer}.", config.hidden, config.intermediate
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return (
        *norm_tensors(config, layer),
        TensorSpec(at + "self_attn.qkv_proj.weight", (q_rows + 2 * kv_rows, hidden), "qkv.weight"),
        TensorSpec(at + "self_attn.o_proj.weight", (hidden, q_rows), "out.weight"),
        TensorSpec(at + "mlp.gate_up_proj.weight", (2 * wide, hidden), "gate_up.weight"),
        TensorSpec(at + "mlp.down_proj.weight", (hidden, wide), "down.weight"),
    )


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    max_positions=4096,
    norm_eps=1e-5,
    windows=_windows,
    layout=_layout,
)
