"""What a family may differ in, and the tensors of a decoder model in Hugging Face layout.

A TensorSpec says where a checkpoint tensor lands: the parameter of a layer it fills, and from which row, so
that query, key and value become one matrix and gate and up another without a copy. Knows names and shapes,
not files or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_shards.fields import Fields

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Checkpoint tensor ``name`` of ``shape`` fills rows [row, row + shape[0]) of parameter ``part``."""

    name: str
    shape: tuple[int, ...]
    part: str
    row: int = 0


def _full_attention(_fields: Fields, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


@dataclass(frozen=True, slots=True)
class Family:
    """``traits`` gives ModelConfig's optional fields; ``head_dim`` is a default other than hidden / heads."""

    name: str
    architecture: str
    max_positions: int
    traits: Callable[[Fields], dict[str, Any]]
    head_dim: int | None = None
    windows: Callable[[Fields, int], tuple[int | None, ...]] = _full_attention


def qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Sliding windows as Qwen2 and Qwen3 spell them: from layer `max_window_layers` on, unless `layer_types`
    says."""
    if not fields.flag("use_sliding_window", False):
        return (None,) * layers
    window = fields.integer("sliding_window", 1, 1 << 28, 4096)
    types = fields.raw("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 0, 1 << 16, 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or any(item not in known for item in types):
        raise fields.bad("layer_types", f"{layers} names, each full_attention or sliding_attention")
    return tuple(known[item] for item in types)


def layer_tensors(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """The checkpoint tensors of one layer and the parameters they fill."""
    at = f"model.layers.{layer}."
    hidden, wide = config.hidden, config.intermediate
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    specs = [
        TensorSpec(at + "input_layernorm.weight", (hidden,), "attn_norm"),
        TensorSpec(at + "post_attention_layernorm.weight", (hidden,), "mlp_norm"),
        TensorSpec(at + "self_attn.o_proj.weight", (hidden, q_rows), "out.weight"),
        TensorSpec(at + "mlp.gate_proj.weight", (wide, hidden), "gate_up.weight"),
        TensorSpec(at + "mlp.up_proj.weight", (wide, hidden), "gate_up.weight", wide),
        TensorSpec(at + "mlp.down_proj.weight", (hidden, wide), "down.weight"),
    ]
    row = 0
    for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        specs.append(TensorSpec(f"{at}self_attn.{name}_proj.weight", (rows, hidden), "qkv.weight", row))
        if config.qkv_bias:
            specs.append(TensorSpec(f"{at}self_attn.{name}_proj.bias", (rows,), "qkv.bias", row))
        row += rows
    if config.out_bias:
        specs.append(TensorSpec(at + "self_attn.o_proj.bias", (hidden,), "out.bias"))
    if config.mlp_bias:
        specs.append(TensorSpec(at + "mlp.gate_proj.bias", (wide,), "gate_up.bias"))
        specs.append(TensorSpec(at + "mlp.up_proj.bias", (wide,), "gate_up.bias", wide))
        specs.append(TensorSpec(at + "mlp.down_proj.bias", (hidden,), "down.bias"))
    if config.qk_norm:
        specs.append(TensorSpec(at + "self_attn.q_norm.weight", (config.head_dim,), "q_norm"))
        specs.append(TensorSpec(at + "self_attn.k_norm.weight", (config.head_dim,), "k_norm"))
    return tuple(specs)


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
