"""Qwen3 (dense): RMS norms on each query and key head, head width 128 by default, optional biases and
windows."""

from typing import Any

from model_shards.families.base import Family, qwen_windows
from model_shards.fields import Fields


def qwen3_traits(fields: Fields, _layers: int) -> dict[str, Any]:
    """Biases and head norms as Qwen3 has them."""
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    max_positions=32768,
    traits=qwen3_traits,
    head_dim=128,
    windows=qwen_windows,
)
