"""Qwen2 and Qwen2.5: biases on query, key and value always, on nothing else; optional sliding windows."""

from typing import Any

from model_shards.families.base import Family, qwen_windows
from model_shards.fields import Fields


def _traits(_fields: Fields, _layers: int) -> dict[str, Any]:
    return {"qkv_bias": True}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    max_positions=32768,
    traits=_traits,
    windows=qwen_windows,
)
