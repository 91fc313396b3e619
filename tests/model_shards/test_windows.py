"""Windows of guesses: whatever is guessed, the text, its log-probabilities and the caches are those of single steps."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from model_shards import ContextOverflow, Engine, ParkingLot, Sampling, Step, StepError, Window
from model_shards.errors import ModelError
from model_shards.sampler import Pick, pick, uniform
from model_shards.windows import WINDOW_ROWS_MAX, judge

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=0.7, top_p=0.9, seed=5)
HOT = Sampling(temperature=1.5, seed=6, top_logprobs=3)
PENAL = Sampling(
    temperature=0.8,
    seed=3,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.7,
    logit_bias=((7, 2.0),),
)
PROMPT = tuple((11 * at + 5) % 97 for at in range(21))
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4,
    "q_lora_rank": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "window_and_caps": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5,
                                   "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "window": ("mistral", {"sliding_window": 5}),
    "sinks": ("gpt_oss", {"head_dim": 8, "sliding_window": 5, "num_local_experts": 6, "num_experts_per_tok": 3}),
    "latent": ("deepseek_v3", LATENT),
    "length_dependent": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 28}),
}  # fmt: skip


def decode(engines, prompt, count, sampling=GREEDY, guess=None, name="s"):
    """``count`` tokens as (token, logprob, top), the last one by a single step, and how many passes they took.
    ``guess(text, rows)`` gives a window; without it every step is single."""
    room = len(prompt) + count
    for engine in engines:
        engine.open(name, engine.span.start, engine.span.end, room)
    made, passes, kept = [], 0, ()
    steps = [Step(name, 0, tokens=tuple(prompt), sample=sampling)]
    while True:
        result = through(engines, steps[0])
        made += picks_of(result)
        if len(made) >= count:
            return made, passes
        window = Window.line((made[-1][0],))
        left = count - len(made) - 1
        if guess is not None and left > 1:
            window = guess([*prompt, *(token for token, _, _ in made)], left)
        verdict = result.verdict
        kept = verdict.path if verdict is not None else ()
        position = len(prompt) + len(made) - 1
        asked = window if window.rows > 1 else None
        steps = [Step(name, position, tokens=window.tokens, sample=sampling, window=asked, kept=kept)]
        passes += 1


def through(engines, step):
    """One step through a chain; stages in the middle see neither tokens nor what is sampled."""
    hidden = None
    for engine in engines:
        own = Step(step.session, step.position, kept=step.kept, window=step.window)
        if hidden is None:
            own.tokens = step.tokens
        else:
            own.hidden = hidden
            if step.window is not None and engine is not engines[-1]:
                own.window = Window(step.window.parents)
        if engine is engines[-1]:
            own.sample = step.sample
        result = engine.run([own])[0]
        hidden = result.hidden
    return result


def picks_of(result):
    if result.verdict is None:
        return [(result.token, result.logprob, result.top_logprobs)]
    return [(each.token, each.logprob, each.top) for each in result.verdict.picks]


def state_of(engine, name="s"):
    return b"".join(bytes(part) for part in engine.export_session(name))


class Oracle:
    """Guesses the known text, with some guesses wrong, as lines or as trees."""

    def __init__(self, prompt, made, *, wrong=0.3, trees=False, rows_max=WINDOW_ROWS_MAX, seed=0):
        self.text = [*prompt, *(token for token, _, _ in made)]
        self.chance = random.Random(seed)
        self.wrong, self.trees, self.rows_max = wrong, trees, rows_max
        self.windows = 0

    def __call__(self, text, rows):
        assert text == self.text[: len(text)]
        rows = min(rows, 1 + self.chance.randrange(self.rows_max))
        parents, tokens, at, depth = [-1], [text[-1]], 0, 0
        while len(parents) < rows:
            token = self.text[len(text) + depth] if len(text) + depth < len(self.text) else 0
            beside = (
                [(token + more) % 97 for more in range(1, 1 + self.chance.randrange(3))] if self.trees else []
            )
            guesses = [*beside, token] if self.chance.random() >= self.wrong else [(token + 1) % 97]
            self.chance.shuffle(guesses)
            below = at
            for guess in guesses[: rows - len(parents)]:
                parents.append(at)
                tokens.append(guess)
                if guess == token or below == at:
                    below = len(parents) - 1
            at, depth = below, depth + 1
        self.windows += len(parents) > 1
        return Window(tuple(parents), tuple(tokens))


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_any_guesses_give_the_bits_of_single_steps(make_reference, tools, model, dtype, trees):
    kind, changes = MODELS[model]
    reference = make_reference(kind, **changes)
    plain = tools.engines_of(reference.directory, (0, 4), dtype=dtype)
    expected, singles = decode(plain, PROMPT, 30, WARM)
    for seed in range(2):
        guess = Oracle(PROMPT, expected, trees=trees, seed=seed, wrong=0.2, rows_max=8)
        engines = tools.engines_of(reference.directory, (0, 4), dtype=dtype)
        made, passes = decode(engines, PROMPT, 30, WARM, guess)
        assert made == expected
        assert guess.windows > 2
        assert passes < singles
        assert state_of(engines[0]) == state_of(plain[0])


@pytest.mark.parametrize("trees", [False, True])
def test_all_splits_give_one_text_and_one_cache(llama, tools, trees):
    plain = tools.engines_of(llama.directory, (0, 4), dtype="bfloat16")
    expected, _ = decode(plain, PROMPT, 25, HOT)
    for cuts in tools.splits(4):
        engines = tools.engines_of(llama.directory, cuts, dtype="bfloat16")
        singles = tools.engines_of(llama.directory, cuts, dtype="bfloat16")
        assert decode(singles, PROMPT, 25, HOT)[0] == expected
        guess = Oracle(PROMPT, expected, trees=trees, seed=len(cuts))
        assert decode(engines, PROMPT, 25, HOT, guess)[0] == expected
        assert [state_of(one) for one in engines] == [state_of(one) for one in singles]


@pytest.mark.parametrize("sampling", [GREEDY, WARM, HOT, PENAL], ids=["greedy", "warm", "hot", "penalties"])
@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_every_way_to_choose_gives_its_own_text(llama, tools, sampling, wrong):
    cuts = (0, 2, 4)
    expected, singles = decode(tools.engines_of(llama.directory, cuts), PROMPT, 30, sampling)
    guess = Oracle(PROMPT, expected, wrong=wrong, trees=wrong < 1, rows_max=6)
    made, passes = decode(tools.engines_of(llama.directory, cuts), PROMPT, 30, sampling, guess)
    assert made == expected
    assert (passes == singles) == (wrong == 1.0)


def test_right_guesses_save_passes_and_wrong_ones_add_none(llama, tools):
    expected, singles = decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 26)
    right = Oracle(PROMPT, expected, wrong=0.0)
    right.chance.randrange = lambda most: 5
    assert singles == 25
    assert decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 26, GREEDY, right)[1] == 5


class OddsAndEnds:
    """Allows tokens of the other parity than the one before; nothing after three nines."""

    def allowed(self, answer):
        if list(answer).count(9) >= 3:
            raise StepError("s", "no token of this vocabulary may follow")
        wanted = (answer[-1] + 1) % 2 if answer else 0
        return torch.tensor([at % 2 == wanted for at in range(97)])


def test_a_form_is_kept_over_a_window(llama, tools):
    sampling = Sampling(temperature=0.9, seed=4, grammar=OddsAndEnds())
    expected, _ = decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 20, sampling)
    assert all((a[0] + b[0]) % 2 for a, b in itertools.pairwise(expected))
    guess = Oracle(PROMPT, expected, wrong=0.2)
    assert decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 20, sampling, guess)[0] == expected


def test_what_fails_after_a_right_guess_fails_only_when_it_is_its_turn(llama, tools):
    sampling = Sampling(temperature=0, logit_bias=((9, 100.0), (8, 99.0)), grammar=OddsAndEnds())

    def all_said(guess):
        engines = tools.engines_of(llama.directory, (0, 4))
        made = []
        engines[0].open("s", 0, 4, 40)

        def go_on(step):
            while len(made) < 19:
                made.extend(picks_of(through(engines, step)))
                tokens = guess(made[-1][0])
                window = Window.line(tokens) if len(tokens) > 1 else None
                position = len(PROMPT) + len(made) - 1
                step = Step("s", position, tokens=tokens, sample=sampling, window=window)

        with pytest.raises(StepError, match="may follow"):
            go_on(Step("s", 0, tokens=PROMPT, sample=sampling))
        assert engines[0].position("s") == len(PROMPT) + len(made) - 1
        return made

    alone = all_said(lambda token: (token,))
    assert [token for token, _, _ in alone] == [8, 9, 8, 9, 8, 9]
    assert all_said(lambda token: tuple((token + at) % 2 + 8 for at in range(9))) == alone


def test_windows_and_single_steps_share_a_run_and_stay_themselves(llama, tools):
    expected = {
        name: decode(tools.engines_of(llama.directory, (0, 4), dtype="bfloat16"), PROMPT[at:], 21, WARM)[0]
        for at, name in enumerate("abcd")
    }
    engine = tools.engines_of(llama.directory, (0, 4), dtype="bfloat16")[0]
    guesses = {
        "a": None,
        "b": Oracle(PROMPT[1:], expected["b"]),
        "c": Oracle(PROMPT[2:], expected["c"], trees=True),
    }
    made, texts = {}, {}
    for at, name in enumerate("abc"):
        engine.open(name, 0, 4, 64)
        texts[name] = list(PROMPT[at:])
        result = engine.run([Step(name, 0, tokens=PROMPT[at:], sample=WARM)])[0]
        made[name] = picks_of(result)
    engine.open("d", 0, 4, 64)
    read = 0
    for _ in range(20):
        steps = []
        for name in "abc":
            if len(made[name]) > 20:
                continue
            text = texts[name] + [token for token, _, _ in made[name]]
            guess = guesses[name]
            window = guess(text, 21 - len(made[name])) if guess is not None else Window.line(text[-1:])
            asked = window if window.rows > 1 else None
            steps.append(Step(name, len(text) - 1, tokens=window.tokens, sample=WARM, window=asked))
        if read < 18:
            steps.append(
                Step("d", read, tokens=PROMPT[3 + read : 3 + read + 3], sample=WARM if read == 15 else None)
            )
            read += 3
        for result in engine.run(steps):
            if result.session != "d":
                made[result.session] += picks_of(result)
    assert {name: made[name][:21] for name in "abc"} == {name: expected[name] for name in "abc"}


def test_what_was_guessed_wrongly_leaves_nothing_in_the_cache(llama, tools):
    engine, plain = (tools.engines_of(llama.directory, (0, 4))[0] for _ in range(2))
    expected, _ = decode([plain], PROMPT, 30)
    made, _ = decode([engine], PROMPT, 30, GREEDY, Oracle(PROMPT, expected, wrong=0.5, trees=True))
    text = [*PROMPT, *(token for token, _, _ in made)]
    assert engine.kv_blocks_free == plain.kv_blocks_free
    engine.close("s")
    plain.close("s")
    assert engine.kv_blocks_free == engine.kv_blocks
    assert engine.cached(0, 4, text) == plain.cached(0, 4, text) == 48
    # Another text that begins alike but goes on as was guessed finds nothing of the guesses.
    assert engine.cached(0, 4, [*text[:40], *((token + 1) % 97 for token in text[40:])]) == 32
    engine._cache.pages.validate()


def test_a_run_that_was_stopped_may_be_run_again(llama, tools):
    front, back = tools.engines_of(llama.directory, (0, 2, 4))
    expected, _ = decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 12)
    tokens = [token for token, _, _ in expected]
    front.open("s", 0, 2, 40)
    back.open("s", 2, 4, 40)
    through([front, back], Step("s", 0, tokens=PROMPT, sample=GREEDY))
    window = Window.line((*tokens[:4], 96))
    result = through([front, back], Step("s", 21, tokens=window.tokens, sample=GREEDY, window=window))
    assert result.verdict.path == (1, 2, 3)
    assert [one.token for one in result.verdict.picks] == tokens[1:5]
    assert (front.position("s"), back.position("s")) == (22, 25)
    step = Step("s", 25, tokens=(tokens[4],), kept=(1, 2, 3))

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            front.run([step], check_cancelled=stop)
    hidden = front.run([step])[0].hidden
    assert back.run([Step("s", 25, hidden=hidden, sample=GREEDY)])[0].token == tokens[5]


def test_a_parked_session_keeps_its_window(llama, tools):
    expected, _ = decode(tools.engines_of(llama.directory, (0, 4)), PROMPT, 12)
    tokens = [token for token, _, _ in expected]
    spans = [engine.span for engine in tools.engines_of(llama.directory, (0, 2, 4))]
    front, back = (Engine(span, kv_bytes_max=1 << 16, parking=ParkingLot(1 << 20)) for span in spans)
    front.open("s", 0, 2, 40)
    back.open("s", 2, 4, 40)
    through([front, back], Step("s", 0, tokens=PROMPT, sample=GREEDY))
    window = Window((-1, 0, 0, 2, 3), (tokens[0], 96, tokens[1], tokens[2], 96))
    result = through([front, back], Step("s", 21, tokens=window.tokens, sample=GREEDY, window=window))
    assert result.verdict.path == (2, 3)
    front.park("s")
    front.unpark("s")
    step = Step("s", 24, tokens=(tokens[3],), kept=(2, 3), sample=GREEDY)
    assert through([front, back], step).token == tokens[4]


WINDOW = Window.line((5, 6, 7))
BAD = {
    "too_many_rows": (Step("s", 21, tokens=(1,) * 33, window=Window.line((1,) * 33), sample=GREEDY), "33 rows"),
    "no_parent": (
        Step("s", 21, tokens=(5, 6, 7), window=Window((-1, 0, 2), (5, 6, 7)), sample=GREEDY), "none before it"
    ),
    "other_tokens": (Step("s", 21, tokens=(5, 6, 8), window=WINDOW, sample=GREEDY), "other tokens"),
    "fewer_tokens": (
        Step("s", 21, tokens=(5, 6, 7), window=Window((-1, 0, 1), (5, 6)), sample=GREEDY), "with 2 tokens"
    ),
    "other_size": (Step("s", 21, tokens=(5, 6), window=WINDOW, sample=GREEDY), "3 rows over 2"),
    "pooled": (Step("s", 21, tokens=(5, 6, 7), window=WINDOW, sample=GREEDY, pool="mean"), "pool a window"),
    "outside_the_vocabulary": (
        Step("s", 21, tokens=(5, 97), window=Window.line((5, 97)), sample=GREEDY), "vocabulary"
    ),
    "keeps_what_is_not_there": (Step("s", 23, tokens=(5,), kept=(1, 2), sample=GREEDY), "position 23, expected 21"),
}  # fmt: skip


def test_text_that_is_known_is_computed_again_in_windows_with_the_bits_of_single_steps(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    known, found = (5, 6, 7, 8, 9, 10), []
    for name in ("single", "windows"):
        engine.open(name, 0, 4, 64)
        engine.run([Step(name, 0, tokens=PROMPT)])
    for number, token in enumerate(known):
        found = engine.run([Step("single", 21 + number, tokens=(token,), sample=GREEDY)])
    engine.run([Step("windows", 21, tokens=known[:3], window=Window.line(known[:3]))])
    engine.run([Step("windows", 24, tokens=known[3:5], window=Window.line(known[3:5]), kept=(1, 2))])
    again = engine.run([Step("windows", 26, tokens=known[5:], kept=(1,), sample=GREEDY)])
    assert (again[0].token, again[0].logprob) == (found[0].token, found[0].logprob)
    assert engine.position("windows") == engine.position("single")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_window_is_refused_and_changes_nothing(llama, tools, name):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    engine.open("s", 0, 4, 64)
    engine.run([Step("s", 0, tokens=PROMPT)])
    step, told = BAD[name]
    with pytest.raises(StepError, match=told):
        engine.run([step])
    assert engine.position("s") == 21


@pytest.mark.parametrize("kept", [(2, 1), (0, 1), (1, 4), (1, 1)])
def test_what_is_kept_must_be_rows_of_the_window(llama, tools, kept):
    front = tools.engines_of(llama.directory, (0, 2))[0]
    front.open("s", 0, 2, 64)
    front.run([Step("s", 0, tokens=(1, 2, 3))])
    front.run([Step("s", 3, tokens=(4, 5, 6, 7), window=Window.line((4, 5, 6, 7)))])
    with pytest.raises(StepError, match="keeps the rows"):
        front.run([Step("s", 6, tokens=(9,), kept=kept)])
    assert front.position("s") == 4


def test_a_window_beyond_the_reserved_room_is_refused(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    engine.open("s", 0, 4, 23)
    engine.run([Step("s", 0, tokens=PROMPT)])
    with pytest.raises(ContextOverflow):
        engine.run([Step("s", 21, tokens=(5, 6, 7), window=WINDOW, sample=GREEDY)])


def test_the_distribution_is_the_models_whatever_is_guessed():
    """Chi-squared over seeds: the second token's counts against the model's probabilities, with guesses that depend
    on the seed, as a draft's do."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, generator=generator)
    counts = torch.zeros(6)
    draws = 4000
    accepted = 0
    for seed in range(draws):
        sampling = Sampling(temperature=1.0, seed=seed)
        draft = int(uniform(seed, 10) * 6)
        window = Window.line((0, draft, 3))

        def choose(row, before, sampling=sampling):
            return pick(logits[len(before) % 2], sampling, 10 + len(before))

        verdict = judge(window, choose)
        accepted += bool(verdict.path)
        token = verdict.picks[1] if len(verdict.picks) > 1 else choose(0, [verdict.picks[0].token])
        counts[token.token] += 1
    expected = torch.softmax(logits[1], 0) * draws
    assert draws // 10 < accepted < draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5  # 99.9 % of 5 degrees of freedom


def test_a_verdict_ends_before_what_raises():
    def choose(row, before):
        if len(before) == 2:
            raise ModelError("later")
        return Pick(5, 0.0)

    verdict = judge(Window.line((1, 5, 5, 5)), choose)
    assert ([one.token for one in verdict.picks], verdict.path) == ([5, 5], (1,))
