"""What a node says of a model it offers: bytes in memory to the last, and what hosts must be like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_shards import CheckpointIndex, ModelConfig, load_span
from node import adverts, embedded
from node.adverts import ModelAdvert
from node.config import DaemonConfig
from node.offers import model_advert, working_bytes
from scheduler import memory_needed
from scheduler.cost import layer_read_bytes


@pytest.fixture(scope="module")
def files():
    directory = embedded.path()
    return ModelConfig.from_dir(directory), CheckpointIndex.open(directory)


def advert(files, **settings):
    config = DaemonConfig(Path("unused"), **settings)
    return model_advert(*files, config, name="m", manifest_id="ab" * 32, created_s=1, copies=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("span", [(0, 2), (3, 5), (6, 8), (0, 8)])
def test_what_a_span_is_said_to_need_is_what_it_takes(files, dtype, quant, span):
    config, index = files
    said = advert(files, dtype=dtype, quant=quant, concurrency=3)
    loaded = load_span(embedded.path(), index, config, *span, dtype=dtype, quant=quant)
    cache = said.kv_bytes_per_token_per_layer * said.context_tokens * 3 * (span[1] - span[0])
    norms = (2 * (span[1] - span[0]) + (span[1] == 8)) * config.hidden * {"float32": 4, "bfloat16": 2}[dtype]
    assert memory_needed(said.shape(), *span) == loaded.weight_bytes + norms + cache + said.working_bytes


def test_a_cache_in_eight_bits_is_said_to_take_half_and_what_widening_it_takes(files):
    config, _ = files
    plain, narrow = (advert(files, dtype="bfloat16", kv_quant=kind) for kind in ("none", "int8"))
    heads, key_width, value_width = config.kv_shape
    assert plain.kv_bytes_per_token_per_layer == 2 * heads * (key_width + value_width)
    assert narrow.kv_bytes_per_token_per_layer == heads * (key_width + 2 + value_width + 2)
    assert narrow.kv_bytes_per_token_per_layer < 0.54 * plain.kv_bytes_per_token_per_layer
    layer = plain.context_tokens * plain.kv_bytes_per_token_per_layer
    assert narrow.working_bytes == plain.working_bytes + layer
    assert memory_needed(narrow.shape(), 0, 8) < memory_needed(plain.shape(), 0, 8)
    assert adverts.read(ModelAdvert, adverts.write(narrow)) == narrow
    assert adverts.read(ModelAdvert, adverts.write(replace(narrow, kv_quant="int3"))) is None


def test_working_space_grows_with_the_width_of_a_layer_and_with_who_decodes_together(files):
    config, _ = files
    assert working_bytes(config, "float32", 4) > working_bytes(config, "bfloat16", 4)
    more = working_bytes(config, "bfloat16", 5) - working_bytes(config, "bfloat16", 4)
    assert more == config.vocab * 4
    wider = replace(config, intermediate=2 * config.intermediate)
    assert working_bytes(wider, "bfloat16", 4) > working_bytes(config, "bfloat16", 4)


def test_tags_that_hosts_must_have_travel_with_the_model(files):
    said = advert(files, require=("trusted",), ends_require=("vetted",))
    policy = said.policy()
    assert (policy.require, policy.ends_require) == (frozenset({"trusted"}), frozenset({"vetted"}))


def test_a_mixture_of_experts_is_charged_for_those_it_is_expected_to_read(files):
    said = replace(advert(files), experts=8, experts_per_token=2, expert_bytes=80_000)
    shape = said.shape()
    dense = shape.layer_bytes - 8 * 80_000
    assert layer_read_bytes(shape, 1) == pytest.approx(dense + 2 * 80_000)
    assert layer_read_bytes(shape, 4) == pytest.approx(dense + 8 * (1 - 0.75**4) * 80_000)


def test_a_mixture_of_experts_says_what_one_expert_takes(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    wide, hidden = 48, 32
    config = MixtralConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    said = advert((ModelConfig.from_dir(tmp_path), CheckpointIndex.open(tmp_path)), dtype="bfloat16")
    assert (said.experts, said.experts_per_token) == (4, 2)
    assert said.expert_bytes == 3 * wide * hidden * 2
    assert said.experts * said.expert_bytes < said.layer_bytes


@pytest.mark.parametrize(
    ("held", "dtype"), [("float32", "float32"), ("float16", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_a_checkpoint_of_full_precision_keeps_it_unless_told_otherwise(tmp_path, held, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, held)).save_pretrained(tmp_path)
    files = (ModelConfig.from_dir(tmp_path), CheckpointIndex.open(tmp_path))
    assert advert(files, dtype="auto").dtype == dtype
    assert advert(files, dtype="bfloat16").dtype == "bfloat16"
