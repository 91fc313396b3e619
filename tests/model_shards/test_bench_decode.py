"""The benchmark of decoding, on a checkpoint that it makes itself."""

from __future__ import annotations

import json

import pytest

from model_shards import (
    CheckpointIndex,
    ConfigError,
    ModelConfig,
    bench_decode,
    bench_speculation,
    random_checkpoint,
)

SHAPES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}


def config_file(tmp_path, family, **more):
    values = {
        "model_type": family,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **more,
    }
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_random_checkpoint_of_any_shape_is_measured(tmp_path, family):
    random_checkpoint(config_file(tmp_path, family, **SHAPES[family]), tmp_path / "made")
    found = bench_decode(tmp_path / "made", batch=3, prompt_tokens=20, new_tokens=4, chunk_tokens=16)
    assert all(value > 0 for value in found.values())
    index = CheckpointIndex.open(tmp_path / "made")
    config = ModelConfig.from_dir(tmp_path / "made")
    assert set(index.span_ranges(config, 0, 2)) == {"model.safetensors"}
    assert found["read_gb_per_s"] < found["weight_bytes"] * found["decode_tokens_per_s"] / 1e9


def test_a_packed_shape_is_refused(tmp_path):
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    with pytest.raises(ConfigError, match="quantization_config"):
        random_checkpoint(config_file(tmp_path, "llama", quantization_config=packing), tmp_path / "made")


@pytest.mark.parametrize("guesser", ["lookup", "draft"])
def test_what_guessing_brings_is_measured(tmp_path, guesser):
    random_checkpoint(config_file(tmp_path, "llama"), tmp_path / "made")
    draft = tmp_path / "made" if guesser == "draft" else None
    found = bench_speculation(tmp_path / "made", guesser, draft=draft, prompt_tokens=40, new_tokens=30)
    figures = ("tokens_per_s", "without", "right", "passes")
    assert set(found) == {f"{task}_{figure}" for task in ("repetitive", "random") for figure in figures}
    assert found["repetitive_tokens_per_s"] > 0
    assert 0 < found["repetitive_passes"] <= 29
    assert 0 <= found["random_right"] <= 1
    if guesser == "draft":
        assert found["repetitive_right"] == 1.0


def test_a_draft_is_a_model_and_a_look_up_has_none(tmp_path):
    with pytest.raises(ConfigError, match="lookup, or draft with"):
        bench_speculation(tmp_path, "draft")
    with pytest.raises(ConfigError, match="lookup, or draft with"):
        bench_speculation(tmp_path, "lookup", draft=tmp_path)
