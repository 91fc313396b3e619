"""GPT-OSS as it is published: experts in MXFP4, read as the very numbers that its bits stand for."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_shards import CheckpointError, CheckpointIndex, Engine, ModelConfig, load_span, shape_of

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28, 77, 12, 50]
# sign, two bits of exponent, one of mantissa (OCP Microscaling 1.0, 5.3.3), written out from its definition
VALUES = [
    (-1.0 if sign else 1.0) * (mantissa / 2 if not exponent else (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    for sign, exponent, mantissa in itertools.product(range(2), range(4), range(2))
]


def pack_rows(rows):
    """rows [..., width] float32 -> (nearest values, blocks [..., width / 32, 16], scales [..., width / 32])."""
    groups = rows.reshape(*rows.shape[:-1], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / 2.0 ** exponent.unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - torch.tensor(VALUES)).abs().argmin(-1)
    near = torch.tensor(VALUES)[codes] * 2.0 ** exponent.unsqueeze(-1)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return near.reshape(rows.shape), blocks, (exponent + 127).to(torch.uint8)


@pytest.fixture
def published(make_reference, tmp_path):
    """(directory in MXFP4, reference logits of the numbers it stands for)."""
    reference = make_reference(
        "gpt_oss",
        head_dim=8,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
    )
    shutil.copytree(reference.directory, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors, near = load_file(path), {}
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        stored = tensors.pop(name)
        values, tensors[name + "_blocks"], tensors[name + "_scales"] = pack_rows(stored.mT.contiguous())
        near[name] = values.mT.contiguous()
    save_file(tensors, path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    expected = reference.logits_with(TOKENS, lambda name, weight: near.get(name, weight))
    return tmp_path / "model", expected


def test_the_values_are_those_of_e2m1():
    assert VALUES[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 2, 3, 4)])
def test_logits_equal_those_of_the_unpacked_numbers(published, tools, cuts, caplog):
    directory, expected = published
    engines = tools.engines_of(directory, cuts)
    torch.testing.assert_close(tools.Chain(engines).logits(TOKENS), expected, atol=1e-4, rtol=0)
    assert "gate_up_proj_blocks" in caplog.text
    assert "MXFP4" in caplog.text


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_rows_read_in_pieces_are_those_read_at_once(published, tools, monkeypatch, rows):
    directory, expected = published
    monkeypatch.setattr("model_shards.weights.CHUNK_ROWS", rows)
    ours = tools.Chain(tools.engines_of(directory, (0, 4))).logits(TOKENS)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_bfloat16_holds_the_numbers_exactly(published):
    directory, _ = published
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    wide = load_span(directory, index, config, 0, 1, dtype="float32").layers[0].mlp.experts
    narrow = load_span(directory, index, config, 0, 1, dtype="bfloat16").layers[0].mlp.experts
    for ours, theirs in zip(narrow, wide, strict=True):
        assert torch.equal(ours.gate_up.weight.float(), theirs.gate_up.weight)
        assert torch.equal(ours.down.weight.float(), theirs.down.weight)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_every_byte_of_the_span_is_read_once_and_what_is_held_was_foretold(published, quant):
    directory, _ = published
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    ranges = index.span_ranges(config, 1, 3)
    span = load_span(directory, index, config, 1, 3, quant=quant)
    assert span.bytes_read == sum(end - start for found in ranges.values() for start, end in found)
    shape = shape_of(config, index, "bfloat16", quant)
    norms_and_sinks = 2 * 2 * 32 + 4 * 4
    assert span.weight_bytes == 2 * (shape["layer_bytes"] - norms_and_sinks)
    Engine(span, kv_bytes_max=1 << 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_up_proj_blocks", lambda t: t[:, :, :, :8].contiguous(), r"shape \[4, 128, 1, 8\]"),
        ("down_proj_scales", lambda t: t[:, :-1].contiguous(), "shape"),
        ("down_proj_scales", lambda t: t.to(torch.int8), "dtype I8"),
        ("down_proj_scales", lambda t: torch.full_like(t, 255), "contains nan"),
        ("down_proj_blocks", None, "missing"),
    ],
)
def test_wrong_pieces_are_named(published, name, change, message):
    directory, _ = published
    path, whole = directory / "model.safetensors", f"model.layers.0.mlp.experts.{name}"
    tensors = load_file(path)
    stored = tensors.pop(whole)
    if change is not None:
        tensors[whole] = change(stored)
    save_file(tensors, path)
    config = ModelConfig.from_dir(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_span(directory, CheckpointIndex.open(directory), config, 0, 1)
    assert caught.value.tensor in (whole, whole.removesuffix("_blocks"))
