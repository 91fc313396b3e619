"""Logits and greedy text equal `transformers`' on random checkpoints: families, options, scalings, splits,
chunks."""

from __future__ import annotations

import pytest
import torch

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28, 77, 12, 50]
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.9,
        "mscale_all_dim": 0.6,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "rope_theta": 10000.0,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
        "rope_theta": 10000.0,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
QWEN3_MOE = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
GPT_OSS = {"head_dim": 8, "sliding_window": 5, "num_local_experts": 6, "num_experts_per_tok": 3}
YARN_MSCALES = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "rope_theta": 10000.0,
}
VARIANTS = {
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 16}),
    "llama_eps": ("llama", {"rms_norm_eps": 0.01}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3_window": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    **{f"llama_{name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "qwen2_yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "qwen3_llama3": ("qwen3", {"head_dim": 16, "rope_parameters": ROPES["llama3"]}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3_window": (
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 64}),
    "phi3_partial": ("phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3_longrope_long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 4}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2_uncapped": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": KINDS}),
    "gemma3_scaled": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe_dense_layers": ("qwen3_moe", {**QWEN3_MOE, "mlp_only_layers": [0], "decoder_sparse_step": 2}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": 10, "topk_method": "group_limited_greedy"}),
    "deepseek_v2_plain_query": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2_yarn": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": 10, "attention_bias": True, "rope_parameters": YARN_MSCALES},
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 10}),
    "deepseek_v3_plain_query": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False},
    ),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": 10, "rope_interleave": False, "rope_parameters": YARN_MSCALES},
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss_clamped": ("gpt_oss", {**GPT_OSS, "swiglu_limit": 0.2, "swiglu_alpha": 3.0}),
    "gpt_oss_plain": (
        "gpt_oss",
        {
            **GPT_OSS,
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
}
# Rotated by the length of the sequence so far: compared with the reference's own cache, cut the same way.
LENGTH_DEPENDENT = ("phi3_longrope_long",)
CHUNKINGS = {
    "whole": [12],
    "chunks": [5, 4, 3],
    "one_by_one": [1] * 12,
    "prompt_then_decode": [8, 1, 1, 1, 1],
}


def cut(tokens, sizes):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(tokens[at : at + size])
        at += size
    return pieces


@pytest.fixture(params=VARIANTS, scope="module")
def reference(request, make_reference):
    model_type, changes = VARIANTS[request.param]
    made = make_reference(model_type, **changes)
    made.length_dependent = request.param in LENGTH_DEPENDENT
    return made


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_logits_equal_the_reference_however_the_prompt_is_cut(reference, tools, chunking):
    chain, pieces = (
        tools.Chain(tools.engines_of(reference.directory, (0, 2, 4))),
        cut(TOKENS, CHUNKINGS[chunking]),
    )
    ours = torch.cat([chain.logits(piece) for piece in pieces])
    expected = reference.cached_logits(pieces) if reference.length_dependent else reference.logits(TOKENS)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_every_split_gives_the_same_bits_and_the_reference_greedy_text(reference, tools):
    expected = reference.greedy(TOKENS, 12)
    whole = None
    for cuts in tools.splits(4):
        engines = tools.engines_of(reference.directory, cuts)
        logits = tools.Chain(engines, "logits").logits(TOKENS)
        whole = logits if whole is None else whole
        assert torch.equal(logits, whole), cuts
        assert tools.Chain(engines, "greedy").greedy(TOKENS, 12) == expected, cuts
