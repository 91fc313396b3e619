"""ModelConfig: what a model is, read from its config.json and checked field by field.

The names here are ours; `families/` knows how each family spells and defaults them. Unknown architectures and
options that would change the result are refused, never guessed. Knows nothing of weight files or of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_shards.families import FAMILIES, family_of
from model_shards.families.base import ACTIVATIONS, PLAIN_ROUTING, LatentShape, Routing
from model_shards.fields import Fields, read_json_object
from model_shards.packing import Packing, read_packing
from model_shards.rope import RopeConfig, usable_context

LAYERS_MAX = 4096
WIDTH_MAX = 1 << 20
VOCAB_MAX = 1 << 24
CONTEXT_MAX = 1 << 28


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. Widths in elements, context in tokens; ``windows[i]`` is layer i's sliding
    window, ``layer_ropes[i]`` which of ``ropes`` turns it (None: none does), ``sparse[i]`` whether it has
    experts. ``shared_width`` is the feed-forward that every token takes beside its experts; ``swiglu_limit``
    clamps the experts' gates, sharpened by ``swiglu_alpha``."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context_tokens: int
    tied: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None
    norm_eps: float
    activation: str
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int | None, ...]
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    expert_weights_sum_to_one: bool = False
    sparse: tuple[bool, ...] = ()
    routing: Routing = PLAIN_ROUTING
    shared_width: int = 0
    latent: LatentShape | None = None
    sinks: bool = False
    wide_norms: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    packing: Packing | None = None

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """What attention caches of one position and layer: (heads, width of a key, width of a value). With
        latent attention that is one latent and one rotated key for all heads."""
        if self.latent is not None:
            return 1, self.latent.kv_rank, self.latent.rope_dim
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def kv_elements(self) -> int:
        """Elements cached for one position of one layer."""
        heads, key_width, value_width = self.kv_shape
        return heads * (key_width + value_width)

    @property
    def rope(self) -> RopeConfig:
        """The rotation of full-attention layers."""
        return self.ropes[0]

    @classmethod
    def from_dir(cls, directory: Path) -> ModelConfig:
        """Reads ``directory``/config.json, and further ends of text from generation_config.json. Raises
        ConfigError."""
        config = cls.from_dict(read_json_object(directory / "config.json"))
        path = directory / "generation_config.json"
        if not path.is_file():
            return config
        more = Fields(read_json_object(path)).integers("eos_token_id", 0, config.vocab - 1)
        return replace(config, eos_ids=tuple(sorted({*config.eos_ids, *more})))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Builds the config from a parsed config.json. Raises ConfigError naming field, value and what is
        right."""
        fields = Fields(values)
        family = family_of(fields)
        layers = fields.integer("num_hidden_layers", 1, LAYERS_MAX)
        hidden = fields.integer("hidden_size", 1, WIDTH_MAX)
        heads = fields.integer("num_attention_heads", 1, WIDTH_MAX)
        kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
        if heads % kv_heads:
            raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        if not fields.has("head_dim") and family.head_dim is None and hidden % heads:
            raise fields.bad("hidden_size", f"a multiple of num_attention_heads = {heads}")
        head_dim = fields.integer("head_dim", 2, 4096, family.head_dim or hidden // heads)
        max_positions = fields.integer("max_position_embeddings", 1, CONTEXT_MAX, family.max_positions)
        vocab = fields.integer("vocab_size", 1, VOCAB_MAX)
        ropes, layer_ropes = family.ropes(fields, head_dim, max_positions, layers)
        eos_ids = fields.integers("eos_token_id", 0, vocab - 1)
        field, default = family.activation
        activation = fields.text(field, default)
        if activation not in ACTIVATIONS:
            raise fields.bad(field, f"one of {', '.join(ACTIVATIONS)}")
        shared = {
            "family": family.name,
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate": fields.integer("intermediate_size", 1, WIDTH_MAX),
            "vocab": vocab,
            "context_tokens": usable_context(ropes[0], max_positions) if family.stretched else max_positions,
            "tied": fields.flag("tie_word_embeddings", family.tied),
            "eos_ids": eos_ids,
            "bos_id": fields.integer("bos_token_id", 0, vocab - 1) if fields.has("bos_token_id") else None,
            "norm_eps": fields.number("rms_norm_eps", 0.0, 1.0, family.norm_eps),
            "activation": ACTIVATIONS[activation],
            "ropes": ropes,
            "layer_ropes": layer_ropes,
            "windows": family.windows(fields, layers),
            "packing": read_packing(fields),
        }
        return cls(**{**shared, **family.traits(fields, layers)})


def supported_families() -> tuple[str, ...]:
    """Names of the families that can be served."""
    return tuple(family.name for family in FAMILIES)
