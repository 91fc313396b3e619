"""Llama 2 and 3, and every checkpoint that calls itself LlamaForCausalLM: one `attention_bias` for all
projections."""

from typing import Any

from model_shards.families.base import Family
from model_shards.fields import Fields


def llama_traits(fields: Fields, _layers: int) -> dict[str, Any]:
    """Biases as Llama's config spells them."""
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


LLAMA = Family(name="llama", architecture="LlamaForCausalLM", max_positions=2048, traits=llama_traits)
