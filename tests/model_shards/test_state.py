"""A session's state as bytes: whoever takes it over goes on with the same bits, and nothing else is taken over."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards import ModelConfig, NoRoom, Sampling, StateError, Step, StepError
from model_shards.kv import BLOCK_TOKENS
from model_shards.state import PART_BYTES_MAX, cut, decode_part, layout_of

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "q_lora_rank": 10,
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 4}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 5, "num_local_experts": 6, "num_experts_per_tok": 3},
    ),
}
PROMPT = [1, 5, 42, 17, 90, 3, 3, 61, 28, 77, 12, 50, 6, 6, 81, 2, 33, 9, 70]
REST = [[8], [44], [4, 91, 13]]


def parts_of(source, bytes_max=PART_BYTES_MAX):
    """All parts of a chain's session, from one engine after the other."""
    return [
        bytes(part)
        for engine in source.engines
        for part in engine.export_session(source.session, bytes_max=bytes_max)
    ]


def taken_over(source, engines, tools, bytes_max=PART_BYTES_MAX):
    """The chain's session on other engines, each taking what it needs of whoever has it."""
    target = tools.Chain([], source.session)
    for engine in engines:
        start, end = engine.span.start, engine.span.end
        parts = [
            part
            for giver in source.engines
            if max(start, giver.span.start) < min(end, giver.span.end)
            for part in giver.export_session(
                source.session, max(start, giver.span.start), min(end, giver.span.end), bytes_max=bytes_max
            )
        ]
        assert engine.import_session(source.session, start, end, 64, parts) == source.position
        target.engines.append(engine)
    target.position = source.position
    return target


def rest_of(chain):
    return torch.cat([chain.logits(tokens) for tokens in REST])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_goes_on_elsewhere_with_the_same_bits(make_reference, tools, family):
    model_type, changes = FAMILIES[family]
    directory = make_reference(model_type, **changes).directory
    source = tools.Chain(tools.engines_of(directory, (0, 3, 4)))
    source.logits(PROMPT)
    targets = [
        taken_over(source, tools.engines_of(directory, cuts), tools, bytes_max)
        for cuts, bytes_max in (((0, 4), PART_BYTES_MAX), ((0, 1, 4), 700), ((0, 2, 3, 4), 1))
    ]
    wanted = rest_of(source)
    assert all(torch.equal(rest_of(target), wanted) for target in targets)


@pytest.mark.parametrize("given", range(8))
def test_any_chain_takes_over_from_any_other(llama, tools, given):
    source = tools.Chain(tools.engines_of(llama.directory, tools.splits(4)[given]))
    source.logits(PROMPT)
    targets = [
        taken_over(source, tools.engines_of(llama.directory, cuts), tools, 900) for cuts in tools.splits(4)
    ]
    wanted = rest_of(source)
    assert all(torch.equal(rest_of(target), wanted) for target in targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_bits_are_kept_in_every_dtype_and_with_quantised_weights(llama, tools, dtype, quant):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 2, 4), dtype=dtype, quant=quant))
    source.logits(PROMPT)
    target = taken_over(
        source, tools.engines_of(llama.directory, (0, 1, 4), dtype=dtype, quant=quant), tools, 500
    )
    assert torch.equal(rest_of(target), rest_of(source))


def test_a_scattered_cache_takes_over_as_well(llama, tools):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    source.logits(PROMPT)
    wide = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=20 * 2048 * BLOCK_TOKENS // 16)[0]
    total = wide.kv_tokens_free()
    for number in range(total // BLOCK_TOKENS):
        wide.open(f"hog{number}", 0, 4, BLOCK_TOKENS)
    for number in range(0, total // BLOCK_TOKENS, 2):
        wide.close(f"hog{number}")
    assert wide.import_session("s", 0, 4, 2 * BLOCK_TOKENS, parts_of(source)) == len(PROMPT)
    target = tools.Chain([], "s")
    target.engines, target.position = [wide], len(PROMPT)
    assert torch.equal(rest_of(target), rest_of(source))


def test_sampling_goes_on_with_what_was_said(llama, tools):
    sampling = Sampling(
        temperature=0.9, seed=5, repetition_penalty=1.7, presence_penalty=1.1, frequency_penalty=0.6
    )
    source = tools.Chain(tools.engines_of(llama.directory, (0, 2, 4)))
    token, _ = source.sample(PROMPT, sampling)
    for _ in range(5):
        token, _ = source.sample([token], sampling)
    target = taken_over(source, tools.engines_of(llama.directory, (0, 1, 4)), tools)
    forgetful = taken_over(source, tools.engines_of(llama.directory, (0, 1, 4)), tools)
    forgetful.engines[-1].recall("s", [], 0)

    def answer(chain):
        found, last = [], token
        for _ in range(10):
            last, logprob = chain.sample([last], sampling)
            found.append((last, logprob))
        return found

    wanted = answer(source)
    assert answer(target) == wanted
    assert answer(forgetful) != wanted, "what was said matters here"


def test_a_mean_over_all_positions_goes_on(llama, tools):
    first, second = (tools.engines_of(llama.directory, (0, 4))[0] for _ in range(2))
    first.open("s", 0, 4, 64)
    first.run([Step("s", 0, tokens=tuple(PROMPT), pool="mean")])
    second.import_session("s", 0, 4, 64, first.export_session("s"))
    step = Step("s", len(PROMPT), tokens=(7, 8), pool="mean")
    assert torch.equal(second.run([step])[0].embedding, first.run([step])[0].embedding)


def test_a_standby_follows_a_session_step_by_step(llama, tools):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    giver, taker = source.engines[0], tools.engines_of(llama.directory, (0, 4))[0]
    taker.open("s", 0, 4, 64)
    for tokens in (PROMPT, *REST):
        before = source.position
        source.logits(tokens)
        for part in giver.export_session("s", first=before, bytes_max=300):
            taker.import_part("s", part)
        assert taker.position("s") == source.position
    target = tools.Chain([], "s")
    target.engines, target.position = [taker], source.position
    assert torch.equal(rest_of(target), rest_of(source))


def test_parts_are_small_and_made_one_at_a_time(llama, tools):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    source.logits(PROMPT)
    row = 2 * 2 * 8 * 4
    for bytes_max in (1, 3 * row, len(PROMPT) * row, 2 * len(PROMPT) * row, PART_BYTES_MAX):
        sizes = [len(part) for part in source.engines[0].export_session("s", bytes_max=bytes_max)]
        assert max(sizes) <= max(bytes_max, row) + 300 + 4 * (len(PROMPT) + 1)
        assert sum(sizes) >= 4 * len(PROMPT) * row
    lazily = source.engines[0].export_session("s", bytes_max=row)
    next(lazily)
    source.engines[0].close("s")
    with pytest.raises(StepError, match="not open"):
        next(lazily)


def test_until_all_layers_have_come_equally_far_no_step_is_taken(llama, tools):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    source.logits(PROMPT)
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    engine.open("s", 0, 4, 64)
    *early, late = source.engines[0].export_session("s", bytes_max=1500)
    for part in early:
        assert engine.import_part("s", part) == 0
    for position in (0, len(PROMPT)):
        with pytest.raises(StepError):
            engine.run([Step("s", position, tokens=(1,))])
    assert engine.import_part("s", late) == len(PROMPT)
    assert (
        engine.run([Step("s", len(PROMPT), tokens=(8,), sample=Sampling(temperature=0))])[0].token is not None
    )


def test_what_is_decoded_after_an_import_is_not_shared_as_if_it_stood_at_the_beginning(llama, tools):
    source = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    source.logits(PROMPT)
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    engine.import_session("s", 0, 4, 64, parts_of(source))
    after = tuple(range(30, 30 + 2 * BLOCK_TOKENS))
    for number, token in enumerate(after):
        engine.run([Step("s", len(PROMPT) + number, tokens=(token,))])
    engine.close("s")
    assert engine.cached(0, 4, (*after, 1)) == 0


@pytest.fixture
def exported(llama, tools):
    """An engine with a session, and the one part that is its state."""
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    engine.open("s", 0, 4, 64)
    engine.run([Step("s", 0, tokens=tuple(PROMPT), sample=Sampling(temperature=0))])
    return engine, bytes(next(engine.export_session("s")))


def header_of(part):
    size = struct.unpack_from("<4sHHI", part)[3]
    return json.loads(part[12 : 12 + size]), -(-(12 + size) // 16) * 16


def with_header(part, **changes):
    """The part with another header before the same rows."""
    header, at = header_of(part)
    text = json.dumps(header | changes).encode()
    begin = struct.pack("<4sHHI", b"SKVS", 1, 0, len(text)) + text
    return begin + bytes(-len(begin) % 16) + part[at:]


BROKEN = {
    "empty": (lambda p: b"", "length", "0 bytes"),
    "no part": (lambda p: b"GGUF" + p[4:], "beginning", "SKVS"),
    "a later version": (lambda p: p[:4] + b"\x02\x00" + p[6:], "version", "2, expected 1"),
    "a header beyond its end": (lambda p: p[:8] + struct.pack("<I", 1 << 31) + p[12:], "header", "4096"),
    "a header that is no JSON": (lambda p: p[:12] + b"?" * 20 + p[32:], "header", "JSON"),
    "another dtype": (lambda p: with_header(p, dtype="bfloat16"), "dtype", "'bfloat16', expected 'float32'"),
    "another shape": (lambda p: with_header(p, kv=[2, 8, 9]), "kv", r"\[2, 8, 9\], expected \[2, 8, 8\]"),
    "truncated": (lambda p: p[:-1], "rows", "bytes', expected"),
    "longer": (lambda p: p + b"\0", "rows", "bytes', expected"),
    "more rows than it has": (lambda p: with_header(p, positions=[0, 20]), "rows", "bytes', expected"),
    "a length beyond all": (lambda p: with_header(p, positions=[0, 1 << 40]), "positions", "up to"),
    "layers that are none": (lambda p: with_header(p, layers="all"), "layers", "'all'"),
    "layers elsewhere": (lambda p: with_header(p, layers=[1, 5]), "layers", r"\(1, 5\)\W+expected within \(0, 4\)"),
    "a gap": (lambda p: with_header(p, positions=[1, 20]), "positions", "layer 0 from 0 on"),
    "tokens that are none": (lambda p: p[:-4] + struct.pack("<i", 97), "said", "97"),
    "too many tokens": (lambda p: with_header(p, said=[70, 19]) + bytes(4 * 50), "said", "at most 65"),
    "numbers that are none": (lambda p: p[:-100] + struct.pack("<f", float("nan")) + p[-96:], "rows", "finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused_with_both_values_and_nothing_stays(llama, tools, exported, kind):
    change, field, text = BROKEN[kind]
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    with pytest.raises(StateError, match=text) as refused:
        engine.import_session("s", 0, 4, 64, [change(exported[1])])
    assert refused.value.field == field
    assert (engine.sessions(), engine.kv_bytes_used()) == (0, 0)


def test_state_of_another_model_is_refused(llama, make_reference, tools, exported):
    other = tools.engines_of(make_reference("llama", num_key_value_heads=4).directory, (0, 4))[0]
    with pytest.raises(StateError, match=r"model is 'llama-4x32-.*expected 'llama-4x32-"):
        other.import_session("s", 0, 4, 64, [exported[1]])
    config = ModelConfig.from_dir(llama.directory)
    names = {layout_of(config, torch.float32, name).model for name in ("", "one", "two")}
    names.add(layout_of(replace(config, windows=(3,) * 4), torch.float32, "").model)
    assert len(names) == 4


def test_a_state_that_does_not_fit_is_refused(llama, tools, exported):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    with pytest.raises(StateError, match=r"\(0, 19\), expected at most 18"):
        engine.import_session("s", 0, 4, 18, [exported[1]])
    missing = list(exported[0].export_session("s", 0, 3))
    with pytest.raises(StateError, match=r"\[0, 19\]', expected all at one"):
        engine.import_session("s", 0, 4, 64, missing)
    twice = [exported[1], exported[1]]
    with pytest.raises(StateError, match="layer 0 from 19 on"):
        engine.import_session("s", 0, 4, 64, twice)
    small = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 128 * BLOCK_TOKENS)[0]
    with pytest.raises(NoRoom):
        small.import_session("s", 0, 4, 64, [exported[1]])
    for found in (engine, small):
        assert (found.sessions(), found.kv_bytes_used()) == (0, 0)


@pytest.mark.parametrize(
    "wanted", [{"start": 3, "end": 3}, {"end": 5}, {"first": 3, "last": 2}, {"last": 20}]
)
def test_what_a_session_does_not_hold_cannot_be_exported(exported, wanted):
    with pytest.raises(StepError):
        exported[0].export_session("s", **wanted)


def test_the_bytes_of_version_1_are_pinned(exported):
    header, at = header_of(exported[1])
    assert header == {
        "model": header["model"],
        "dtype": "float32",
        "kv": [2, 8, 8],
        "layers": [0, 4],
        "positions": [0, 19],
        "said": [20, 19],
    }
    assert exported[1][:8] == b"SKVS\x01\x00\x00\x00"
    rows = torch.frombuffer(bytearray(exported[1][at:]), dtype=torch.float32)
    kv = exported[0]._kv("s")
    wanted = [rows.flatten() for layer in range(4) for rows in kv.read(layer, 0, 19)]
    assert torch.equal(rows[: 4 * 19 * 32], torch.cat(wanted))
    assert struct.unpack("<19i", exported[1][-80:-4]) == tuple(PROMPT)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_part_or_the_remotes_fault(data, begun):
    try:
        part = decode_part(LAYOUT, b"SKVS\x01\x00\x00\x00" + data if begun else data)
    except StateError:
        return
    assert part.start < part.end
    assert part.first < part.last


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40_000))
def test_parts_cover_every_row_once_and_in_order(start, layers, first, count, bytes_max):
    filled = dict.fromkeys(range(start, start + layers), first)
    for part in cut(LAYOUT, start, start + layers, first, first + count, bytes_max):
        rows = (part.end - part.start) * (part.last - part.first)
        assert rows == 1 or rows * LAYOUT.row_bytes <= bytes_max
        for layer in range(part.start, part.end):
            assert filled[layer] == part.first
            filled[layer] = part.last
    assert set(filled.values()) == {first + count}


LAYOUT = layout_of(
    ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 12, "hidden_size": 32,
            "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64,
        }
    ),
    torch.float32,
    "",
)  # fmt: skip
