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
}
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
    return make_reference(model_type, **changes)


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_logits_equal_the_reference_however_the_prompt_is_cut(reference, tools, chunking):
    chain = tools.Chain(tools.engines_of(reference.directory, (0, 2, 4)))
    ours = torch.cat([chain.logits(piece) for piece in cut(TOKENS, CHUNKINGS[chunking])])
    torch.testing.assert_close(ours, reference.logits(TOKENS), atol=1e-4, rtol=0)


def test_every_split_gives_the_same_bits_and_the_reference_greedy_text(reference, tools):
    expected = reference.greedy(TOKENS, 12)
    whole = None
    for cuts in tools.splits(4):
        engines = tools.engines_of(reference.directory, cuts)
        logits = tools.Chain(engines, "logits").logits(TOKENS)
        whole = logits if whole is None else whole
        assert torch.equal(logits, whole), cuts
        assert tools.Chain(engines, "greedy").greedy(TOKENS, 12) == expected, cuts
