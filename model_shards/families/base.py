"""What a family may differ in, and the tensors of a decoder model in Hugging Face layout.

A TensorSpec says where a checkpoint tensor lands: the parameter of a layer it fills, and from which row, so
that query, key and value become one matrix and gate and up another without a copy. Knows names and shapes,
not files or torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_shards.fields import Fields
from model_shards.rope import RopeConfig, read_rope

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

Ropes = tuple[tuple[RopeConfig, ...], tuple[int | None, ...]]
Layout = Callable[["ModelConfig", int], "tuple[TensorSpec, ...]"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Checkpoint tensor ``name`` of ``shape`` fills rows [row, row + shape[0]) of parameter ``part``.

    ``plain``: not a matrix that quantising changes; ``wide``: kept in float32. ``stack``: the checkpoint holds
    that many matrices in one tensor, each transposed: [stack, shape[1], shape[0] / stack].
    """

    name: str
    shape: tuple[int, ...]
    part: str
    row: int = 0
    plain: bool = False
    wide: bool = False
    stack: int = 0

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token finds its experts.

    ``kind``: "softmax" over all, then the likeliest; "sigmoid" of each, chosen with a learnt correction
    (DeepSeek-V3); "softmax_of_top": the highest first, then a softmax over those (GPT-OSS). With ``groups``
    > 1 experts are chosen from the ``groups_used`` best groups only. ``scale`` multiplies the weights.
    """

    kind: str = "softmax"
    groups: int = 1
    groups_used: int = 1
    scale: float = 1.0


PLAIN_ROUTING = Routing()


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Multi-head latent attention (arXiv 2405.04434, 2.1): widths of the compressed query (None: not
    compressed) and key-value latents, and of a head's unrotated, rotated and value parts. ``interleaved``:
    the rotated part's pairs are neighbours."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    interleaved: bool


def no_traits(_fields: Fields, _layers: int) -> dict[str, Any]:
    """Nothing beyond ModelConfig's defaults."""
    return {}


def full_attention(_fields: Fields, layers: int) -> tuple[int | None, ...]:
    """No sliding window on any layer."""
    return (None,) * layers


def one_rope(fields: Fields, head_dim: int, max_positions: int, layers: int) -> Ropes:
    """The same rotation on every layer."""
    return (read_rope(fields, head_dim, max_positions),), (0,) * layers


def layer_kinds(fields: Fields, layers: int) -> tuple[bool, ...] | None:
    """`layer_types` as whether each layer slides, or None where the config has none. Raises ConfigError."""
    types = fields.raw("layer_types")
    if types is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers or any(item not in known for item in types):
        raise fields.bad("layer_types", f"{layers} names, each full_attention or sliding_attention")
    return tuple(known[item] for item in types)


def qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Sliding windows as Qwen spells them: from layer `max_window_layers` on, unless `layer_types` says."""
    if not fields.flag("use_sliding_window", False):
        return (None,) * layers
    window = fields.integer("sliding_window", 1, 1 << 28, 4096)
    slides = layer_kinds(fields, layers)
    if slides is None:
        first = fields.integer("max_window_layers", 0, 1 << 16, 28)
        slides = tuple(layer >= first for layer in range(layers))
    return tuple(window if slide else None for slide in slides)


def attention_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """Projections and head norms of one layer, as most families name them."""
    at, hidden = f"model.layers.{layer}.self_attn.", config.hidden
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    specs = [TensorSpec(at + "o_proj.weight", (hidden, q_rows), "out.weight")]
    row = 0
    for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        specs.append(TensorSpec(f"{at}{name}_proj.weight", (rows, hidden), "qkv.weight", row))
        if config.qkv_bias:
            specs.append(TensorSpec(f"{at}{name}_proj.bias", (rows,), "qkv.bias", row))
        row += rows
    if config.out_bias:
        specs.append(TensorSpec(at + "o_proj.bias", (hidden,), "out.bias"))
    if config.qk_norm:
        specs.append(TensorSpec(at + "q_norm.weight", (config.head_dim,), "q_norm"))
        specs.append(TensorSpec(at + "k_norm.weight", (config.head_dim,), "k_norm"))
    return specs


def gated_tensors(at: str, hidden: int, wide: int, part: str = "") -> list[TensorSpec]:
    """The three matrices under ``at`` of a gated feed-forward, into parts whose names begin with ``part``."""
    return [
        TensorSpec(at + "gate_proj.weight", (wide, hidden), part + "gate_up.weight"),
        TensorSpec(at + "up_proj.weight", (wide, hidden), part + "gate_up.weight", wide),
        TensorSpec(at + "down_proj.weight", (hidden, wide), part + "down.weight"),
    ]


def mlp_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The gated feed-forward of one layer, as most families name it."""
    at, hidden, wide = f"model.layers.{layer}.mlp.", config.hidden, config.intermediate
    specs = gated_tensors(at, hidden, wide)
    if config.mlp_bias:
        specs.append(TensorSpec(at + "gate_proj.bias", (wide,), "gate_up.bias"))
        specs.append(TensorSpec(at + "up_proj.bias", (wide,), "gate_up.bias", wide))
        specs.append(TensorSpec(at + "down_proj.bias", (hidden,), "down.bias"))
    return specs


def expert_tensors(config: ModelConfig, at: str, names: tuple[str, str, str]) -> list[TensorSpec]:
    """Every expert of one layer under ``at``, by the family's ``names`` for gate, up and down; experts
    stacked."""
    hidden, wide, specs = config.hidden, config.expert_width, []
    for expert in range(config.experts):
        gate, up, down = (f"{at}{expert}.{name}.weight" for name in names)
        row = 2 * wide * expert
        specs.append(TensorSpec(gate, (wide, hidden), "experts.gate_up", row))
        specs.append(TensorSpec(up, (wide, hidden), "experts.gate_up", row + wide))
        specs.append(TensorSpec(down, (hidden, wide), "experts.down", hidden * expert))
    return specs


def norm_tensors(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The norms before attention and before the feed-forward."""
    at, width = f"model.layers.{layer}.", (config.hidden,)
    return [
        TensorSpec(at + "input_layernorm.weight", width, "attn_norm"),
        TensorSpec(at + "post_attention_layernorm.weight", width, "mlp_norm"),
    ]


def standard_layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """A Llama-like layer."""
    parts = (norm_tensors, attention_tensors, mlp_tensors)
    return tuple(spec for part in parts for spec in part(config, layer))


@dataclass(frozen=True, slots=True)
class Family:
    """What one family's config.json and checkpoint differ in.

    ``traits`` gives ModelConfig's optional fields; ``head_dim`` and ``tied`` are defaults; ``activation``
    names the field and its default; ``layout`` lists a layer's tensors; ``stretched`` says whether a scaling
    extends `max_position_embeddings` (else that number counts it already).
    """

    name: str
    architecture: str
    max_positions: int
    traits: Callable[[Fields, int], dict[str, Any]] = no_traits
    head_dim: int | None = None
    tied: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    norm_eps: float = 1e-6
    stretched: bool = True
    windows: Callable[[Fields, int], tuple[int | None, ...]] = full_attention
    ropes: Callable[[Fields, int, int, int], Ropes] = one_rope
    layout: Layout = standard_layout


def embed_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The embedding table, held by whoever hosts layer 0."""
    return (TensorSpec(EMBED, (config.vocab, config.hidden), "embed"),)


def head_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Final norm and vocabulary projection, held by whoever hosts the last layer; tied models project by the
    embedding."""
    head = EMBED if config.tied else HEAD
    return (
        TensorSpec(NORM, (config.hidden,), "norm"),
        TensorSpec(head, (config.vocab, config.hidden), "embed" if config.tied else "head"),
    )
