"""Embeddings: the last position's hidden row or the mean of all, as the reference's, however the text is cut."""

from __future__ import annotations

import pytest
import torch

from model_shards import Sampling, Step, StepError

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28, 77, 12, 50]
CUTS = {"whole": [12], "pieces": [5, 4, 3], "one by one": [1] * 12}


@pytest.fixture(params=["llama", "gemma2", "gpt_oss"])
def reference(request, make_reference):
    options = {"gemma2": {"head_dim": 16}, "gpt_oss": {"head_dim": 8, "num_local_experts": 4}}
    return make_reference(request.param, **options.get(request.param, {}))


@torch.no_grad()
def rows_of(reference, tokens):
    return reference.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def embed(engines, tokens, pool, sizes, session="s"):
    """The embedding after every piece of ``tokens``."""
    for engine in engines:
        engine.open(session, engine.span.start, engine.span.end, len(tokens))
    found, at = [], 0
    for size in sizes:
        step = Step(session, at, tokens=tuple(tokens[at : at + size]))
        for engine in engines[:-1]:
            step = Step(session, at, hidden=engine.run([step])[0].hidden)
        step.pool = pool
        found.append(engines[-1].run([step])[0].embedding)
        at += size
    return found


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4)])
@pytest.mark.parametrize("pool", ["last_hidden", "mean"])
def test_embeddings_equal_the_reference_after_every_piece(reference, tools, pool, cuts, cut):
    rows, end = rows_of(reference, TOKENS), 0
    found = embed(tools.engines_of(reference.directory, cuts), TOKENS, pool, CUTS[cut])
    for size, ours in zip(CUTS[cut], found, strict=True):
        end += size
        expected = rows[end - 1] if pool == "last_hidden" else rows[:end].mean(0)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_texts_in_company_have_the_same_embeddings_and_tokens(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    alone = [embed([engine], TOKENS[at:], "mean", [4, *[1] * (8 - at)], f"alone{at}")[-1] for at in range(3)]
    steps = []
    for at in range(3):
        engine.open(str(at), 0, 4, 16)
        steps.append(Step(str(at), 0, tokens=tuple(TOKENS[at : at + 4]), pool="mean"))
    engine.run(steps)
    done = {}
    for turn in range(8):
        steps = [
            Step(
                str(at),
                4 + turn,
                tokens=(TOKENS[at + 4 + turn],),
                pool="mean",
                sample=Sampling(temperature=0),
            )
            for at in range(3)
            if at + 4 + turn < 12
        ]
        done.update({result.session: result for result in engine.run(steps)})
    assert all(torch.equal(done[str(at)].embedding, alone[at]) for at in range(3))
    assert all(result.token is not None for result in done.values())


def test_a_run_that_is_cancelled_adds_nothing_to_a_mean(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    expected = embed([engine], TOKENS, "mean", [6, 6], "whole")[-1]
    engine.open("s", 0, 4, 12)
    engine.open("other", 0, 4, 12)
    engine.run([Step("s", 0, tokens=tuple(TOKENS[:6]), pool="mean")])
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    both = [Step("s", 6, tokens=tuple(TOKENS[6:]), pool="mean"), Step("other", 0, tokens=tuple(TOKENS[:2]))]
    with pytest.raises(KeyboardInterrupt):
        engine.run(both, stop)
    assert torch.equal(engine.run(both)[0].embedding, expected)


@pytest.mark.parametrize("to", [0, 3, 6])
def test_a_mean_after_a_rewind_starts_anew_or_is_refused(llama, tools, to):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    expected = embed([engine], TOKENS, "mean", [6, 6], "whole")[-1]
    embed([engine], TOKENS[:6], "mean", [6], "short")
    engine.open("s", 0, 4, 12)
    engine.run([Step("s", 0, tokens=tuple(TOKENS[:6]), pool="mean")])
    engine.rewind("s", to)
    step = Step("s", to, tokens=tuple(TOKENS[to:]), pool="mean")
    if to == 3:
        with pytest.raises(StepError, match="only 0 of 3 were pooled"):
            engine.run([step])
        engine.run([Step("s", 3, tokens=tuple(TOKENS[3:]), pool="last_hidden")])
    else:
        torch.testing.assert_close(engine.run([step])[0].embedding, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("cuts", "pool", "message"),
    [((0, 4), "max", "expected one of last_hidden, mean"), ((0, 2), "mean", "layers end at 2 of 4")],
)
def test_a_pool_that_cannot_be_is_refused(llama, tools, cuts, pool, message):
    engine = tools.engines_of(llama.directory, cuts)[0]
    engine.open("s", *cuts, 4)
    with pytest.raises(StepError, match=message):
        engine.run([Step("s", 0, tokens=(1, 2), pool=pool)])
    assert engine.position("s") == 0
