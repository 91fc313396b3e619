"""Int8 matrices in oneDNN's order: close to the product of their numbers, and the same bits in any company."""

from __future__ import annotations

import json

import pytest
import torch

from model_shards import CheckpointIndex, Engine, ModelConfig, Sampling, Step, load_span, random_checkpoint
from model_shards.integers import PIECE_ROWS, PackedInt8, halved, integers_pay
from model_shards.linear import PackedLinear
from model_shards.quant import Int8Weight

needs_tiles = pytest.mark.skipif(not integers_pay(), reason="this processor has no tiles for int8")
ROWS, WIDTH = 160, 192


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, WIDTH, generator=generator)
    found[:, 7] *= 300  # as a few inputs of real models are
    return found.bfloat16()


def test_two_rows_of_eight_bits_hold_fifteen():
    x = rows(20)
    scale, halves = halved(x)
    high, low = halves.double().view(2, 20, WIDTH)
    largest = x.double().abs().amax(1, True)
    assert ((scale.double() * (high + low / 254) - x.double()).abs() <= largest / (127 * 254)).all()


def test_a_row_of_zeros_is_zeros():
    scale, halves = halved(torch.zeros(1, WIDTH, dtype=torch.bfloat16))
    assert float(scale) > 0
    assert not halves.any()


@needs_tiles
@pytest.mark.parametrize("count", [1, 5, PIECE_ROWS, PIECE_ROWS + 1, 40])
def test_products_are_those_of_the_numbers_and_rows_have_the_bits_they_have_alone(count):
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-127, 128, (ROWS, WIDTH), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(ROWS, generator=generator).bfloat16(), torch.randn(ROWS).bfloat16()
    weight, x = PackedInt8(q, scale), rows(count)
    found = weight.matmul(x)
    exact = x.double() @ q.double().T * scale.double()
    # A result rounded to bfloat16, and what fifteen bits of the inputs leave out.
    left_out = x.double().abs().amax(1, True) / 32258 * (q.double().abs().sum(1) * scale.double())
    assert ((found.double() - exact).abs() <= exact.abs() / 250 + left_out).all()
    assert all(torch.equal(found[at], weight.matmul(x[at : at + 1])[0]) for at in range(count))
    assert torch.equal(weight.matmul(x, bias), found + bias)


@needs_tiles
def test_what_is_not_finite_stays_so():
    weight = PackedInt8(torch.ones(ROWS, WIDTH, dtype=torch.int8), torch.ones(ROWS))
    for value in (float("nan"), float("inf")):
        x = rows(2)
        x[0, 3] = value
        found = weight.matmul(x)
        assert not found[0].isfinite().any()
        assert found[1].isfinite().all()


@needs_tiles
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_tied_head_is_packed_and_its_table_looked_up(tmp_path, quant):
    shape = {
        "model_type": "qwen2", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    random_checkpoint(tmp_path / "shape.json", tmp_path / "m")
    config, index = ModelConfig.from_dir(tmp_path / "m"), CheckpointIndex.open(tmp_path / "m")
    span = load_span(tmp_path / "m", index, config, 0, 2, quant=quant)
    assert isinstance(span.head, PackedLinear)
    assert isinstance(span.head.weight, PackedInt8)
    assert isinstance(span.embed_weight, Int8Weight)
    table = load_span(tmp_path / "m", index, config, 0, 1, quant=quant).embed(torch.arange(256))
    assert torch.equal(span.embed(torch.arange(256)), table)
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(span.head(x).float(), x.float() @ table.float().T, atol=0.02, rtol=0.02)
    engine = Engine(span, kv_bytes_max=1 << 20)
    engine.open("one", 0, 2, 8)
    assert engine.run([Step("one", 0, (5, 6), sample=Sampling(temperature=0))])[0].token is not None
