"""Dynamic scaling depends on the length of the sequence so far, as in `transformers`, with its cache and
without."""

from __future__ import annotations

import pytest
import torch

from model_shards import ConfigError, ModelConfig
from model_shards.rope import RotaryTable, inverse_frequencies

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
TOKENS = [(7 * at + 3) % 97 for at in range(40)]


@pytest.fixture
def stretched(make_reference):
    return make_reference("llama", max_position_embeddings=16, rope_parameters=DYNAMIC)


def test_dynamic_scaling_without_cache_sees_the_whole_length(stretched, tools):
    chain = tools.Chain(tools.engines_of(stretched.directory, (0, 1, 4)), tokens_max=32)
    torch.testing.assert_close(chain.logits(TOKENS[:30]), stretched.logits(TOKENS[:30]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [[30], [10, 10, 10], [16, 1, 1, 1, 11], [14, 1, 1, 1, 1, 1, 11]])
def test_dynamic_scaling_with_cache_keeps_what_was_rotated_before(stretched, tools, sizes):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(TOKENS[at : at + size])
        at += size
    chain = tools.Chain(tools.engines_of(stretched.directory, (0, 3, 4)), tokens_max=32)
    ours = torch.cat([chain.logits(piece) for piece in pieces])
    torch.testing.assert_close(ours, stretched.cached_logits(pieces), atol=1e-4, rtol=0)


def test_a_long_session_does_not_change_a_short_one_beside_it(stretched, tools):
    engines = tools.engines_of(stretched.directory, (0, 4))
    alone = tools.Chain(engines, "alone", 32).logits(TOKENS[:8])
    tools.Chain(engines, "long", 32).logits(TOKENS[:30])
    assert torch.equal(tools.Chain(engines, "after", 32).logits(TOKENS[:8]), alone)


def old_style(scaling, **changes):
    values = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 9,
        "max_position_embeddings": 2048,
        "rope_theta": 20000.0,
        "rope_scaling": scaling,
    }
    return ModelConfig.from_dict({**values, **changes})


def test_old_and_new_spelling_of_scaling_are_the_same():
    old = old_style({"type": "linear", "factor": 2})
    new = old_style(None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0})
    assert old == new


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 2048),
        ({"type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 2048),
    ],
)
def test_usable_context_follows_the_scaling(scaling, context):
    assert old_style(scaling).context_tokens == context


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "rope_scaling.rope_type"),
        ({"type": "linear"}, "rope_scaling.factor"),
        ({"type": "linear", "factor": "2"}, "rope_scaling.factor"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor"),
        ({"type": "dynamic", "factor": float("nan")}, "rope_scaling.factor"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": -1}, "rope_scaling.low_freq_factor"),
        ([], "rope_scaling"),
    ],
)
def test_bad_scaling_is_refused_by_name(scaling, field):
    with pytest.raises(ConfigError) as caught:
        old_style(scaling)
    assert caught.value.field == field


def test_equal_frequency_factors_are_refused():
    with pytest.raises(ConfigError, match="high_freq_factor"):
        old_style({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0})


def test_rows_do_not_depend_on_how_the_table_grew():
    rope = old_style(None).rope
    at_once = RotaryTable(rope, torch.float32, torch.device("cpu"))
    far = at_once.rows(0, 2000)
    stepwise = RotaryTable(rope, torch.float32, torch.device("cpu"))
    for at in range(0, 2000, 100):
        near = stepwise.rows(at, 100)
        assert all(torch.equal(a, b[at : at + 100]) for a, b in zip(near, far, strict=True))


def test_dynamic_scaling_changes_nothing_within_the_original_context():
    rope = old_style({"type": "dynamic", "factor": 2.0}).rope
    assert torch.equal(inverse_frequencies(rope, 100)[0], inverse_frequencies(rope, 2048)[0])
    assert not torch.equal(inverse_frequencies(rope, 100)[0], inverse_frequencies(rope, 2049)[0])
