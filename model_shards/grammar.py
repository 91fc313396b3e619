"""Answers that keep to a form: a JSON schema, any JSON object, or a regular expression.

llguidance says which tokens may come next; that is a pure function of the grammar and of the tokens of the answer so
far, so a stage that replaces another goes on with the same form. Knows nothing of logits or sessions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import torch

from model_shards.errors import GrammarError
from model_shards.tokens import Tokenizer

FORMS = ("json_schema", "json_object", "regex")
TEXT_CHARS_MAX = 1 << 16
LEXER_STATES_MAX = 50_000
ITEMS_MAX = 2_000
# Between a document's parts: without a limit a model may write nothing but spaces for ever.
LAYOUT: Any = {"whitespace_pattern": r" ?|\n {0,32}"}


def check_form(form: str, text: str = "") -> None:
    """Raises GrammarError for a form that no model could keep to, as far as that shows without a vocabulary."""
    problem = llguidance.LLMatcher.validate_grammar(_source(form, text), limits=_limits())
    if problem and not problem.startswith("WARNING"):
        raise GrammarError(form, problem.partition("<state>")[0].strip()[:300])


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(max_lexer_states=LEXER_STATES_MAX, max_items_in_row=ITEMS_MAX)


def _source(form: str, text: str) -> str:
    """The grammar as llguidance wants it. Raises GrammarError."""
    if form not in FORMS:
        raise GrammarError("form", f"{form!r:.40}, expected one of {', '.join(FORMS)}")
    if len(text) > TEXT_CHARS_MAX:
        raise GrammarError(form, f"{len(text)} characters, at most {TEXT_CHARS_MAX}")
    if form == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    schema = '{"type": "object"}' if form == "json_object" else text
    try:
        if not isinstance(json.loads(schema), dict | bool):
            raise GrammarError(form, "a schema is an object, or true or false")
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
    except (ValueError, RecursionError) as error:
        raise GrammarError(form, f"is no JSON: {str(error)[:200]}") from None


class Grammars:
    """Compiles grammars for one model's vocabulary of ``vocab`` tokens; ``eos_ids`` end an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        self.vocab = vocab
        ends = sorted({*eos_ids, *tokenizer.eos_ids})
        if not ends:
            raise GrammarError("tokenizer", "it names no end of text, and an answer of a given form must end")
        try:
            self.backend = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab, eos_token=ends, slices=None
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise GrammarError("tokenizer", f"cannot be constrained: {str(error)[:200]}") from error

    def compile(self, form: str, text: str = "") -> Grammar:
        """The grammar of a JSON schema (its text), of any JSON object, or of a regular expression that the whole answer
        matches. Raises GrammarError for one that is malformed, too large, or that no text can meet."""
        matcher = llguidance.LLMatcher(self.backend, _source(form, text), log_level=0, limits=_limits())
        grammar = Grammar(form, matcher, self.vocab)
        grammar.allowed(())
        return grammar


class Grammar:
    """One answer's grammar: `allowed` follows its tokens. Not shared between sessions."""

    def __init__(self, form: str, matcher: llguidance.LLMatcher, vocab: int) -> None:
        self._form = form
        self._start = matcher
        self._vocab = vocab
        self._matcher = matcher.deep_copy()
        self._taken: list[int] = []
        self._check(matcher)

    def allowed(self, answer: Sequence[int]) -> torch.Tensor:
        """[vocab] bool: the tokens that may follow ``answer``. Ends of text are among them where the form is met.
        Raises GrammarError where ``answer`` left the form, or the form grew too complex."""
        self._follow(list(answer))
        bias = bytearray(self._matcher.compute_logit_bias())
        self._check(self._matcher)
        allowed = torch.frombuffer(bias, dtype=torch.uint8)[: self._vocab].bool()
        if not bool(allowed.any()):
            raise GrammarError(self._form, "no token of this vocabulary may follow")
        return allowed

    def _follow(self, answer: list[int]) -> None:
        """Brings the matcher to ``answer``: from where it stands, or from the start where that was taken back."""
        if self._taken != answer[: len(self._taken)]:
            self._matcher, self._taken = self._start.deep_copy(), []
        for token in answer[len(self._taken) :]:
            if not self._matcher.consume_token(token):
                at, self._matcher, self._taken = len(self._taken), self._start.deep_copy(), []
                raise GrammarError(self._form, f"token {token} does not fit at {at} of the answer")
            self._taken.append(token)

    def _check(self, matcher: llguidance.LLMatcher) -> None:
        if matcher.is_error():
            raise GrammarError(self._form, matcher.get_error().partition("<state>")[0].strip()[:300])
