"""Gemma 3 (text): Gemma 2's layer with head norms instead of soft caps, and another rotation on sliding
layers."""

from typing import Any

from model_shards.families.base import Family, Ropes
from model_shards.families.gemma2 import gemma_layout, gemma_traits, gemma_windows
from model_shards.fields import Fields
from model_shards.rope import RopeConfig, read_rope


def _traits(fields: Fields, layers: int) -> dict[str, Any]:
    if fields.flag("use_bidirectional_attention", False):
        raise fields.bad("use_bidirectional_attention", "false: a causal model")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.has(name):
            raise fields.bad(name, "null: Gemma 3 has no soft caps")
    return {**gemma_traits(fields, layers), "qk_norm": True}


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    return gemma_windows(fields, layers, fields.integer("sliding_window_pattern", 1, 1 << 16, 6))


def _ropes(fields: Fields, head_dim: int, max_positions: int, layers: int) -> Ropes:
    both = fields.object("rope_parameters")
    if both is not None and (both.has("full_attention") or both.has("sliding_attention")):
        full = read_rope(fields, head_dim, max_positions, both.object("full_attention"), theta=1e6)
        local = read_rope(fields, head_dim, max_positions, both.object("sliding_attention"), theta=1e4)
    else:
        full = read_rope(fields, head_dim, max_positions, theta=1e6)
        local = RopeConfig("default", fields.number("rope_local_base_freq", 1.0, 1e15, 1e4), head_dim)
    slides = _windows(fields, layers)
    return (full, local), tuple(0 if window is None else 1 for window in slides)


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    max_positions=131072,
    traits=_traits,
    head_dim=256,
    tied=True,
    stretched=False,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    windows=_windows,
    ropes=_ropes,
    layout=gemma_layout,
)
