"""The cache in eight bits: how far numbers may be off, half the bytes, and the same guarantees of bits as without."""

from __future__ import annotations

import itertools

import pytest
import torch

from model_shards import (
    BLOCK_TOKENS,
    CheckpointIndex,
    Engine,
    LocalFault,
    ModelConfig,
    ParkingLot,
    Sampling,
    StateError,
    Step,
    load_span,
    shape_of,
)
from model_shards.kv_int8 import SCALE_BYTES, decode, encode, scales

TEXT = [(at * 7 + 3) % 97 for at in range(40)]
GREEDY = Sampling(temperature=0)
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip


def engines(directory, cuts=(0, 4), quant="int8", kv_bytes_max=1 << 20, dtype="float32", lot=None):
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    spans = [load_span(directory, index, config, a, b, dtype=dtype) for a, b in itertools.pairwise(cuts)]
    return [Engine(span, kv_bytes_max=kv_bytes_max, kv_quant=quant, parking=lot) for span in spans]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("width", [1, 7, 64, 576])
def test_no_number_is_off_by_more_than_half_a_step_of_its_row(size, width):
    rows = size * torch.randn(50, 3, width)
    rows[3, 1] = 0.0
    rows[4] *= 1e-4  # rows of very different sizes beside one another
    stored = encode(rows)
    assert (stored.dtype, stored.shape) == (torch.uint8, (50, 3, width + SCALE_BYTES))
    off = (decode(stored, torch.float32).double() - rows.double()).abs()
    most = rows.double().abs().amax(-1, keepdim=True)
    assert (off <= most * (0.5 / 127) * (1 + 2**-7)).all()
    assert torch.equal(decode(stored, torch.float32)[3, 1], torch.zeros(width))
    if width >= 64:  # the bound is met, not merely kept
        assert off.max() > most.max() * 0.3 / 127


@pytest.mark.parametrize(
    ("model", "sizes"), [("llama", {}), ("gemma2", {"head_dim": 8}), ("deepseek_v3", LATENT)]
)
def test_logits_stay_near_those_of_a_whole_cache_on_every_split(make_reference, tools, model, sizes):
    reference = make_reference(model, **sizes)
    expected = reference.logits(TEXT)
    found = []
    for cuts in tools.splits(4):
        chain = tools.Chain(engines(reference.directory, cuts))
        found.append(torch.cat([chain.logits(TEXT[:30]), *(chain.logits([token]) for token in TEXT[30:])]))
        assert torch.equal(found[-1], found[0])
    off = (found[0] - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 1e-5 < off < 0.02


def test_the_same_bytes_hold_twice_as_many_positions(make_reference):
    reference = make_reference("llama", head_dim=64)
    config, index = ModelConfig.from_dir(reference.directory), CheckpointIndex.open(reference.directory)
    held = {}
    for quant in ("none", "int8"):
        (engine,) = engines(reference.directory, quant=quant, kv_bytes_max=1 << 20, dtype="bfloat16")
        each = shape_of(config, index, "bfloat16", "none", quant)["kv_bytes_per_token_per_layer"]
        held[quant] = engine.kv_tokens_free()
        assert engine.kv_blocks == (1 << 20) // (each * BLOCK_TOKENS)
        engine.open("s", 0, 4, BLOCK_TOKENS)
        assert engine.kv_bytes_used() == 4 * BLOCK_TOKENS * each
    assert 1.9 < held["int8"] / held["none"] <= 2.0


def run(engine, names, prompts, parked=""):
    """Tokens and log-probabilities of sessions over a prompt and six steps taken together."""
    found = {name: [] for name in names}
    for name in names:
        engine.open(name, 0, 4, 64, prompt=prompts[name])
        found[name].append(engine.run([Step(name, 0, tokens=tuple(prompts[name]), sample=GREEDY)])[0])
    for _ in range(6):
        if parked and parked in names:
            engine.park(parked)
            engine.unpark(parked)
        steps = [
            Step(name, engine.position(name), tokens=(found[name][-1].token,), sample=GREEDY)
            for name in names
        ]
        for result in engine.run(steps):
            found[result.session].append(result)
    for name in names:
        engine.close(name)
    return {name: [(result.token, result.logprob) for result in results] for name, results in found.items()}


def test_bits_do_not_depend_on_company_parking_scattered_blocks_or_shared_beginnings(llama, tmp_path):
    prompts = {"a": TEXT[:20], "b": TEXT[:17], "c": TEXT[5:9]}
    (engine,) = engines(llama.directory, lot=ParkingLot(1 << 20, tmp_path))
    together = run(engine, "abc", prompts, parked="b")
    (small,) = engines(llama.directory, kv_bytes_max=40 * 16 * 2 * 2 * 10)
    assert small.kv_blocks == 40
    for at in range(40):
        small.open(f"x{at}", 0, 1, BLOCK_TOKENS)
    for at in range(0, 40, 2):
        small.close(f"x{at}")  # leaves holes of one block: what comes next is scattered
    for name in "abc":
        (fresh,) = engines(llama.directory)
        assert run(fresh, name, prompts) == {name: together[name]}
    small.open("a", 0, 4, 64, prompt=prompts["a"])
    first = small.run([Step("a", 0, tokens=tuple(prompts["a"]), sample=GREEDY)])[0]
    assert (first.token, first.logprob) == together["a"][0]
    small.close("a")
    assert small.cached(0, 4, prompts["a"]) == BLOCK_TOKENS
    engine.open("p", 0, 4, 64, prompt=prompts["a"], reuse=BLOCK_TOKENS)
    tail = Step("p", BLOCK_TOKENS, tokens=tuple(prompts["a"][BLOCK_TOKENS:]), sample=GREEDY)
    assert engine.run([tail])[0].token == together["a"][0][0]


def test_state_moves_bit_for_bit_and_only_between_alike_caches(llama):
    (source,), (target,), (plain,) = (engines(llama.directory, quant=q) for q in ("int8", "int8", "none"))
    source.open("s", 0, 4, 64)
    token = source.run([Step("s", 0, tokens=tuple(TEXT), sample=GREEDY)])[0].token
    parts = [bytearray(part) for part in source.export_session("s")]
    target.import_session("m", 0, 4, 64, parts)
    for _ in range(4):
        step = {"position": source.position("s"), "tokens": (token,), "sample": GREEDY}
        one, other = source.run([Step("s", **step)])[0], target.run([Step("m", **step)])[0]
        assert (one.token, one.logprob) == (other.token, other.logprob)
        token = one.token
    assert [bytes(p) for p in source.export_session("s")] == [bytes(p) for p in target.export_session("m")]
    with pytest.raises(StateError, match="model is"):
        plain.import_session("m", 0, 4, 64, parts)
    (half,) = engines(llama.directory, dtype="bfloat16")
    with pytest.raises(StateError, match="model is"):
        half.import_session("m", 0, 4, 64, parts)


def test_scales_that_are_not_finite_are_refused(llama):
    (source,), (target,) = engines(llama.directory), engines(llama.directory)
    source.open("s", 0, 4, 64)
    source.run([Step("s", 0, tokens=tuple(TEXT))])
    (part,) = (bytearray(part) for part in source.export_session("s"))
    row = 8 + SCALE_BYTES
    rows = 4 * len(TEXT) * 2 * 2 * row
    first = len(part) - rows - 4 * len(TEXT)
    assert torch.isfinite(scales(torch.frombuffer(part, dtype=torch.uint8, count=row, offset=first))).all()
    part[first + row - SCALE_BYTES : first + row] = b"\xff\xff"
    with pytest.raises(StateError, match="scales that are not finite"):
        target.import_session("m", 0, 4, 64, [part])
    assert target.sessions() == 0


def test_another_kind_is_no_kind(llama):
    with pytest.raises(LocalFault, match="kv_quant 'int3', expected one of none, int8"):
        engines(llama.directory, quant="int3")
