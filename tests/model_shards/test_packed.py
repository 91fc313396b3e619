"""Four-bit checkpoints of GPTQ, AWQ and compressed-tensors: written here bit by bit from their descriptions, read
as the very numbers they stand for, kept packed where our int4 weights can hold them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_shards import CheckpointError, CheckpointIndex, ConfigError, ModelConfig, load_span, shape_of
from model_shards.quant import Int4Weight, Int8Weight, kernel_blocks_known

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28]
GROUP = 32
PACKED = ("proj.weight",)
METHODS = {
    "gptq": ("gptq", {"sym": False}),
    "gptq_symmetric": ("gptq", {"sym": True}),
    "gptq_v2": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "gptq_whole_rows": ("gptq", {"group_size": -1}),
    "gptq_wide_groups": ("gptq", {"group_size": 64}),
    "awq": ("awq", {}),
    "compressed": ("compressed-tensors", {"symmetric": True}),
    "compressed_zeros": ("compressed-tensors", {"symmetric": False}),
    "compressed_plain_zeros": ("compressed-tensors", {"symmetric": False, "int8_zeros": True}),
    "compressed_channel": ("compressed-tensors", {"symmetric": True, "strategy": "channel"}),
}
ORDERED = {
    "gptq_act_order": ("gptq", {"desc_act": True}),
    "gptq_untold_order": ("gptq", {"desc_act": False, "shuffled": True}),
    "compressed_act_order": ("compressed-tensors", {"symmetric": True, "actorder": "group"}),
}
MODELS = {
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 192}),
    "qwen2_biases": ("qwen2", {"hidden_size": 64, "intermediate_size": 192}),
    "phi3_fused": (
        "phi3", {"hidden_size": 64, "intermediate_size": 192, "original_max_position_embeddings": 64}
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "hidden_size": 64, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4, "kv_lora_rank": 64,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 64,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "first_k_dense_replace": 1, "n_shared_experts": 1, "topk_method": "greedy",
        },
    ),
}  # fmt: skip


def words(numbers, order=range(8)):
    """[n, 8 m] of 0..15 -> int32 [n, m]: the number at ``order[i]`` of each eight goes to bits [4 i, 4 i + 4)."""
    eights = np.asarray(numbers, dtype=np.uint64).reshape(len(numbers), -1, 8)
    found = sum(eights[:, :, place] << np.uint64(4 * at) for at, place in enumerate(order))
    return torch.from_numpy(found.astype(np.uint32).view(np.int32).copy())


class Packer:
    """Rounds a weight to four bits in groups and writes it in one method's layout."""

    def __init__(
        self, method, group_size=GROUP, sym=True, symmetric=None, shuffled=None, strategy="group", **options
    ):
        self.method, self.options = method, options
        self.group = -1 if strategy == "channel" else group_size
        self.symmetric = sym if symmetric is None else symmetric
        self.shuffled = (
            bool(options.get("desc_act") or options.get("actorder")) if shuffled is None else shuffled
        )

    def pack(self, name, weight):
        """(what the packed weight stands for, its tensors)."""
        rows, width = weight.shape
        group = width if self.group == -1 else self.group
        count = width // group
        generator = np.random.default_rng(rows * 1000 + width)
        order = np.arange(width) // group
        if self.shuffled:
            order = generator.permutation(order)
        values = weight.double().numpy()
        scale, zero = np.empty((rows, count)), np.empty((rows, count), dtype=np.int64)
        for at in range(count):
            part = values[:, order == at]
            if self.symmetric:
                scale[:, at], zero[:, at] = np.abs(part).max(1) / 7, 8
            else:
                scale[:, at] = (part.max(1) - part.min(1)) / 15
                zero[:, at] = np.clip(np.round(-part.min(1) / scale[:, at]), 0, 15)
        scale = torch.from_numpy(scale).half()
        spread, shift = scale.double().numpy()[:, order], zero[:, order]
        numbers = np.clip(np.round(values / spread) + shift, 0, 15).astype(np.int64)
        stands_for = torch.from_numpy((numbers - shift) * spread).float()
        return stands_for, self._tensors(name, numbers, zero, scale, order)

    def _tensors(self, name, numbers, zero, scale, order):
        base, order = name.removesuffix("weight"), torch.from_numpy(order).int()
        if self.method == "gptq":
            less = 0 if self.options.get("checkpoint_format") == "gptq_v2" else 1
            return {
                base + "qweight": words(numbers).T.contiguous(),
                base + "qzeros": words((zero.T - less) % 16),
                base + "scales": scale.T.contiguous(),
                base + "g_idx": order,
            }
        if self.method == "awq":
            interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
            return {
                base + "qweight": words(numbers.T, interleaved),
                base + "qzeros": words(zero.T, interleaved),
                base + "scales": scale.T.contiguous(),
            }
        found = {
            base + "weight_packed": words(numbers),
            base + "weight_scale": scale,
            base + "weight_shape": torch.tensor(numbers.shape),
        }
        if self.shuffled:
            found[base + "weight_g_idx"] = order
        if not self.symmetric:
            plain = torch.from_numpy(zero - 8).to(torch.int8)
            packed = words(zero.T).T.contiguous()
            found[base + "weight_zero_point"] = plain if self.options.get("int8_zeros") else packed
        return found

    def config(self):
        if self.method == "compressed-tensors":
            weights = {
                "num_bits": 4, "type": "int", "symmetric": self.symmetric, "dynamic": False,
                "strategy": "channel" if self.group == -1 else "group",
                "group_size": None if self.group == -1 else self.group, "actorder": self.options.get("actorder"),
            }  # fmt: skip
            groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
            return {
                "quant_method": self.method, "format": "pack-quantized", "config_groups": groups,
                "ignore": ["lm_head"],
            }  # fmt: skip
        own = {"version": "gemm", "zero_point": True} if self.method == "awq" else {"desc_act": False}
        written = {key: value for key, value in self.options.items() if key != "shuffled"}
        return {"quant_method": self.method, "bits": 4, "group_size": self.group, **own, **written}


def packed_checkpoint(reference, directory, packer, chosen=lambda name: True):
    """Writes ``reference`` with every projection packed; returns the weights that it now stands for."""
    shutil.copytree(reference.directory, directory)
    tensors, near = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(PACKED) and chosen(name)]:
        near[name], pieces = packer.pack(name, tensors.pop(name))
        tensors.update(pieces)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": packer.config()}))
    return near


def logits_standing_for(reference, near):
    """The reference's logits with the given weights; experts, which it holds stacked, included."""

    def change(name, weight):
        if not name.endswith(("gate_up_proj", "experts.down_proj")) or weight.dim() != 3:
            return near.get(name, weight)
        at = name.rsplit(".", 1)[0]
        found = []
        for expert in range(len(weight)):
            if name.endswith("gate_up_proj"):
                both = [near[f"{at}.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")]
                found.append(torch.cat(both))
            else:
                found.append(near[f"{at}.{expert}.down_proj.weight"])
        return torch.stack(found)

    return reference.logits_with(TOKENS, change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_those_of_the_numbers_that_were_packed(
    make_reference, tools, tmp_path, caplog, model, method
):
    reference = make_reference(MODELS[model][0], **MODELS[model][1])
    packer = Packer(METHODS[method][0], **METHODS[method][1])
    near = packed_checkpoint(reference, tmp_path / "m", packer)
    expected = logits_standing_for(reference, near)
    assert (expected - reference.logits(TOKENS)).abs().max() > 1e-3
    for cuts in [(0, 4), (0, 1, 4)]:
        engines = tools.engines_of(tmp_path / "m", cuts)
        chain = tools.Chain(engines)
        found = torch.cat([chain.logits(TOKENS[:6]), chain.logits(TOKENS[6:7]), chain.logits(TOKENS[7:])])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    attention = engines[0].span.layers[0].attention
    assert isinstance(attention.out.weight, Int4Weight)
    # Latent attention computes with its up-projection as it is.
    assert ("dequantised" in caplog.text) == (model == "deepseek_v2")


@pytest.mark.parametrize("method", ORDERED)
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_inputs_in_an_order_of_their_own_are_dequantised_and_it_is_said(
    make_reference, tools, tmp_path, caplog, method, quant
):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    packer = Packer(ORDERED[method][0], **ORDERED[method][1])
    near = packed_checkpoint(reference, tmp_path / "m", packer)
    engines = tools.engines_of(tmp_path / "m", (0, 4), quant=quant)
    assert isinstance(
        engines[0].span.layers[0].attention.out.weight, torch.Tensor if quant == "none" else Int8Weight
    )
    if quant == "none":
        expected = logits_standing_for(reference, near)
        torch.testing.assert_close(tools.Chain(engines).logits(TOKENS), expected, atol=1e-4, rtol=0)
    assert "order of their own" in caplog.text
    assert len([record for record in caplog.records if "order of their own" in record.message]) == 1


def test_a_part_of_which_only_some_is_packed_is_dequantised(make_reference, tools, tmp_path, caplog):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    near = packed_checkpoint(reference, tmp_path / "m", Packer("gptq"), lambda name: "k_proj" not in name)
    engines = tools.engines_of(tmp_path / "m", (0, 4))
    torch.testing.assert_close(
        tools.Chain(engines).logits(TOKENS), logits_standing_for(reference, near), atol=1e-4, rtol=0
    )
    assert "not packed" in caplog.text
    assert isinstance(engines[0].span.layers[0].attention.qkv.weight, torch.Tensor)
    assert isinstance(engines[0].span.layers[0].mlp.down.weight, Int4Weight)


def test_groups_that_no_kernel_takes_are_dequantised(make_reference, tools, tmp_path, caplog):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    near = packed_checkpoint(reference, tmp_path / "m", Packer("awq", group_size=16))
    engines = tools.engines_of(tmp_path / "m", (0, 4))
    torch.testing.assert_close(
        tools.Chain(engines).logits(TOKENS), logits_standing_for(reference, near), atol=1e-4, rtol=0
    )
    assert "groups of 16" in caplog.text


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed_zeros"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_differ_by_their_own_rounding_only(make_reference, tools, tmp_path, method, dtype):
    reference = make_reference("llama", hidden_size=256, intermediate_size=192)
    packer = Packer(METHODS[method][0], **{**METHODS[method][1], "group_size": 64})
    near = packed_checkpoint(reference, tmp_path / "m", packer)
    span = tools.engines_of(tmp_path / "m", (0, 1), dtype=dtype)[0].span
    out, x = span.layers[0].attention.out, torch.randn(2, 256)
    assert out.weight.group == 64
    assert out.weight.blocked == (dtype == "bfloat16" and kernel_blocks_known())
    kind = getattr(torch, dtype)
    exact = x.to(kind).double() @ near["model.layers.0.self_attn.o_proj.weight"].double().T
    error = (out(x.to(kind)).double() - exact).norm() / exact.norm()
    assert float(error) < (0.02 if dtype == "bfloat16" else 0.003)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed_zeros"])
def test_rows_read_in_pieces_are_those_read_at_once(
    make_reference, tools, tmp_path, monkeypatch, method, rows
):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    near = packed_checkpoint(reference, tmp_path / "m", Packer(METHODS[method][0], **METHODS[method][1]))
    monkeypatch.setattr("model_shards.weights.CHUNK_ROWS", rows)
    found = tools.Chain(tools.engines_of(tmp_path / "m", (0, 4))).logits(TOKENS)
    torch.testing.assert_close(found, logits_standing_for(reference, near), atol=1e-4, rtol=0)


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("method", [*METHODS, "gptq_act_order"])
def test_every_byte_of_the_span_is_read_once_and_what_is_held_was_foretold(
    make_reference, tmp_path, method, quant
):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    name, options = {**METHODS, **ORDERED}[method]
    packed_checkpoint(reference, tmp_path / "m", Packer(name, **options))
    config, index = ModelConfig.from_dir(tmp_path / "m"), CheckpointIndex.open(tmp_path / "m")
    index.check(config)
    ranges, told = index.span_ranges(config, 1, 3), []
    span = load_span(
        tmp_path / "m",
        index,
        config,
        1,
        3,
        quant=quant,
        progress=lambda done, total: told.append((done, total)),
    )
    wanted = sum(end - start for found in ranges.values() for start, end in found)
    assert span.bytes_read == wanted
    assert told[-1] == (wanted, wanted)
    shape = shape_of(config, index, "bfloat16", quant)
    assert span.weight_bytes == 2 * (shape["layer_bytes"] - 2 * 2 * 64)


def test_wide_groups_are_held_as_several_narrow_ones():
    numbers = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    scales, zeros = torch.rand(64, 2) + 0.5, torch.randint(0, 16, (64, 2)).float()
    weight = Int4Weight(64, 128, torch.float32, torch.device("cpu"), blocked=False, group=32)
    weight.keep(0, numbers, scales, zeros)
    wide = [values.repeat_interleave(64, 1) for values in (scales, zeros)]
    torch.testing.assert_close(weight.dequantised(torch.float32), (numbers - wide[1]) * wide[0])


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_zero_of_zero_is_stored_as_fifteen_in_gptqs_first_format(make_reference, tools, tmp_path, form):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    packer = Packer("gptq", sym=False, checkpoint_format=form)
    shutil.copytree(reference.directory, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    positive = {name: weight.abs() + 0.1 for name, weight in tensors.items() if name.endswith(PACKED)}
    save_file({**tensors, **positive}, tmp_path / "m" / "model.safetensors")
    made = dataclasses.replace(reference, directory=tmp_path / "m")
    near = packed_checkpoint(made, tmp_path / "p", packer)
    stored = load_file(tmp_path / "p" / "model.safetensors")[AT + "qzeros"]
    assert (stored == (-1 if form == "gptq" else 0)).all()
    held = tools.engines_of(tmp_path / "p", (0, 1))[0].span.layers[0].attention.out.weight
    torch.testing.assert_close(
        held.dequantised(torch.float32), near[AT.replace("q_proj", "o_proj") + "weight"]
    )


AT = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("method", "name", "change", "message"),
    [
        ("gptq", "qweight", lambda t: t[:-1].contiguous(), r"shape \[7, 64\], expected \[8, 64\]"),
        ("gptq", "qweight", lambda t: t.float(), "dtype F32, expected one of I32"),
        ("gptq", "qweight", None, "missing"),
        ("gptq", "qzeros", None, "missing"),
        ("gptq", "scales", lambda t: t * float("nan"), "contains nan"),
        ("gptq", "g_idx", lambda t: t + 1, "contains group 2, expected 0 to 1"),
        ("gptq", "scales", lambda t: t[:1].contiguous(), r"shape \[1, 64\], expected \[2, 64\]"),
        ("awq", "scales", lambda t: t * float("inf"), "contains"),
        ("compressed", "weight_shape", lambda t: t + 1, r"says \[65, 65\], config.json implies \[64, 64\]"),
        ("compressed_zeros", "weight_zero_point", lambda t: t.float(), "dtype F32"),
        ("compressed", "weight_packed", None, "missing"),
    ],
)
def test_wrong_pieces_are_named(make_reference, tmp_path, method, name, change, message):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    packed_checkpoint(reference, tmp_path / "m", Packer(METHODS[method][0], **METHODS[method][1]))
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    stored = tensors.pop(AT + name)
    if change is not None:
        tensors[AT + name] = change(stored)
    save_file(tensors, path)
    config = ModelConfig.from_dir(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_span(tmp_path / "m", CheckpointIndex.open(tmp_path / "m"), config, 0, 1)
    assert caught.value.file == "model.safetensors"
    assert AT in caught.value.tensor


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
SCHEME = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": SCHEME},
}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({}, "quant_method"),
        ({**GPTQ, "bits": 8}, "bits"),
        ({"quant_method": "gptq"}, "bits"),
        ({**GPTQ, "group_size": "128"}, "group_size"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({**GPTQ, "quant_method": "awq", "version": "gemv"}, "version"),
        ({**COMPRESSED, "format": "float-quantized"}, "format"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format"),
        (
            {**COMPRESSED, "config_groups": {"group_0": {**SCHEME, "input_activations": {"num_bits": 8}}}},
            "config_groups.group_0.input_activations",
        ),
        (
            {**COMPRESSED, "config_groups": {"group_0": {"weights": {**SCHEME["weights"], "num_bits": 8}}}},
            "config_groups.group_0.weights.num_bits",
        ),
        (
            {
                **COMPRESSED,
                "config_groups": {"a": SCHEME, "b": {"weights": {**SCHEME["weights"], "group_size": 64}}},
            },
            "config_groups",
        ),
    ],
)
def test_a_packing_that_cannot_be_read_is_refused_by_name(make_reference, given, field):
    reference = make_reference(MODELS["llama"][0], **MODELS["llama"][1])
    values = json.loads((reference.directory / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**values, "quantization_config": given})
    assert caught.value.field == f"quantization_config.{field}"
