"""DeepSeek's FP8 checkpoints: read as the very numbers that their bytes and block scales stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_shards import CheckpointError, CheckpointIndex, ConfigError, ModelConfig, load_span, shape_of
from model_shards.packing import Packing

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28]
# sign, four bits of exponent, three of mantissa (OFP8, 5.1), written out from its definition; the last of each is NaN
VALUES = [
    sign * (mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    for sign in (1.0, -1.0)
    for exponent in range(16)
    for mantissa in range(8)
]
SHAPE = {
    "hidden_size": 160, "intermediate_size": 144, "q_lora_rank": 24, "kv_lora_rank": 136, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "num_hidden_layers": 3,
}  # fmt: skip


def rounded(weight, block):
    """weight [rows, width] -> (bytes as E4M3, scales by block, the numbers they stand for), by the definition."""
    rows, width = weight.shape
    tall, wide = -(-rows // block[0]), -(-width // block[1])
    scales, stored, near = torch.empty(tall, wide), torch.empty_like(weight), torch.empty_like(weight)
    for i in range(tall):
        for j in range(wide):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].abs().max() / 448.0
            stored[at] = (weight[at] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            near[at] = stored[at] * scales[i, j]
    return stored.to(torch.float8_e4m3fn), scales, near


@pytest.fixture(params=[(128, 128), (16, 48)])
def published(request, make_reference, tmp_path):
    """(directory in FP8, reference logits of the numbers it stands for, those by name)."""
    reference = make_reference("deepseek_v3", **SHAPE)
    directory = tmp_path / "model"
    shutil.copytree(reference.directory, directory)
    path = directory / "model.safetensors"
    tensors, near = load_file(path), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") or n.endswith("_mqa.weight")]:
        tensors[name], tensors[name + "_scale_inv"], near[name] = rounded(tensors[name], request.param)
    save_file(tensors, path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": list(request.param),
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory, near


def plain_copy(directory, near, target):
    """The checkpoint of the numbers themselves, in float32."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name: near.get(name, value) for name, value in tensors.items() if not name.endswith("_scale_inv")}
    save_file(kept, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_bytes_are_read_as_e4m3_by_its_definition():
    finite = [code for code in range(256) if code % 128 != 127]
    stored = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert stored.tolist() == [VALUES[code] for code in finite]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_numbers_the_bytes_stand_for(published, tools, tmp_path, caplog, dtype):
    directory, near = published
    assert any("experts.7.up_proj" in name for name in near)
    assert any("kv_b_proj" in name for name in near)
    plain = plain_copy(directory, near, tmp_path / "plain")
    for cuts in [(0, 3), (0, 1, 2, 3)]:
        found = tools.Chain(tools.engines_of(directory, cuts, dtype=dtype)).logits(TOKENS)
        expected = tools.Chain(tools.engines_of(plain, cuts, dtype=dtype)).logits(TOKENS)
        assert torch.equal(found, expected)
    assert "eight-bit floats are not evenly spaced" in caplog.text


def test_logits_are_those_of_the_reference(make_reference, tools, tmp_path):
    """A dense model, whose matrices the reference keeps under their names."""
    reference = make_reference("llama", hidden_size=144, intermediate_size=136)
    directory = tmp_path / "model"
    shutil.copytree(reference.directory, directory)
    tensors, near = load_file(directory / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name], tensors[name + "_scale_inv"], near[name] = rounded(tensors[name], (128, 128))
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    expected = reference.logits_with(TOKENS, lambda name, weight: near.get(name, weight))
    for cuts in tools.splits(4):
        found = tools.Chain(tools.engines_of(directory, cuts)).logits(TOKENS)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - reference.logits(TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_here_they_are_what_the_plain_numbers_become(published, tools, tmp_path, quant):
    directory, near = published
    plain = plain_copy(directory, near, tmp_path / "plain")
    found, expected = (
        tools.Chain(tools.engines_of(path, (0, 3), quant=quant)).logits(TOKENS) for path in (directory, plain)
    )
    assert torch.equal(found, expected)
    for path in (directory, plain):
        config, index = ModelConfig.from_dir(path), CheckpointIndex.open(path)
        held = load_span(path, index, config, 0, 3, quant=quant).weight_bytes
        shape = shape_of(config, index, "bfloat16", quant)
        assert held <= 3 * shape["layer_bytes"] + shape["embed_bytes"] + shape["head_bytes"]


@pytest.mark.parametrize("rows", [32, 4096])
def test_tiles_read_apart_are_those_read_at_once(published, tools, monkeypatch, rows):
    directory, _ = published
    whole = tools.Chain(tools.engines_of(directory, (0, 3))).logits(TOKENS)
    monkeypatch.setattr("model_shards.weights.CHUNK_ROWS", rows)
    assert torch.equal(tools.Chain(tools.engines_of(directory, (0, 3))).logits(TOKENS), whole)


def test_a_span_reads_its_own_bytes_and_scales_only(published):
    directory, _ = published
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    span = load_span(directory, index, config, 1, 2)
    ranges = index.span_ranges(config, 1, 2)["model.safetensors"]
    assert span.bytes_read == sum(end - start for start, end in ranges)
    assert all(any(a <= first and last <= b for a, b in ranges) for _, first, last in span.ranges_read)


BROKEN = {
    "no scales": (lambda t, n: t.pop(n + "_scale_inv"), "_scale_inv: missing from the checkpoint"),
    "scales of other blocks": (
        lambda t, n: t.update({n + "_scale_inv": torch.ones(7, 9)}),
        r"_scale_inv: shape \[7, 9\], expected \[",
    ),
    "nan": (lambda t, n: t[n].view(torch.uint8)[3].fill_(127), "contains nan, expected finite"),
    "an infinite scale": (
        lambda t, n: t[n + "_scale_inv"].fill_(float("inf")), "_scale_inv: contains inf, expected finite"
    ),
    "too large": (lambda t, n: t[n + "_scale_inv"].fill_(3e38), "contains .*inf times its scale in torch.float32"),
    "another shape": (
        lambda t, n: t.update({n: torch.zeros(3, 160).to(torch.float8_e4m3fn)}),
        r"shape \[3, 160\], config.json implies",
    ),
    "eight-bit norms": (
        lambda t, _: t.update(
            {"model.layers.0.input_layernorm.weight": torch.zeros(160).to(torch.float8_e4m3fn)}
        ),
        "dtype F8_E4M3, expected of single matrices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_files_are_refused_by_tensor_and_values(published, tools, case):
    directory, _ = published
    change, message = BROKEN[case]
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(tensors, "model.layers.0.self_attn.o_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        tools.engines_of(directory, (0, 3))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("fmt", "e5m2", "fmt is 'e5m2', expected e4m3"),
        ("activation_scheme", "static", "expected dynamic"),
        ("weight_block_size", None, "weight_block_size is None, expected two integers"),
        ("weight_block_size", [128], "expected two integers"),
        ("weight_block_size", [0, 128], "a list of integers from 1"),
    ],
)
def test_other_kinds_of_fp8_are_refused_by_field(published, field, value, expected):
    directory, _ = published
    config = json.loads((directory / "config.json").read_text())
    assert ModelConfig.from_dict(config).packing == Packing("fp8", block=tuple(
        config["quantization_config"]["weight_block_size"]
    ))  # fmt: skip
    config["quantization_config"][field] = value
    with pytest.raises(ConfigError, match=expected):
        ModelConfig.from_dict(config)
