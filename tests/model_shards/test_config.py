"""config.json: what is read, and one clear line for what cannot be served."""

from __future__ import annotations

import json

import pytest

from model_shards import ConfigError, ModelConfig, supported_families
from model_shards.families.base import Routing

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "q_lora_rank": 8}


def test_the_fields_of_a_llama_config():
    config = ModelConfig.from_dict(LLAMA)
    assert (config.family, config.layers, config.hidden, config.heads, config.kv_heads) == (
        "llama",
        2,
        64,
        4,
        2,
    )
    assert (config.head_dim, config.intermediate, config.vocab, config.context_tokens) == (16, 96, 100, 128)
    assert (config.tied, config.eos_ids, config.bos_id, config.norm_eps) == (True, (2, 7), 1, 1e-5)
    assert config.windows == (None, None)


def test_family_defaults_where_the_config_is_silent():
    qwen = ModelConfig.from_dict(
        {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": None}
    )
    assert (qwen.qkv_bias, qwen.out_bias, qwen.tied, qwen.norm_eps) == (True, False, False, 1e-5)
    qwen3 = ModelConfig.from_dict({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.head_dim, qwen3.qk_norm) == (128, True)
    bare = {key: value for key, value in LLAMA.items() if key not in ("architectures", "num_key_value_heads")}
    assert ModelConfig.from_dict({**bare, "model_type": "llama"}).kv_heads == 4


def test_generation_config_adds_its_ends_of_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert ModelConfig.from_dir(tmp_path).eos_ids == (2, 7, 9)


def test_an_unknown_architecture_is_named_together_with_those_supported():
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**LLAMA, "architectures": ["MambaForCausalLM"]})
    assert caught.value.field == "architectures"
    assert "MambaForCausalLM" in str(caught.value)
    for family in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert family in str(caught.value)
    assert set(supported_families()) == {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "phi3", "smollm3",
        "deepseek_v2", "deepseek_v3", "gpt_oss",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", None),
        ("hidden_size", 66),
        ("hidden_size", 1 << 40),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 15),
        ("intermediate_size", -1),
        ("vocab_size", 0),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", float("inf")),
        ("hidden_act", "relu"),
        ("eos_token_id", 100),
        ("eos_token_id", ["2"]),
        ("bos_token_id", -1),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("rope_scaling", "linear"),
        ("quantization_config", "gptq"),
    ],
)
def test_a_bad_field_is_refused_by_name_value_and_what_is_right(field, value):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**LLAMA, field: value})
    assert caught.value.field == field
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000, "\xff"])
def test_a_config_file_that_is_not_an_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, None),
        ),
    ],
)
def test_qwen_sliding_windows(changes, windows):
    config = ModelConfig.from_dict({**LLAMA, "architectures": ["Qwen2ForCausalLM"], **changes})
    assert config.windows == windows


def test_unknown_layer_types_are_refused():
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_dict(
            {
                **LLAMA,
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["linear_attention", "full_attention"],
            }
        )


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window"),
        ("MixtralForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("Qwen3MoeForCausalLM", {"num_experts": 0}, "num_experts"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("GptOssForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("GptOssForCausalLM", {"swiglu_limit": 0}, "swiglu_limit"),
        ("GptOssForCausalLM", {"sliding_window": 0}, "sliding_window"),
        ("DeepseekV2ForCausalLM", {}, "n_routed_experts"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "noaux_tc"}, "topk_method"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "scoring_func": "sigmoid"}, "scoring_func"),
        ("DeepseekV2ForCausalLM", {**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "topk_method": "greedy"}, "topk_method"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 3}, "n_group"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 8}, "n_group"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 4, "topk_group": 1}, "num_experts_per_tok"),
        ("DeepseekV3ForCausalLM", {**DEEPSEEK, "qk_rope_head_dim": 7}, "head_dim"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.short_factor",
        ),
    ],
)
def test_a_bad_field_of_one_family_is_refused_by_name(architecture, changes, field):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**LLAMA, "architectures": [architecture], **changes})
    assert caught.value.field == field


def test_a_null_window_is_none_and_an_absent_one_mistrals_default():
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_dict(mistral).windows == (4096, 4096)
    assert ModelConfig.from_dict({**mistral, "sliding_window": None}).windows == (None, None)


def test_the_older_spelling_of_gemma_3():
    config = ModelConfig.from_dict(
        {
            **LLAMA,
            "num_hidden_layers": 6,
            "architectures": ["Gemma3ForCausalLM"],
            "rope_theta": 1e6,
            "rope_local_base_freq": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 16,
            "sliding_window_pattern": 3,
        }
    )
    assert config.windows == (16, 16, None, 16, 16, None)
    assert config.layer_ropes == (1, 1, 0, 1, 1, 0)
    assert [(rope.kind, rope.theta, rope.factor) for rope in config.ropes] == [
        ("linear", 1e6, 8.0),
        ("default", 5000.0, 1.0),
    ]
    assert config.context_tokens == 128


def test_every_fourth_layer_of_smollm3_is_not_rotated():
    config = ModelConfig.from_dict({**LLAMA, "num_hidden_layers": 9, "architectures": ["SmolLM3ForCausalLM"]})
    assert [layer for layer, rope in enumerate(config.layer_ropes) if rope is None] == [3, 7]


def test_deepseek_defaults_where_the_config_is_silent():
    shared = {**LLAMA, **DEEPSEEK, "num_hidden_layers": 5}
    v2 = ModelConfig.from_dict({**shared, "architectures": ["DeepseekV2ForCausalLM"]})
    assert (v2.sparse, v2.shared_width, v2.routing) == ((True,) * 5, 32, Routing())
    v3 = ModelConfig.from_dict({**shared, "architectures": ["DeepseekV3ForCausalLM"], "n_group": 4})
    assert (v3.sparse, v3.shared_width) == ((False,) * 3 + (True,) * 2, 16)
    assert v3.routing == Routing("sigmoid", 4, 4, 2.5)
    assert (v3.kv_shape, v3.head_dim, v3.kv_heads) == ((1, 512, 64), 192, 4)
    alone = ModelConfig.from_dict(
        {**shared, "architectures": ["DeepseekV2ForCausalLM"], "n_shared_experts": None}
    )
    assert alone.shared_width == 0


def test_gpt_oss_defaults_where_the_config_is_silent():
    config = ModelConfig.from_dict({**LLAMA, "num_hidden_layers": 3, "architectures": ["GptOssForCausalLM"]})
    assert config.windows == (128, None, 128)
    assert (config.qkv_bias, config.out_bias, config.sinks) == (True, True, True)
    assert (config.experts, config.experts_per_token, config.head_dim) == (128, 4, 64)
    assert (config.swiglu_limit, config.swiglu_alpha) == (7.0, 1.702)
    rope = config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.truncate) == ("yarn", 150000.0, 32.0, False)
    assert rope.original_context == 4096
