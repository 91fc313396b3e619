"""Weight-only int8 and int4: what is stored, that layers compute with exactly that, and the packed
kernels."""

from __future__ import annotations

import pytest
import torch

from model_shards import CheckpointIndex, LocalFault, Sampling, load_span, shape_of
from model_shards.quant import (
    GROUP,
    SMALL_GROUP,
    Int4Weight,
    Int8Weight,
    kernel_blocks_known,
    new_weight,
    quantised_bytes,
)

CPU = torch.device("cpu")
TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28]


def by_hand_int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().clamp(-127, 127) * scale


def by_hand_int4(weight):
    width = weight.shape[1]
    if width % SMALL_GROUP:
        return by_hand_int8(weight)
    groups = weight.reshape(weight.shape[0], -1, GROUP if width % GROUP == 0 else SMALL_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    scale = torch.where(scale == 0, 1.0, scale)
    zero = low + 8 * scale
    return (((groups - zero) / scale + 8).round().clamp(0, 15) - 8).mul(scale).add(zero).reshape(weight.shape)


BY_HAND = {"int8": by_hand_int8, "int4": by_hand_int4}
MODELS = {
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 96}),
    "llama_tied": ("llama", {"hidden_size": 64, "tie_word_embeddings": True}),
    "qwen2_biases": ("qwen2", {"hidden_size": 128, "intermediate_size": 192}),
    "phi3_fused": ("phi3", {"original_max_position_embeddings": 64}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "q_lora_rank": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
}  # fmt: skip
UNQUANTISED = ("norm", "bias", "mlp.gate.weight", "kv_b_proj")


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_quantised_model_is_the_model_of_the_stored_weights(make_reference, tools, model, quant):
    model_type, changes = MODELS[model]
    reference = make_reference(model_type, **changes)

    def change(name, weight):
        if any(part in name for part in UNQUANTISED):
            return weight
        if "embed" in name or "lm_head" in name:
            return by_hand_int8(weight)
        matrices = weight.reshape(-1, weight.shape[-1])
        return BY_HAND[quant](matrices).reshape(weight.shape)

    expected = reference.logits_with(TOKENS, change)
    for cuts in [(0, 4), (0, 1, 3, 4)]:
        chain = tools.Chain(tools.engines_of(reference.directory, cuts, quant=quant))
        found = torch.cat([chain.logits(TOKENS[:6]), chain.logits(TOKENS[6:7]), chain.logits(TOKENS[7:])])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - reference.logits(TOKENS)).abs().max() > 1e-3


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_split_and_company_gives_the_same_bits(make_reference, tools, quant, dtype):
    reference = make_reference("llama", hidden_size=256, intermediate_size=192)
    texts = []
    for cuts in [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]:
        engines = tools.engines_of(reference.directory, cuts, dtype=dtype, quant=quant)
        texts.append(tools.Chain(engines, "a").greedy(TOKENS, 8))
    assert texts[0] == texts[1] == texts[2]
    engine = tools.engines_of(reference.directory, (0, 4), dtype=dtype, quant=quant, kv_bytes_max=4 << 20)[0]
    chains = [tools.Chain([engine], str(at)) for at in range(5)]
    tokens = [chain.sample(TOKENS, Sampling(temperature=0))[0] for chain in chains]
    assert tokens == [texts[0][0]] * 5


def random_weight(quant, rows, width, dtype, pieces=None):
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width)) * 0.05
    weight = new_weight(quant, pieces or [rows], width, dtype, CPU)
    at = 0
    for piece in pieces or [rows]:
        weight.fill(at, values[at : at + piece])
        at += piece
    return weight, values


@pytest.mark.parametrize(("quant", "worst"), [("int8", 0.01), ("int4", 0.13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(128, 256), (64, 96), (40, 64), (48, 50)])
def test_the_error_is_that_of_the_bits(quant, worst, dtype, rows, width):
    weight, values = random_weight(quant, rows, width, dtype)
    x = torch.randn(3, width).to(dtype)
    exact = x.float() @ values.T
    assert float((weight.matmul(x).float() - exact).norm() / exact.norm()) < worst


@pytest.mark.skipif(not kernel_blocks_known(), reason="this machine's int4 kernel packs in another order")
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (192, 128), (128, 96)])
def test_packed_kernels_compute_with_the_very_weights_that_are_unpacked(rows, width):
    blocked, _ = random_weight("int4", rows, width, torch.bfloat16)
    assert blocked.blocked
    plain = Int4Weight(rows, width, torch.bfloat16, CPU, blocked=False)
    _, values = random_weight("int4", rows, width, torch.float32)
    plain.fill(0, values)
    assert torch.equal(blocked.dequantised(torch.float32), plain.dequantised(torch.float32))
    x = torch.randn(4, width).bfloat16()
    exact = x.float() @ blocked.dequantised(torch.float32).T
    torch.testing.assert_close(blocked.matmul(x).float(), exact, atol=0.02, rtol=0.02)
    eight = torch.cat((x, x))
    torch.testing.assert_close(blocked.matmul(eight)[:4].float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_rows_is_a_weight_of_its_own(quant, dtype):
    weight, _ = random_weight(quant, 192, 64, dtype, [64, 128])
    x = torch.randn(2, 64).to(dtype)
    torch.testing.assert_close(weight.block(64, 64).matmul(x), weight.matmul(x)[:, 64:128])


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_zero(quant, dtype):
    weight = new_weight(quant, [64], 64, dtype, CPU)
    weight.fill(0, torch.zeros(64, 64))
    assert torch.equal(weight.matmul(torch.ones(2, 64, dtype=dtype)), torch.zeros(2, 64, dtype=dtype))


def test_int4_without_whole_groups_is_kept_as_int8():
    assert isinstance(new_weight("int4", [64], 50, torch.bfloat16, CPU), Int8Weight)
    assert isinstance(new_weight("int4", [64], 96, torch.bfloat16, CPU), Int4Weight)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_shape_of_foretells_the_bytes_that_a_span_holds(make_reference, tools, quant, tied):
    reference = make_reference("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    index = CheckpointIndex.open(reference.directory)
    shape = shape_of(reference.config, index, "bfloat16", quant)
    span = load_span(reference.directory, index, reference.config, 0, 4, quant=quant)
    norms = 2 * 64 * 2
    expected = 4 * (shape["layer_bytes"] - norms) + shape["embed_bytes"]
    expected += 0 if tied else shape["head_bytes"] - norms // 2
    assert span.weight_bytes == expected


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (64, 96), (64, 50)])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_bytes_foretold_are_bytes_held(quant, rows, width):
    weight = new_weight(quant, [rows], width, torch.bfloat16, CPU)
    assert quantised_bytes(quant, rows, width, 2) == weight.nbytes


def test_an_unknown_quant_is_refused_by_name(llama, tools):
    with pytest.raises(LocalFault, match="int3"):
        tools.engines_of(llama.directory, (0, 4), quant="int3")


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_weights_read_in_pieces_are_those_read_at_once(make_reference, monkeypatch, quant):
    reference = make_reference("llama", hidden_size=256, intermediate_size=192)
    index = CheckpointIndex.open(reference.directory)
    whole = load_span(reference.directory, index, reference.config, 0, 4, quant=quant)
    monkeypatch.setattr("model_shards.weights.CHUNK_ROWS", 64)
    pieces = load_span(reference.directory, index, reference.config, 0, 4, quant=quant)
    assert pieces.bytes_read == whole.bytes_read
    x = torch.randn(2, 256).bfloat16()
    for ours, theirs in zip(pieces.layers, whole.layers, strict=True):
        assert torch.equal(ours.attention.qkv(x), theirs.attention.qkv(x))
        assert torch.equal(ours.mlp(x), theirs.mlp(x))
    assert torch.equal(pieces.logits(x), whole.logits(x))
