"""The model families that can be served, one small file of differences each.

`family_of` finds the family a config.json names. Shared structure lives in `layers.py` and
`families/base.py`; nothing here touches weights or torch.
"""

from model_shards.errors import ConfigError
from model_shards.families.base import Family, TensorSpec, head_tensors, layer_tensors, span_tensors
from model_shards.families.llama import LLAMA
from model_shards.families.qwen2 import QWEN2
from model_shards.families.qwen3 import QWEN3
from model_shards.fields import Fields

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3)


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
    raise fields.bad("model_type", f"one of {', '.join(family.name for family in FAMILIES)}")


__all__ = ["FAMILIES", "Family", "TensorSpec", "family_of", "head_tensors", "layer_tensors", "span_tensors"]
