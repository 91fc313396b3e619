"""SmolLM3: Llama, tied by default, without rotation on every fourth layer (arXiv 2501.18795)."""

from model_shards.families.base import Family, Ropes, layer_kinds
from model_shards.families.llama import llama_traits
from model_shards.fields import Fields
from model_shards.rope import read_rope


def _rotated(fields: Fields, layers: int) -> tuple[bool, ...]:
    listed = fields.raw("no_rope_layers")
    if listed is None:
        every = fields.integer("no_rope_layer_interval", 1, 1 << 16, 4)
        return tuple(bool((layer + 1) % every) for layer in range(layers))
    if not isinstance(listed, list) or len(listed) != layers or any(item not in (0, 1) for item in listed):
        raise fields.bad("no_rope_layers", f"{layers} numbers, 1 for each layer that is rotated, else 0")
    return tuple(bool(item) for item in listed)


def _ropes(fields: Fields, head_dim: int, max_positions: int, layers: int) -> Ropes:
    rope = read_rope(fields, head_dim, max_positions)
    return (rope,), tuple(0 if rotated else None for rotated in _rotated(fields, layers))


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return (None,) * layers
    window = fields.integer("sliding_window", 1, 1 << 28)
    slides = layer_kinds(fields, layers)
    if slides is None:
        slides = tuple(not rotated for rotated in _rotated(fields, layers))
    return tuple(window if slide else None for slide in slides)


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    max_positions=32768,
    tied=True,
    traits=llama_traits,
    windows=_windows,
    ropes=_ropes,
)
