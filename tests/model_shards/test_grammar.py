"""Answers kept to a form: what is allowed, what is refused, and that an engine's answers meet it."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers
import torch

from model_shards import GrammarError, Grammars, Sampling, Step, Tokenizer
from model_shards.chat import ChatTemplate

END = 2
VOCAB = 300
TEXTS = ['{"', '":', '"}', "true", "false", '"name', "12", "ab"]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and a few longer pieces; ids beyond stand for nothing, as in padded vocabularies."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": END}
    for text in [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *TEXTS]:
        vocab.setdefault(text, len(vocab))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, {}, ChatTemplate("{{ messages }}", "none"), (END,))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB, (END,))


def ids_of(tokenizer, text):
    return [tokenizer._backend.token_to_id(character) for character in text]


def test_only_what_may_follow_is_allowed_and_the_end_where_the_form_is_met(tokenizer, grammars):
    grammar = grammars.compile("regex", "ab*c")
    a, b, c = ids_of(tokenizer, "abc")
    ab = tokenizer._backend.token_to_id("ab")
    assert set(grammar.allowed([]).nonzero().flatten().tolist()) == {a, ab}
    assert set(grammar.allowed([a]).nonzero().flatten().tolist()) == {b, c}
    assert set(grammar.allowed([ab, c]).nonzero().flatten().tolist()) == {END}
    # Taken back, as after a window of guesses that failed: the same as before.
    assert set(grammar.allowed([a, b]).nonzero().flatten().tolist()) == {b, c}
    assert grammar.allowed([]).shape == (VOCAB,)


@pytest.mark.parametrize(
    ("form", "text", "told"),
    [
        ("regex", "a(", "regex"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[1]", "a schema is an object"),
        ("json_schema", '{"type": "nonsense"}', "json_schema"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "json_schema"),
        ("regex", "a" * 70_000, "70000 characters"),
        ("yaml", "", "json_schema, json_object, regex"),
    ],
)
def test_what_is_malformed_impossible_or_too_large_is_refused(grammars, form, text, told):
    with pytest.raises(GrammarError, match=re.escape(told)):
        grammars.compile(form, text)


def test_an_answer_that_left_the_form_is_told(tokenizer, grammars):
    grammar = grammars.compile("regex", "ab")
    with pytest.raises(GrammarError):
        grammar.allowed(ids_of(tokenizer, "x"))
    assert bool(grammar.allowed(ids_of(tokenizer, "a")).any())


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_engine_keeps_to_a_schema(make_reference, tools, tokenizer, grammars, seed, temperature):
    directory = make_reference("llama", vocab_size=VOCAB, max_position_embeddings=256).directory
    chain = tools.Chain(tools.engines_of(directory, (0, 2, 4)), tokens_max=200)
    grammar = grammars.compile("json_schema", json.dumps(SCHEMA))
    sampling = Sampling(temperature=temperature, seed=seed, grammar=grammar)
    tokens, answer = [5, 6, 7], []
    for _ in range(120):
        token, logprob = chain.sample(tokens, sampling)
        assert logprob < 0
        if token == END:
            break
        answer.append(token)
        tokens = [token]
    found = json.loads(tokenizer.decode(answer))
    assert set(found) == {"name", "old"}
    assert isinstance(found["old"], bool)


def test_a_step_whose_grammar_fails_leaves_its_session_where_it_was(make_reference, tools, grammars):
    engine = tools.engines_of(make_reference("llama", vocab_size=VOCAB).directory, (0, 4))[0]
    chain = tools.Chain([engine])

    class Broken:
        def allowed(self, answer):
            raise GrammarError("regex", "broken")

    with pytest.raises(GrammarError, match="broken"):
        chain.sample([5, 6], Sampling(grammar=Broken()))
    assert engine.position("s") == 0
    assert torch.isfinite(engine.logits([Step("s", 0, (5, 6))])[0]).all()
