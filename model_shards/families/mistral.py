"""Mistral: Llama with one sliding window on every layer; an absent window means 4096, a null one none."""

from model_shards.families.base import Family
from model_shards.fields import Fields


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    if fields.present("sliding_window") and not fields.has("sliding_window"):
        return (None,) * layers
    return (fields.integer("sliding_window", 1, 1 << 28, 4096),) * layers


MISTRAL = Family(name="mistral", architecture="MistralForCausalLM", max_positions=131072, windows=_windows)
