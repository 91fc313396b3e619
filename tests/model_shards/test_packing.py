"""Matrices in oneDNN's order: the same products, rows that do not depend on their neighbours, no second embedding."""

from __future__ import annotations

import pytest
import torch

from model_shards import Sampling, Step, weights
from model_shards import packed as module
from model_shards.linear import Linear, PackedLinear, linear_over
from model_shards.mapped import mapped_table
from model_shards.packed import PACKED_MIN, PackedWeight, packing_pays, packs

needs_packing = pytest.mark.skipif(
    not packing_pays(), reason="this processor has no AMX tiles, or torch no packing"
)


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_those_of_the_plain_matrix(bias):
    weight = torch.randn(192, 320).bfloat16()
    added = torch.randn(192).bfloat16() if bias else None
    packed = linear_over(PackedWeight(weight.clone()), added)
    assert isinstance(packed, PackedLinear)
    assert (packed.shape, packed.bytes) == ((192, 320), Linear(weight, added).bytes)
    x = torch.randn(40, 320).bfloat16()
    wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
    assert (packed(x).double() - wanted).abs().max() < 0.01 * wanted.abs().max()


@needs_packing
def test_rows_have_the_bits_they_have_alone():
    packed = PackedLinear(PackedWeight(torch.randn(1152, 896).bfloat16()))
    x = torch.randn(32, 896).bfloat16()
    alone = torch.cat([packed(row[None]) for row in x])
    for rows in (2, 5, 16, 32):
        assert torch.equal(packed(x[:rows]), alone[:rows])


def test_what_is_small_or_of_another_kind_stays_plain():
    assert not packs(torch.zeros(PACKED_MIN - 1, 512, dtype=torch.bfloat16))
    assert not packs(torch.zeros(512, 512))
    assert not packs(torch.zeros(512, dtype=torch.bfloat16))


@needs_packing
def test_a_tied_embedding_is_not_in_memory_beside_its_packed_head(
    make_reference, tools, tmp_path, monkeypatch
):
    shape = {"hidden_size": 64, "vocab_size": 128, "tie_word_embeddings": True}
    reference = make_reference("llama", dtype="bfloat16", **shape)
    packed = tools.engines_of(reference.directory, (0, 4), dtype="bfloat16", scratch=tmp_path)[0]
    assert list(tmp_path.iterdir()) == []
    assert isinstance(packed.span.head, PackedLinear)
    monkeypatch.setattr(module, "packing_pays", lambda: False)
    plain = tools.engines_of(reference.directory, (0, 4), dtype="bfloat16")[0]
    assert isinstance(plain.span.head, Linear)
    assert packed.span.weight_bytes == plain.span.weight_bytes
    tokens = [1, 5, 42, 127]
    assert torch.equal(packed.span.embed(torch.tensor(tokens)), plain.span.embed(torch.tensor(tokens)))
    mine, theirs = (tools.Chain([engine]).logits(tokens) for engine in (packed, plain))
    assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_mapped_table_holds_the_same_numbers(tmp_path):
    table = torch.randn(10, 6).bfloat16()
    assert torch.equal(mapped_table(table, tmp_path), table)
    with pytest.raises(OSError, match="missing"):
        mapped_table(table, tmp_path / "missing")


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}


@needs_packing
def test_sessions_meet_at_packed_experts_with_the_bits_they_have_alone(make_reference, tools):
    reference = make_reference("qwen3_moe", dtype="bfloat16", hidden_size=64, **MOE)
    engine = tools.engines_of(reference.directory, (0, 4), dtype="bfloat16", kv_bytes_max=1 << 22)[0]
    assert engine._exact.largest(7) == 7
    greedy = Sampling(temperature=0)

    def steps(names, position):
        return [Step(name, position, (11 * at % 90 + 1,), sample=greedy) for at, name in enumerate(names)]

    alone, together = [f"a{at}" for at in range(7)], [f"t{at}" for at in range(7)]
    for name in (*alone, *together):
        engine.open(name, 0, 4, 32)
    for position in range(4):
        one_by_one = [engine.run([step])[0] for step in steps(alone, position)]
        at_once = engine.run(steps(together, position))
        assert [r.logprob for r in one_by_one] == [r.logprob for r in at_once]
        assert [r.token for r in one_by_one] == [r.token for r in at_once]


@needs_packing
def test_packed_experts_compute_what_plain_ones_do(make_reference, tools, monkeypatch):
    reference = make_reference("qwen3_moe", dtype="bfloat16", hidden_size=64, **MOE)
    packed = tools.engines_of(reference.directory, (0, 4), dtype="bfloat16")[0]
    monkeypatch.setattr(module, "packing_pays", lambda: False)
    monkeypatch.setattr(weights, "packing_pays", lambda: False)
    plain = tools.engines_of(reference.directory, (0, 4), dtype="bfloat16")[0]
    assert packed.span.weight_bytes == plain.span.weight_bytes
    assert plain._exact.largest(7) == 1
    mine, theirs = (tools.Chain([engine]).logits([1, 5, 42, 90]) for engine in (packed, plain))
    assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()
