"""Matrices in oneDNN's order: the same products, rows that do not depend on their neighbours, no second embedding."""

from __future__ import annotations

import pytest
import torch

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
