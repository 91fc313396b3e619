"""The model families that can be served, one small file of differences each.

`family_of` finds the family a config.json names. Shared structure lives in `layers.py` and
`families/base.py`; nothing here touches weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model_shards.errors import ConfigError
from model_shards.families.base import Family, TensorSpec, embed_tensors, head_tensors
from model_shards.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from model_shards.families.gemma2 import GEMMA2
from model_shards.families.gemma3 import GEMMA3
from model_shards.families.gpt_oss import GPT_OSS
from model_shards.families.llama import LLAMA
from model_shards.families.mistral import MISTRAL
from model_shards.families.mixtral import MIXTRAL
from model_shards.families.phi3 import PHI3
from model_shards.families.qwen2 import QWEN2
from model_shards.families.qwen3 import QWEN3
from model_shards.families.qwen3_moe import QWEN3_MOE
from model_shards.families.smollm3 import SMOLLM3
from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    MIXTRAL,
    GEMMA2,
    GEMMA3,
    PHI3,
    SMOLLM3,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
)
_BY_NAME = {family.name: family for family in FAMILIES}


def family_of(fields: Fields) -> Family:
    """The family named by `architectures` or, where that is absent, by `model_type`. Raises ConfigError."""
    supported = ", ".join(family.architecture for family in FAMILIES)
    named = fields.raw("architectures")
    if named is not None:
        if not isinstance(named, list) or not named or not all(isinstance(item, str) for item in named):
            raise fields.bad("architectures", "a list of names")
        for family in FAMILIES:
            if family.architecture in named:
                return family
        raise ConfigError("architectures", named, f"one of {supported}")
    for family in FAMILIES:
        if fields.raw("model_type") == family.name:
            return family
    raise fields.bad("model_type", f"one of {', '.join(_BY_NAME)}")


def layer_tensors(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """The checkpoint tensors of one layer and the parameters they fill."""
    return _BY_NAME[config.family].layout(config, layer)


def span_tensors(config: ModelConfig, start: int, end: int) -> tuple[TensorSpec, ...]:
    """Every tensor the span [start, end) needs, each name once."""
    specs: list[TensorSpec] = []
    if start == 0:
        specs.extend(embed_tensors(config))
    for layer in range(start, end):
        specs.extend(layer_tensors(config, layer))
    if end == config.layers:
        specs.extend(head_tensors(config))
    return tuple({spec.name: spec for spec in specs}.values())


__all__ = [
    "FAMILIES",
    "Family",
    "TensorSpec",
    "embed_tensors",
    "family_of",
    "head_tensors",
    "layer_tensors",
    "span_tensors",
]
