"""LoRA adapters: as if merged, the same bits in any company, and bad ones refused by name."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from adapters_made import edit_config, edit_weights, make_adapter, merge
from safetensors import safe_open

from model_shards import (
    AdapterIndex,
    CheckpointError,
    ConfigError,
    LocalFault,
    ModelConfig,
    RemoteFault,
    Sampling,
    StateError,
    Step,
    StepError,
    is_adapter,
)
from model_shards.adapters import AdapterConfig
from model_shards.kv import BLOCK_TOKENS
from model_shards.lowrank import Tuned

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TEXT = [1, 5, 9, 70, 8, 8, 44]
PREFIX = "base_model.model.model.layers."
FAMILIES = {
    "llama": ([*ATTENTION, *MLP], {}),
    "qwen2": (["q_proj", "v_proj", "down_proj"], {}),
    "phi3": (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], {}),
    "gemma2": ([*ATTENTION, *MLP], {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen3": (["k_proj", "up_proj"], {"head_dim": 16}),
    "deepseek_v3": (
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "mlp.gate_proj", "shared_experts.up_proj"],
        {
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip


def adapt(engines, directory, name="tuned"):
    """Loads an adapter into engines over parts of one model."""
    for engine in engines:
        span = engine.span
        dtype = str(span.dtype).removeprefix("torch.")
        found = AdapterIndex(directory, span.config).load(name, span.start, span.end, dtype=dtype)
        engine.add_adapter(found)


def chained_logits(engines, pieces, adapter="tuned", session="s"):
    """Logits of consecutive pieces of one text through engines, with an adapter."""
    found, position = [], 0
    for engine in engines:
        engine.open(session, engine.span.start, engine.span.end, 64, adapter=adapter)
    for piece in pieces:
        step = Step(session, position, tokens=tuple(piece))
        for engine in engines[:-1]:
            step = Step(session, position, hidden=engine.run([step])[0].hidden)
        found.append(engines[-1].logits([step])[0])
        position += len(piece)
    for engine in engines:
        engine.close(session)
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_merged_model_on_every_split(make_reference, tools, tmp_path, family):
    targets, changes = FAMILIES[family]
    reference = make_reference(family, **changes)
    made = make_adapter(tmp_path, reference.directory, targets)
    expected = reference.logits_with(TEXT, made.merged)
    assert (expected - reference.logits(TEXT)).abs().max() > 0.05  # it does change something
    found = []
    for cuts in tools.splits(4):
        engines = tools.engines_of(reference.directory, cuts)
        adapt(engines, tmp_path)
        found.append(chained_logits(engines, [TEXT[:4], TEXT[4:5], TEXT[5:]]))
        torch.testing.assert_close(found[-1], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            chained_logits(engines, [TEXT], adapter=""), reference.logits(TEXT), atol=1e-4, rtol=1e-4
        )
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"rslora": True},
        {"ranks": {"self_attn.q_proj": 2, "v_proj": 7}},
        {"alphas": {"k_proj": 1.0}, "ranks": {"k_proj": 3}, "rslora": True},
        {"layers": [1, 3]},
        {"rank": 1, "alpha": -3.5},
    ],
)
def test_every_spelling_of_rank_and_scale_is_what_merging_by_hand_gives(
    make_reference, tools, tmp_path, options, stored
):
    reference = make_reference("llama")
    made = make_adapter(tmp_path, reference.directory, ATTENTION, dtype=stored, **options)
    engines = tools.engines_of(reference.directory, (0, 2, 4))
    adapt(engines, tmp_path)
    expected = reference.logits_with(TEXT, made.merged)
    torch.testing.assert_close(chained_logits(engines, [TEXT]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_may_have_an_adapter_of_its_own(make_reference, tools, tmp_path, tied):
    reference = make_reference("llama", tie_word_embeddings=tied)
    made = make_adapter(tmp_path, reference.directory, ["lm_head", "o_proj"])
    engines = tools.engines_of(reference.directory, (0, 3, 4))
    adapt(engines, tmp_path)
    without = {name: weight for name, weight in made.added.items() if name != "lm_head.weight"}
    head = made.added["lm_head.weight"]
    made.added = without
    rows, plain = _final_rows(reference, made)
    expected = plain + (rows.double() @ head.T).float()
    torch.testing.assert_close(chained_logits(engines, [TEXT]), expected, atol=1e-4, rtol=1e-4)
    whole = tools.engines_of(reference.directory, (0, 4))[0]
    adapt([whole], tmp_path)
    whole.open("s", 0, 4, 8, adapter="tuned")
    said = whole.run([Step("s", 0, tokens=tuple(TEXT), sample=Sampling(temperature=0))])[0]
    likely = torch.log_softmax(expected[-1], -1).max(-1)
    assert (said.token, said.logprob) == (int(likely.indices), pytest.approx(float(likely.values), abs=1e-3))


def _final_rows(reference, made):
    """The rows that enter the head, and its logits, of the model with all but the head's adapter merged."""
    kept, model = [], copy.deepcopy(reference.model)
    model.lm_head.register_forward_hook(lambda _module, given, _out: kept.append(given[0][0]))
    for name, weight in model.named_parameters():
        weight.data.copy_(made.merged(name, weight.data))
    with torch.no_grad():
        logits = model(torch.tensor([TEXT]), use_cache=False).logits[0]
    return kept[0], logits


def test_experts_may_have_adapters(make_reference, tools, tmp_path):
    sizes = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    reference = make_reference("qwen3_moe", **sizes)
    made = make_adapter(tmp_path / "a", reference.directory, ["q_proj", *MLP])
    assert any("experts.5.up_proj" in name for name in made.added)
    merged = merge(reference.directory, made, tmp_path / "merged")
    plain, tuned = (tools.engines_of(path, (0, 4)) for path in (merged, reference.directory))
    adapt(tuned, tmp_path / "a")
    pieces = [TEXT, [3], [60]]
    torch.testing.assert_close(
        chained_logits(tuned, pieces), chained_logits(plain, pieces, adapter=""), atol=1e-4, rtol=1e-4
    )


def test_rows_that_meet_at_an_expert_have_their_own_adapters(make_reference, tools, tmp_path):
    sizes = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
    reference = make_reference("qwen3_moe", **sizes)
    config = ModelConfig.from_dir(reference.directory)
    found = []
    for seed in range(2):
        make_adapter(tmp_path / str(seed), reference.directory, MLP, seed=seed)
        found.append(AdapterIndex(tmp_path / str(seed), config).load("x", 0, 4, dtype="float32"))
    mlp = tools.engines_of(reference.directory, (0, 4))[0].span.layers[2].mlp
    rows, x = [found[0], None, found[1], found[0], None], torch.randn(5, 32)
    together = mlp(x, Tuned(rows, whole=False).at(2))
    each = [mlp(x[at : at + 1], Tuned([row], whole=False).at(2)) for at, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert all((together - mlp(x))[at].abs().max() > 1e-3 for at in (0, 2, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sessions_have_the_same_bits_alone_and_beside_others_with_and_without_adapters(
    make_reference, tools, tmp_path, family, dtype
):
    sizes = {"head_dim": 8, "moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}
    wide = {"hidden_size": 64, "num_attention_heads": 8}  # so that experts are packed, and rows meet at them
    reference = make_reference(family, **(sizes | wide if family == "qwen3_moe" else {}))
    make_adapter(tmp_path / "one", reference.directory, [*ATTENTION, *MLP, "lm_head"], seed=1)
    make_adapter(tmp_path / "other", reference.directory, [*ATTENTION, *MLP], seed=2)
    make_adapter(tmp_path / "wide", reference.directory, ["v_proj", "down_proj"], rank=9, seed=3)
    wanted = dict(zip("abcdefghi", itertools.cycle(["one", "", "other", "wide", "one"]), strict=False))

    def decode(engine, names):
        found = {name: [] for name in names}
        for at, name in enumerate(wanted):
            if name in names:
                engine.open(name, 0, 4, 32, adapter=wanted[name])
                step = Step(name, 0, tokens=(1, 5, at, 9), sample=Sampling(temperature=0))
                found[name].append(engine.run([step])[0].logprob)
        for at in range(5):
            greedy = Sampling(temperature=0)
            steps = [Step(name, 4 + at, tokens=((at * 11) % 97,), sample=greedy) for name in names]
            for result in engine.run(steps):
                found[result.session] += [result.token, result.logprob]
        for name in names:
            engine.close(name)
        return found

    engine = tools.engines_of(reference.directory, (0, 4), dtype=dtype)[0]
    for name in ("one", "other", "wide"):
        adapt([engine], tmp_path / name, name)
    together = decode(engine, list(wanted))
    for name in wanted:
        assert decode(engine, [name]) == {name: together[name]}
    assert decode(engine, ["b", "g"]) == {name: together[name] for name in "bg"}
    plain = tools.engines_of(reference.directory, (0, 4), dtype=dtype)[0]
    wanted = dict.fromkeys(wanted, "")
    alone = decode(plain, ["b", "g"])
    assert alone == {name: together[name] for name in "bg"}
    assert decode(plain, ["a"]) != {"a": together["a"]}


def _plain(weight):
    """What a quantised matrix multiplies with."""
    return weight.matmul(torch.eye(weight.shape[1])).T


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_quantised_base_with_an_adapter_is_the_quantised_weights_with_it_merged(
    make_reference, tools, tmp_path, quant
):
    reference = make_reference("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    made = make_adapter(tmp_path, reference.directory, [*ATTENTION, *MLP])
    engines = tools.engines_of(reference.directory, (0, 2, 4), quant=quant)
    adapt(engines, tmp_path)
    weights = {}
    for layer, built in enumerate(layer for engine in engines for layer in engine.span.layers):
        at = f"model.layers.{layer}."
        qkv, gate_up = (_plain(w.weight) for w in (built.attention.qkv, built.mlp.gate_up))
        names = [f"{at}self_attn.{name}_proj.weight" for name in "qkv"]
        weights |= dict(zip(names, qkv.split((64, 32, 32)), strict=True))
        names = [f"{at}mlp.{name}_proj.weight" for name in ("gate", "up")]
        weights |= dict(zip(names, gate_up.chunk(2), strict=True))
        weights[f"{at}self_attn.o_proj.weight"] = _plain(built.attention.out.weight)
        weights[f"{at}mlp.down_proj.weight"] = _plain(built.mlp.down.weight)
    weights["lm_head.weight"] = _plain(engines[-1].span.head.weight)
    weights["model.embed_tokens.weight"] = _plain(engines[0].span.embed_weight)

    def change(name, weight):
        return made.merged(name, weights.get(name, weight))

    assert set(made.added) <= set(weights)
    found = chained_logits(engines, [TEXT])
    torch.testing.assert_close(found, reference.logits_with(TEXT, change), atol=1e-3, rtol=1e-3)


def test_cached_beginnings_are_never_shared_between_adapters_and_base(llama, tools, tmp_path):
    for seed, name in enumerate(("x", "y")):
        make_adapter(tmp_path / name, llama.directory, ATTENTION, seed=seed)
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    adapt([engine], tmp_path / "x", "x")
    adapt([engine], tmp_path / "y", "y")
    prompt = [(at * 5) % 97 for at in range(2 * BLOCK_TOKENS + 1)]

    def tell(adapter, reuse=0):
        engine.open("s", 0, 4, 40, prompt=prompt, adapter=adapter, reuse=reuse)
        sample = Sampling(temperature=0)
        result = engine.run([Step("s", reuse, tokens=tuple(prompt[reuse:]), sample=sample)])[0]
        engine.close("s")
        return result.logprob

    first = {adapter: tell(adapter) for adapter in ("x",)}
    held = {adapter: engine.cached(0, 4, prompt, adapter=adapter) for adapter in ("", "x", "y")}
    assert held == {"": 0, "x": 2 * BLOCK_TOKENS, "y": 0}
    with pytest.raises(StepError, match="cannot reuse"):
        tell("y", reuse=BLOCK_TOKENS)
    with pytest.raises(StepError, match="cannot reuse"):
        tell("", reuse=BLOCK_TOKENS)
    assert tell("x", reuse=2 * BLOCK_TOKENS) == pytest.approx(first["x"], abs=1e-5)
    assert len({round(tell(adapter), 4) for adapter in ("", "x", "y")}) == 3
    # A name that ends as a scope begins must not meet it either.
    assert engine.cached(0, 4, prompt, scope="x", adapter="") == 0


def test_state_moves_with_the_name_of_its_adapter(llama, tools, tmp_path):
    make_adapter(tmp_path, llama.directory, ATTENTION)
    (source,), (target,) = (tools.engines_of(llama.directory, (0, 4)) for _ in range(2))
    for engine in (source, target):
        adapt([engine], tmp_path, "x")
        adapt([engine], tmp_path, "y")
    greedy = Sampling(temperature=0)
    source.open("s", 0, 4, 32, adapter="x")
    token = source.run([Step("s", 0, tokens=tuple(TEXT), sample=greedy)])[0].token
    parts = [bytes(part) for part in source.export_session("s")]
    for wrong in ("", "y"):
        with pytest.raises(StateError, match="adapter is 'x'"):
            target.import_session("m", 0, 4, 32, parts, adapter=wrong)
    target.import_session("m", 0, 4, 32, parts, adapter="x")
    step = {"position": len(TEXT), "tokens": (token,), "sample": greedy}
    assert target.run([Step("m", **step)])[0].logprob == source.run([Step("s", **step)])[0].logprob


def test_only_the_spans_ranges_are_needed(llama, tools, tmp_path):
    make_adapter(tmp_path, llama.directory, ["q_proj", "lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    config = ModelConfig.from_dir(llama.directory)
    index = AdapterIndex(tmp_path, config)
    ranges = index.span_ranges(1, 3)
    assert list(ranges) == [path.name]
    whole = path.read_bytes()
    kept = bytearray(len(whole))
    header = 8 + int.from_bytes(whole[:8], "little")
    for first, last in [(0, header), *ranges[path.name]]:
        kept[first:last] = whole[first:last]
    kept[header:] = bytes(b if b else 0xFF for b in kept[header:])  # what is not needed is NaN
    path.write_bytes(kept)
    with safe_open(path, "pt") as tensors:
        assert not torch.isfinite(tensors.get_tensor(f"{PREFIX}0.self_attn.q_proj.lora_A.weight")).all()
    path.write_bytes(b"".join((bytes(kept[:header]), _only(whole, header, ranges[path.name]))))
    found = AdapterIndex(tmp_path, config).load("x", 1, 3, dtype="float32")
    assert sorted(found.deltas) == [(1, "qkv"), (2, "qkv")]
    assert found.nbytes == index.held_bytes(1, 3, "float32") == 2 * 4 * (4 * 32 + 32 * 4)
    assert sum(b - a for a, b in ranges[path.name]) == found.nbytes
    with pytest.raises(CheckpointError, match=r"layers\.0.*contains nan"):
        AdapterIndex(tmp_path, config).load("x", 0, 1)
    assert index.span_ranges(3, 4)[path.name] != index.span_ranges(2, 3)[path.name]
    make_adapter(tmp_path / "part", llama.directory, ["q_proj"], layers=[0])
    assert AdapterIndex(tmp_path / "part", config).span_ranges(2, 4) == {}


def _only(whole, header, ranges):
    """The data of a file with NaN wherever no range is."""
    data = bytearray(b"\xff" * (len(whole) - header))
    for first, last in ranges:
        data[first - header : last - header] = whole[first:last]
    return bytes(data)


BROKEN = {
    "another rank": (
        {"r": 5},
        None,
        r"layers\.0\.mlp\.down_proj\.lora_A.*shape \[4, 48\], .* rank 5 imply \[5, 48\]",
    ),
    "a target that is not there": (
        {"target_modules": ["q_proj", "c_attn"]},
        None,
        "names 'c_attn', but the base",
    ),
    "a module that is not there": (
        {},
        lambda t: t.update({f"{PREFIX}9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
        r"layers\.9.* has no such module",
    ),
    "half of a pair": (
        {},
        lambda t: t.pop(f"{PREFIX}2.self_attn.q_proj.lora_B.weight"),
        r"layers\.2\.self_attn\.q_proj\.lora_B\.weight: missing, though its other half",
    ),
    "a whole pair": (
        {},
        lambda t: [t.pop(f"{PREFIX}2.self_attn.q_proj.lora_{x}.weight") for x in "AB"],
        r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: missing, though target_modules names",
    ),
    "a strange tensor": (
        {},
        lambda t: t.update({"base_model.model.score.weight": torch.zeros(2)}),
        "score.weight: is no matrix of an adapter",
    ),
    "integers": (
        {},
        lambda t: t.update(
            {f"{PREFIX}0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)}
        ),
        "dtype I32, expected one of",
    ),
    "nothing": ({}, lambda t: t.clear(), "holds no matrices"),
    "an embedding": (
        {},
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 97)}),
        "embedding's adapter is not served",
    ),
    "DoRA": ({"use_dora": True}, None, "use_dora is True, expected False or null"),
    "trained biases": ({"bias": "all"}, None, "bias is 'all', expected 'none'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save is \['lm_head'\]"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, None, "an adapter of the unchanged base"),
    "no LoRA": ({"peft_type": "IA3"}, None, "adapter_config.json: peft_type is 'IA3', expected LORA"),
    "no rank": ({"r": 0}, None, "adapter_config.json: r is 0, expected an integer from 1"),
    "a rank by a pattern": ({"rank_pattern": {".*q_proj": 4}}, None, "plain ends of modules' names"),
    "a scale that is none": ({"lora_alpha": "big"}, None, "lora_alpha is 'big', expected a number"),
    "targets of another kind": ({"target_modules": 3}, None, "target_modules is 3, expected a pattern"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_served_is_refused_by_name_and_values_and_the_engine_serves_on(
    llama, tools, tmp_path, case
):
    changes, change, message = BROKEN[case]
    make_adapter(tmp_path, llama.directory, ["q_proj", "down_proj"])
    engines = tools.engines_of(llama.directory, (0, 4))
    adapt(engines, tmp_path, "good")
    before = chained_logits(engines, [TEXT], adapter="good")
    edit_config(tmp_path, **changes)
    if change is not None:
        edit_weights(tmp_path, change)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        adapt(engines, tmp_path, "bad")
    with pytest.raises(StepError, match="asks for adapter 'bad', which is not loaded"):
        engines[0].open("s", 0, 4, 8, adapter="bad")
    assert torch.equal(chained_logits(engines, [TEXT], adapter="good"), before)


def test_an_adapter_of_another_base_is_refused_by_its_shapes(llama, make_reference, tmp_path):
    other = make_reference("llama", hidden_size=64, intermediate_size=128)
    make_adapter(tmp_path, other.directory, ["q_proj"])
    with pytest.raises(CheckpointError, match=r"shape \[4, 64\], the base and rank 4 imply \[4, 32\]"):
        AdapterIndex(tmp_path, ModelConfig.from_dir(llama.directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37])
def test_values_that_are_not_finite_are_refused_with_their_tensor(llama, tmp_path, value):
    make_adapter(tmp_path, llama.directory, ["q_proj"], alpha=4e3)
    name = f"{PREFIX}1.self_attn.q_proj.lora_B.weight"
    edit_weights(tmp_path, lambda tensors: tensors[name][3, 2].fill_(value))
    index = AdapterIndex(tmp_path, ModelConfig.from_dir(llama.directory))
    with pytest.raises(CheckpointError) as refused:
        index.load("x", 0, 2, dtype="float16" if value == 1e37 else "float32")
    assert (refused.value.file, refused.value.tensor) == ("adapter_model.safetensors", name)
    assert "contains" in refused.value.detail
    assert (2, "qkv") in index.load("x", 2, 4).deltas  # other layers are not concerned


@pytest.mark.parametrize("case", ["gone", "short", "no json"])
def test_broken_files_are_refused(llama, tmp_path, case):
    make_adapter(tmp_path, llama.directory, ["q_proj"])
    weights = tmp_path / "adapter_model.safetensors"
    if case == "gone":
        weights.unlink()
    elif case == "short":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(RemoteFault, match="adapter_"):
        AdapterIndex(tmp_path, ModelConfig.from_dir(llama.directory))


def test_sessions_keep_an_adapter_that_is_removed_and_others_cannot_have_it(llama, tools, tmp_path):
    make_adapter(tmp_path, llama.directory, ["q_proj"])
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    adapt([engine], tmp_path)
    size = engine.adapter_bytes
    engine.open("s", 0, 4, 8, adapter="tuned")
    assert engine.adapters == {"tuned": 1}
    assert size > 0
    engine.remove_adapter("tuned")
    engine.remove_adapter("never there")
    assert (engine.adapters, engine.adapter_bytes) == ({}, size)
    tuned = engine.run([Step("s", 0, tokens=(1, 2, 3), sample=Sampling(temperature=0))])[0].logprob
    engine.close("s")
    assert engine.adapter_bytes == 0
    engine.open("s", 0, 4, 8)
    plain = engine.run([Step("s", 0, tokens=(1, 2, 3), sample=Sampling(temperature=0))])[0].logprob
    assert plain != tuned


def test_an_adapter_of_other_layers_or_dtype_is_no_adapter_of_the_engine(llama, tools, tmp_path):
    make_adapter(tmp_path, llama.directory, ["q_proj"])
    engine = tools.engines_of(llama.directory, (0, 2, 4))[1]
    index = AdapterIndex(tmp_path, engine.span.config)
    for wrong in (index.load("x", 0, 3, dtype="float32"), index.load("x", 2, 4, dtype="bfloat16")):
        with pytest.raises(LocalFault, match="the span is"):
            engine.add_adapter(wrong)
    engine.add_adapter(index.load("x", 0, 4, dtype="float32"))
    assert engine.adapters == {"x": 0}


def test_a_directory_is_told_apart_from_a_models(llama, tmp_path):
    make_adapter(tmp_path, llama.directory, ["q_proj"])
    assert is_adapter(tmp_path)
    assert not is_adapter(llama.directory)
    assert AdapterConfig.from_dir(tmp_path).base == "acme/base"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
