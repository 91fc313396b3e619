"""Engine: sessions, admission, batches, cancellation, and what is guaranteed of the bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from model_shards import ContextOverflow, Engine, LocalFault, NoRoom, Sampling, Step, StepError
from model_shards.kv import BLOCK_TOKENS
from model_shards.sampler import pick

GREEDY = Sampling(temperature=0)


@pytest.fixture
def engine(llama, tools) -> Engine:
    return tools.engines_of(llama.directory, (0, 4))[0]


@pytest.fixture
def middle(llama, tools) -> Engine:
    return tools.engines_of(llama.directory, (0, 1, 3, 4))[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_and_weights_are_in_the_compute_dtype(llama, tools, dtype):
    first, last = tools.engines_of(llama.directory, (0, 2, 4), dtype=dtype)
    first.open("s", 0, 2, 8)
    last.open("s", 2, 4, 8)
    hidden = first.run([Step("s", 0, tokens=(1, 2, 3))])[0].hidden
    assert (hidden.dtype, tuple(hidden.shape)) == (getattr(torch, dtype), (3, 32))
    result = last.run([Step("s", 0, hidden=hidden, sample=GREEDY)])[0]
    assert result.hidden is None
    assert 0 <= result.token < 97
    assert result.logprob <= 0


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_of_any_dtype_loads_into_any_compute_dtype(make_reference, tools, stored, dtype):
    reference = make_reference("llama", dtype=stored)
    chain = tools.Chain(tools.engines_of(reference.directory, (0, 4), dtype=dtype))
    tolerance = 1e-4 if dtype == "float32" else 0.2
    torch.testing.assert_close(
        chain.logits([1, 5, 9, 70]), reference.logits([1, 5, 9, 70]), atol=tolerance, rtol=0.05
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_split_gives_the_same_bits_in_every_dtype(make_reference, tools, dtype):
    reference = make_reference("qwen3", head_dim=16)
    found = []
    for cuts in tools.splits(4):
        chain = tools.Chain(tools.engines_of(reference.directory, cuts, dtype=dtype))
        found.append(torch.cat([chain.logits([1, 5, 9, 70, 8, 8]), chain.logits([3]), chain.logits([4, 44])]))
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
def test_a_session_has_the_same_bits_alone_and_in_company(make_reference, tools, model, dtype):
    llama = make_reference(model, head_dim=8, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
    prompts = [[(at * 7 + step) % 97 for step in range(3 + at % 4)] for at in range(9)]

    def decode(engine, names):
        """Each session's activations over six decode steps taken together."""
        places, found = {}, {name: [] for name in names}
        for name in names:
            engine.open(name, 0, 3, 32)
            prompt = prompts[int(name)]
            found[name].append(engine.run([Step(name, 0, tokens=tuple(prompt))])[0].hidden)
            places[name] = len(prompt)
        for step in range(6):
            steps = [Step(name, places[name] + step, tokens=((step * 11) % 97,)) for name in names]
            for result in engine.run(steps):
                found[result.session].append(result.hidden)
        for name in names:
            engine.close(name)
        return {name: torch.cat(parts) for name, parts in found.items()}

    engine = tools.engines_of(llama.directory, (0, 3, 4), dtype=dtype)[0]
    together = decode(engine, [str(at) for at in range(9)])
    for name, rows in together.items():
        assert torch.equal(decode(engine, [name])[name], rows)


def test_prompts_and_single_steps_may_share_a_run(llama, tools, engine):
    alone = tools.Chain(tools.engines_of(llama.directory, (0, 4)), "x")
    expected = [alone.sample([1, 2, 3], GREEDY), alone.sample([9], GREEDY)]
    engine.open("x", 0, 4, 16)
    engine.open("y", 0, 4, 16)
    first = engine.run([Step("y", 0, tokens=(4,)), Step("x", 0, tokens=(1, 2, 3), sample=GREEDY)])
    assert [result.session for result in first] == ["y", "x"]
    assert first[0].token is None
    second = engine.run([Step("x", 3, tokens=(9,), sample=GREEDY), Step("y", 1, tokens=(5, 6))])
    assert [(first[1].token, first[1].logprob), (second[0].token, second[0].logprob)] == expected


def test_sub_spans_of_one_engine_serve_as_stages(llama, tools, engine):
    whole = tools.Chain(tools.engines_of(llama.directory, (0, 4)), "w").sample([1, 2, 3], GREEDY)
    engine.open("front", 0, 1, 8)
    engine.open("back", 1, 4, 8)
    hidden = engine.run([Step("front", 0, tokens=(1, 2, 3))])[0].hidden
    result = engine.run([Step("back", 0, hidden=hidden, sample=GREEDY)])[0]
    assert (result.token, result.logprob) == whole


def test_an_intermediate_prompt_piece_needs_no_token(engine):
    engine.open("s", 0, 4, 8)
    result = engine.run([Step("s", 0, tokens=(1, 2))])[0]
    assert (result.hidden, result.token, result.logprob) == (None, None, None)
    assert engine.position("s") == 2


BAD_STEPS = {
    "unknown_session": (Step("t", 0, tokens=(1,)), "not open"),
    "position_ahead": (Step("s", 1, tokens=(1,)), "position 1, expected 0"),
    "position_negative": (Step("s", -1, tokens=(1,)), "expected 0"),
    "nothing": (Step("s", 0), "either tokens or hidden"),
    "both": (Step("s", 0, tokens=(1,), hidden=torch.zeros(1, 32)), "either tokens or hidden"),
    "empty": (Step("s", 0, tokens=()), "no positions"),
    "token_too_large": (Step("s", 0, tokens=(1, 97)), "vocabulary of 97"),
    "token_negative": (Step("s", 0, tokens=(-1,)), "vocabulary of 97"),
    "hidden_at_layer_0": (Step("s", 0, hidden=torch.zeros(1, 32)), "tokens expected"),
    "tokens_behind_layer_0": (Step("m", 0, tokens=(1,)), "hidden expected"),
    "hidden_width": (Step("m", 0, hidden=torch.zeros(1, 31)), r"\[1, 31\]"),
    "hidden_dimensions": (Step("m", 0, hidden=torch.zeros(1, 1, 32)), r"\[1, 1, 32\]"),
    "hidden_dtype": (Step("m", 0, hidden=torch.zeros(1, 32, dtype=torch.bfloat16)), "bfloat16"),
    "hidden_nan": (Step("m", 0, hidden=torch.full((1, 32), float("nan"))), "not finite"),
    "hidden_infinite": (Step("m", 0, hidden=torch.full((1, 32), float("inf"))), "not finite"),
    "bias_outside": (
        Step("s", 0, tokens=(1,), sample=Sampling(logit_bias=((97, 1.0),))),
        "vocabulary of 97",
    ),
    "sample_too_early": (Step("e", 0, tokens=(1,), sample=GREEDY), "asks to sample"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_step_is_refused_and_nothing_moves(engine, name):
    for session, start, end in (("s", 0, 4), ("m", 1, 4), ("e", 0, 3), ("good", 0, 4)):
        engine.open(session, start, end, 8)
    step, what = BAD_STEPS[name]
    with pytest.raises(StepError, match=what) as caught:
        engine.run([Step("good", 0, tokens=(1,)), step])
    assert caught.value.session == step.session
    with pytest.raises(StepError, match=what):
        engine.check(step)
    assert engine.position("good") == 0


def test_two_steps_of_one_session_in_a_run_are_refused(engine):
    engine.open("s", 0, 4, 8)
    with pytest.raises(StepError, match="two steps"):
        engine.run([Step("s", 0, tokens=(1,)), Step("s", 1, tokens=(2,))])


def test_a_session_cannot_outgrow_what_it_reserved(engine):
    engine.open("s", 0, 4, 4)
    engine.run([Step("s", 0, tokens=(1, 2, 3))])
    with pytest.raises(ContextOverflow) as caught:
        engine.run([Step("s", 3, tokens=(4, 5))])
    assert (caught.value.limit, caught.value.got) == (4, 5)
    engine.run([Step("s", 3, tokens=(4,))])


def test_opening_checks_session_layers_and_context(engine, middle):
    engine.open("s", 0, 4, 8)
    with pytest.raises(StepError, match="open already"):
        engine.open("s", 0, 4, 8)
    with pytest.raises(ContextOverflow, match="64"):
        engine.open("long", 0, 4, 65)
    with pytest.raises(StepError, match="tokens_max"):
        engine.open("none", 0, 4, 0)
    with pytest.raises(StepError, match="tokens_max"):
        engine.open("short", 0, 4, 2, prompt=[1, 2, 3])
    for prompt in ([97], [-1]):
        with pytest.raises(StepError, match="vocabulary"):
            engine.open("strange", 0, 4, 8, prompt=prompt)
    for start, end in ((0, 2), (1, 4), (2, 2), (3, 3)):
        with pytest.raises(LocalFault, match="span"):
            middle.open("s", start, end, 8)
    assert engine.sessions() == 1
    assert middle.sessions() == 0


def test_admission_says_no_room_and_when_to_come_back(llama, tools):
    block = 2 * BLOCK_TOKENS * 2 * 8 * 4
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 3 * block + block - 1)[0]
    assert engine.kv_tokens_free() == 3 * BLOCK_TOKENS
    engine.open("a", 0, 4, 2 * BLOCK_TOKENS)
    with pytest.raises(NoRoom) as caught:
        engine.open("b", 0, 4, BLOCK_TOKENS + 1)
    assert caught.value.retry_after_s > 0
    engine.open("b", 0, 4, BLOCK_TOKENS)
    assert engine.kv_tokens_free() == 0
    assert engine.kv_bytes_used() == 4 * 3 * block
    engine.close("a")
    engine.close("a")
    assert engine.kv_tokens_free() == 2 * BLOCK_TOKENS
    engine.open("c", 0, 4, 2 * BLOCK_TOKENS)


def test_a_session_pays_only_for_its_layers(engine):
    before = engine.kv_bytes_used()
    engine.open("one", 2, 3, 20)
    assert engine.kv_bytes_used() - before == 2 * (2 * BLOCK_TOKENS * 2 * 8 * 4)


def test_scattered_blocks_give_the_same_bits_as_contiguous_ones(llama, tools):
    tokens = [(5 * at + 2) % 97 for at in range(40)]
    expected = tools.Chain(tools.engines_of(llama.directory, (0, 4)), "s", 48).logits(tokens)
    block = 2 * BLOCK_TOKENS * 2 * 8 * 4
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 6 * block)[0]
    for at in range(24):
        engine.open(f"filler{at}", 0, 1, BLOCK_TOKENS)
    for at in range(0, 24, 2):
        engine.close(f"filler{at}")
    chain = tools.Chain([engine], "s", 48)
    assert torch.equal(chain.logits(tokens), expected)
    tidy = tools.Chain(tools.engines_of(llama.directory, (0, 4)), "s", 48)
    tidy.logits(tokens)
    assert torch.equal(chain.logits([7]), tidy.logits([7]))


def test_a_cancelled_run_moves_nobody_and_can_be_repeated(engine):
    class Cancelled(Exception):
        pass

    engine.open("s", 0, 4, 8)
    expected = engine.run([Step("s", 0, tokens=(1, 2), sample=GREEDY)])[0]
    engine.rewind("s", 0)
    for calls_before in range(4):
        calls = itertools.count()

        def check(calls=calls, limit=calls_before):
            if next(calls) == limit:
                raise Cancelled

        with pytest.raises(Cancelled):
            engine.run([Step("s", 0, tokens=(9, 9), sample=GREEDY)], check)
        assert engine.position("s") == 0
    assert engine.run([Step("s", 0, tokens=(1, 2), sample=GREEDY)])[0] == expected


def test_rewinding_forgets_what_came_after(engine):
    engine.open("s", 0, 4, 16)
    engine.run([Step("s", 0, tokens=(1, 2, 3))])
    expected = engine.run([Step("s", 3, tokens=(4,), sample=GREEDY)])[0]
    engine.run([Step("s", 4, tokens=(50, 60, 70))])
    engine.rewind("s", 3)
    assert engine.run([Step("s", 3, tokens=(4,), sample=GREEDY)])[0] == expected
    with pytest.raises(StepError, match="rewind"):
        engine.rewind("s", 5)


def test_sampled_text_is_a_function_of_seed_and_position_alone(llama, tools):
    def text(cuts, seed, sizes):
        chain = tools.Chain(tools.engines_of(llama.directory, cuts), tokens_max=64)
        sampling, token, out = Sampling(temperature=1.5, top_p=0.95, seed=seed), None, []
        for size in sizes:
            token, _ = chain.sample([1] * size if token is None else [token], sampling)
            out.append(token)
        return out

    sizes = [3] + [1] * 20
    assert text((0, 4), 5, sizes) == text((0, 1, 2, 3, 4), 5, sizes)
    assert text((0, 4), 5, sizes) != text((0, 4), 6, sizes)


def test_the_draw_belongs_to_the_position_where_the_token_will_stand(llama, tools):
    engines, samplings = (
        tools.engines_of(llama.directory, (0, 4)),
        [Sampling(3.0, seed=seed) for seed in range(9)],
    )
    logits = tools.Chain(engines, "logits").logits([1, 2, 3])[-1]
    found = [tools.Chain(engines, str(at)).sample([1, 2, 3], how)[0] for at, how in enumerate(samplings)]
    assert found == [pick(logits, how, 3).token for how in samplings]
    assert found != [pick(logits, how, 2).token for how in samplings]


def test_a_closed_session_is_unknown(engine):
    engine.open("s", 0, 4, 8)
    engine.close("s")
    with pytest.raises(StepError, match="not open"):
        engine.run([Step("s", 0, tokens=(1,))])
    engine.close("never opened")


def test_a_dtype_or_quant_that_does_not_exist_is_refused_by_name(llama, tools):
    with pytest.raises(LocalFault, match="float64"):
        tools.engines_of(llama.directory, (0, 4), dtype="float64")


def test_the_head_and_the_embedding_live_only_where_they_belong(llama, tools):
    first, middle, last = (engine.span for engine in tools.engines_of(llama.directory, (0, 1, 3, 4)))
    assert first.embed_weight is not None
    assert middle.embed_weight is None
    assert middle.head is None
    assert last.head is not None
    with pytest.raises(LocalFault, match="head"):
        middle.logits(torch.zeros(1, 32))
    with pytest.raises(LocalFault, match="embedding"):
        last.embed(torch.tensor([1]))


def test_a_tied_model_in_one_span_holds_its_table_once(make_reference, tools):
    reference = make_reference("llama", tie_word_embeddings=True)
    span = tools.engines_of(reference.directory, (0, 4))[0].span
    assert span.head.weight.data_ptr() == span.embed_weight.data_ptr()
    assert span.weight_bytes < span.bytes_read + 1


PENALISED = Sampling(temperature=0, repetition_penalty=5.0, presence_penalty=1.0, frequency_penalty=1.0)


def test_penalties_see_prompt_and_answer_and_do_not_depend_on_the_split(llama, tools):
    plain = tools.Chain(tools.engines_of(llama.directory, (0, 4))).greedy([1, 2, 3], 12)

    def text(cuts, told):
        engines = tools.engines_of(llama.directory, cuts)
        for engine in engines:
            engine.open("s", engine.span.start, engine.span.end, 64, prompt=[1, 2, 3] if told else ())
        chain, tokens, out = tools.Chain([], "s"), [1, 2, 3], []
        chain.engines = engines
        for _ in range(12):
            tokens = [chain.sample(tokens, PENALISED)[0]]
            out += tokens
        return out

    assert len(set(plain)) < 12
    assert text((0, 4), True) == text((0, 4), False) == text((0, 2, 4), True)
    assert len(set(text((0, 4), True))) == 12
    assert len(set(text((0, 2, 4), False))) == 12


def test_a_stage_that_replaces_another_is_told_what_was_said(llama, tools):
    chain = tools.Chain(tools.engines_of(llama.directory, (0, 2, 4)), "s")
    tokens = [1, 2, 3]
    for _ in range(5):
        tokens.append(chain.sample(tokens[chain.position :], PENALISED)[0])
    expected = chain.sample(tokens[chain.position :], PENALISED)[0]
    fresh = tools.Chain(tools.engines_of(llama.directory, (0, 2, 4)), "s")
    fresh.sample(tokens[:-1], Sampling(temperature=0))
    forgetful = fresh.sample(tokens[-1:], PENALISED)[0]
    fresh.engines[1].rewind("s", len(tokens) - 1)
    fresh.engines[0].rewind("s", len(tokens) - 1)
    fresh.position -= 1
    fresh.engines[1].recall("s", tokens, 3)
    assert fresh.sample(tokens[-1:], PENALISED)[0] == expected
    assert forgetful != expected
    with pytest.raises(StepError, match="prompt"):
        fresh.engines[1].recall("s", tokens, 99)
    with pytest.raises(StepError, match="vocabulary"):
        fresh.engines[1].recall("s", [97], 0)
    fresh.engines[1].recall("s", [-1, 5], 1)


def test_top_logprobs_come_with_the_result(engine):
    engine.open("s", 0, 4, 8)
    result = engine.run([Step("s", 0, tokens=(1, 2), sample=Sampling(temperature=0, top_logprobs=4))])[0]
    assert result.top_logprobs[0] == (result.token, pytest.approx(result.logprob))
    assert len(result.top_logprobs) == 4


def test_answer_penalties_need_no_prompt_at_the_last_stage(llama, tools):
    often = Sampling(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)

    def text(cuts):
        chain, tokens, out = tools.Chain(tools.engines_of(llama.directory, cuts)), [1, 2, 3], []
        for _ in range(20):
            tokens = [chain.sample(tokens, often)[0]]
            out += tokens
        return out

    plain = tools.Chain(tools.engines_of(llama.directory, (0, 4))).greedy([1, 2, 3], 20)
    assert text((0, 4)) == text((0, 2, 4)) != plain


def test_repetition_sees_the_prompt_of_the_very_step(llama, tools):
    prompt = next(
        [1, 2, 3, token]
        for token in range(97)
        if tools.Chain(tools.engines_of(llama.directory, (0, 4))).greedy([1, 2, 3, token], 1) == [token]
    )
    chain = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    assert chain.sample(prompt, Sampling(temperature=0, repetition_penalty=50.0))[0] not in prompt


def test_what_was_rewound_is_not_penalised(llama, tools):
    longer = [1, 2, 3, 9, 8, 7]
    logits = tools.Chain(tools.engines_of(llama.directory, (0, 4))).logits(longer)[-1]
    nearly = Sampling(
        temperature=0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias=((50, float(logits.max() - logits[50]) + 1.0),),
    )
    chain = tools.Chain(tools.engines_of(llama.directory, (0, 2, 4)))
    assert chain.sample([1, 2, 3], Sampling(temperature=0, logit_bias=((50, 100.0),)))[0] == 50
    for engine in chain.engines:
        engine.rewind("s", 0)
    chain.position = 0
    assert chain.sample(longer, nearly)[0] == 50
