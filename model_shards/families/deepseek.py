"""DeepSeek-V2 and V3: latent attention, experts in groups beside a shared one, the first layers dense (arXiv
2405.04434, 2412.19437).

V2 chooses by softmax and by the best expert of a group, V3 by sigmoid with a learnt correction and by the two
best of a group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model_shards.families.base import (
    Family,
    LatentShape,
    Ropes,
    Routing,
    TensorSpec,
    expert_tensors,
    gated_tensors,
    mlp_tensors,
    norm_tensors,
)
from model_shards.fields import Fields
from model_shards.rope import read_rope

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

_WIDTH_MAX = 1 << 20


def _latent(fields: Fields, interleaved: bool) -> LatentShape:
    return LatentShape(
        q_rank=fields.integer("q_lora_rank", 1, _WIDTH_MAX) if fields.has("q_lora_rank") else None,
        kv_rank=fields.integer("kv_lora_rank", 1, _WIDTH_MAX, 512),
        nope_dim=fields.integer("qk_nope_head_dim", 1, _WIDTH_MAX, 128),
        rope_dim=fields.integer("qk_rope_head_dim", 2, _WIDTH_MAX, 64),
        v_dim=fields.integer("v_head_dim", 1, _WIDTH_MAX, 128),
        interleaved=interleaved,
    )


def _softmax_scale(fields: Fields, width: int) -> float:
    """1 / sqrt(width), times the square of yarn's temperature where the config gives one for all widths."""
    scaling = fields.object("rope_scaling") or fields.object("rope_parameters") or Fields({})
    scale = 1.0 / math.sqrt(width)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    factor = scaling.number("factor", 1e-3, 1e6, 1.0)
    mscale = scaling.number("mscale_all_dim", 0.0, 1e3, 0.0)
    if kind == "default" or not mscale or factor <= 1.0:
        return scale
    temperature = 0.1 * mscale * math.log(factor) + 1.0
    return scale * temperature * temperature


def _routing(fields: Fields, kind: str, experts: int, grouped: bool) -> Routing:
    # Where the config is silent the families' own defaults count, as in their reference code.
    v3 = kind == "sigmoid"
    groups = fields.integer("n_group", 1, experts, 8 if v3 else 1) if grouped else 1
    if experts % groups:
        raise fields.bad("n_group", f"a divisor of n_routed_experts = {experts}")
    return Routing(
        kind=kind,
        groups=groups,
        groups_used=fields.integer("topk_group", 1, groups, min(groups, 4)) if grouped else 1,
        scale=fields.number("routed_scaling_factor", 0.0, 1e6, 2.5 if v3 else 1.0),
    )


def _shared_traits(fields: Fields, layers: int, routing: Routing, latent: LatentShape) -> dict[str, Any]:
    if fields.integer("moe_layer_freq", 1, 1 << 16, 1) != 1:
        raise fields.bad("moe_layer_freq", "1: experts in every layer after the dense ones")
    experts = fields.integer("n_routed_experts", 1, 4096)
    eligible = experts // routing.groups * routing.groups_used
    width = fields.integer("moe_intermediate_size", 1, _WIDTH_MAX)
    bias = fields.flag("attention_bias", False)
    v3 = routing.kind == "sigmoid"
    dense = fields.integer("first_k_dense_replace", 0, 1 << 16, 3 if v3 else 0)
    shared = 0
    if fields.has("n_shared_experts") or not fields.present("n_shared_experts"):
        shared = fields.integer("n_shared_experts", 0, 4096, 1 if v3 else 2)
    head_dim = latent.nope_dim + latent.rope_dim
    return {
        "kv_heads": fields.integer("num_attention_heads", 1, _WIDTH_MAX),
        "head_dim": head_dim,
        "latent": latent,
        "attention_scale": _softmax_scale(fields, head_dim),
        "qkv_bias": bias,
        "out_bias": bias,
        "experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, eligible),
        "expert_width": width,
        "shared_width": width * shared,
        "routing": routing,
        "sparse": tuple(layer >= dense for layer in range(layers)),
    }


def _v2_traits(fields: Fields, layers: int) -> dict[str, Any]:
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.bad("topk_method", "greedy or group_limited_greedy")
    if fields.text("scoring_func", "softmax") != "softmax":
        raise fields.bad("scoring_func", "softmax")
    if fields.flag("norm_topk_prob", False):
        raise fields.bad("norm_topk_prob", "false: DeepSeek-V2's expert weights keep their sum")
    experts = fields.integer("n_routed_experts", 1, 4096)
    routing = _routing(fields, "softmax", experts, method == "group_limited_greedy")
    if fields.flag("mlp_bias", False):
        raise fields.bad("mlp_bias", "false")
    return _shared_traits(fields, layers, routing, _latent(fields, interleaved=True))


def _v3_traits(fields: Fields, layers: int) -> dict[str, Any]:
    if fields.text("scoring_func", "sigmoid") != "sigmoid":
        raise fields.bad("scoring_func", "sigmoid")
    if fields.text("topk_method", "noaux_tc") != "noaux_tc":
        raise fields.bad("topk_method", "noaux_tc")
    experts = fields.integer("n_routed_experts", 1, 4096)
    routing = _routing(fields, "sigmoid", experts, True)
    if experts // routing.groups < 2:
        raise fields.bad("n_group", f"groups of at least two of the {experts} experts")
    latent = _latent(fields, interleaved=fields.flag("rope_interleave", True))
    return {
        **_shared_traits(fields, layers, routing, latent),
        "expert_weights_sum_to_one": fields.flag("norm_topk_prob", True),
    }


def _ropes(fields: Fields, _head_dim: int, max_positions: int, layers: int) -> Ropes:
    dim = fields.integer("qk_rope_head_dim", 2, _WIDTH_MAX, 64)
    return (read_rope(fields, dim, max_positions),), (0,) * layers


def _attention(config: ModelConfig, latent: LatentShape, layer: int) -> list[TensorSpec]:
    at, hidden, heads = f"model.layers.{layer}.self_attn.", config.hidden, config.heads
    q_rows, kv_rows = heads * config.head_dim, latent.kv_rank + latent.rope_dim
    specs = [
        TensorSpec(at + "kv_a_layernorm.weight", (latent.kv_rank,), "kv_norm"),
        # Attention multiplies by parts of this matrix and of its transpose: it stays unquantised.
        TensorSpec(
            at + "kv_b_proj.weight",
            (heads * (latent.nope_dim + latent.v_dim), latent.kv_rank),
            "kv_b.weight",
            plain=True,
        ),
        TensorSpec(at + "o_proj.weight", (hidden, heads * latent.v_dim), "out.weight"),
    ]
    row = 0
    if latent.q_rank is None:
        specs.append(TensorSpec(at + "q_proj.weight", (q_rows, hidden), "q.weight"))
    else:
        row = latent.q_rank
        specs.append(TensorSpec(at + "q_a_proj.weight", (row, hidden), "latent.weight"))
        specs.append(TensorSpec(at + "q_a_layernorm.weight", (row,), "q_norm"))
        specs.append(TensorSpec(at + "q_b_proj.weight", (q_rows, row), "q.weight"))
    specs.append(TensorSpec(at + "kv_a_proj_with_mqa.weight", (kv_rows, hidden), "latent.weight", row))
    if config.qkv_bias:
        if latent.q_rank is not None:
            specs.append(TensorSpec(at + "q_a_proj.bias", (row,), "latent.bias"))
        specs.append(TensorSpec(at + "kv_a_proj_with_mqa.bias", (kv_rows,), "latent.bias", row))
    if config.out_bias:
        specs.append(TensorSpec(at + "o_proj.bias", (hidden,), "out.bias"))
    return specs


def _layout(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    if config.latent is None:
        return ()
    both = (*norm_tensors(config, layer), *_attention(config, config.latent, layer))
    if not config.sparse[layer]:
        return (*both, *mlp_tensors(config, layer))
    at = f"model.layers.{layer}.mlp."
    specs = [
        *both,
        TensorSpec(
            at + "gate.weight", (config.experts, config.hidden), "router.weight", plain=True, wide=True
        ),
        *expert_tensors(config, at + "experts.", ("gate_proj", "up_proj", "down_proj")),
    ]
    if config.routing.kind == "sigmoid":
        correction = at + "gate.e_score_correction_bias"
        specs.append(TensorSpec(correction, (config.experts,), "router.correction", wide=True))
    if config.shared_width:
        specs.extend(gated_tensors(at + "shared_experts.", config.hidden, config.shared_width, "shared."))
    return tuple(specs)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    max_positions=2048,
    traits=_v2_traits,
    head_dim=64,
    ropes=_ropes,
    layout=_layout,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    max_positions=4096,
    traits=_v3_traits,
    head_dim=64,
    ropes=_ropes,
    layout=_layout,
)
