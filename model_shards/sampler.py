"""From logits to a token. Randomness is a pure function of (seed, position, index): a replaced stage repeats
it.

In this order: logit bias, repetition penalty (arXiv 1909.05858), frequency and presence penalties (OpenAI's), the
form that a grammar allows, temperature, min_p (arXiv 2407.01082), top_k, top_p (arXiv 1904.09751). The token is found
by inverting the cumulative distribution at one uniform number, in float64. Knows nothing of sessions: what was said
before is an argument.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from model_shards.errors import SamplingError

GREEDY_BELOW = 1e-5
LOGIT_BIASES_MAX = 1024
TOP_LOGPROBS_MAX = 64
CANDIDATES = 512


class Allows(Protocol):
    """Says [vocab] bool which tokens may follow an answer's tokens so far; raises GrammarError."""

    def allowed(self, answer: Sequence[int]) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request picks tokens. temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 filter nothing.

    ``repetition_penalty`` weighs tokens of prompt and answer, the other two those of the answer alone;
    ``logit_bias`` adds to (token, bias) pairs; ``top_logprobs`` asks for that many likeliest tokens;
    ``grammar`` keeps the answer to a form; it belongs to one session.
    ``index`` tells apart the choices of one request (n, best-of).

    A session may not know all that was said: ``seen`` are tokens of the prompt, wherever they stand there, and
    ``answered`` is the beginning of the answer where another session made it, so that it stands in this one's prompt.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    index: int = 0
    grammar: Allows | None = field(default=None, compare=False)
    seen: frozenset[int] = frozenset()
    answered: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_p", self.top_p, 0.0, 1.0)
        _require("top_k", self.top_k, 0, 1 << 30)
        _require("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require("top_logprobs", self.top_logprobs, 0, TOP_LOGPROBS_MAX)
        _require("index", self.index, 0, 1 << 30)
        if len(self.logit_bias) > LOGIT_BIASES_MAX:
            raise SamplingError("logit_bias", f"{len(self.logit_bias)} tokens", f"at most {LOGIT_BIASES_MAX}")
        for token, bias in self.logit_bias:
            _require("logit_bias", bias, -100.0, 100.0)
            _require("logit_bias", token, 0, (1 << 31) - 1)
        for name, tokens in (("seen", self.seen), ("answered", self.answered)):
            if tokens:
                _require(name, min(tokens), 0, (1 << 31) - 1)
                _require(name, max(tokens), 0, (1 << 31) - 1)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def wants_history(self) -> bool:
        """Whether what was said before changes the choice."""
        penalties = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalties or self.repetition_penalty != 1.0 or self.grammar is not None


def _require(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise SamplingError(name, value, f"from {low:g} to {high:g}")


@dataclass(slots=True)
class Said:
    """The tokens of a session so far, of which the first ``prompt_tokens`` are its prompt; -1 where
    unknown."""

    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Pick:
    """A token, its natural log-probability, and the (token, log-probability) pairs asked for, likeliest
    first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int, index: int = 0) -> float:
    """A number in [0, 1), the same wherever and whenever it is asked for."""
    counter = struct.pack("<QQQ", seed % (1 << 64), position, index)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"shoal-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def pick(logits: torch.Tensor, sampling: Sampling, position: int, said: Said | None = None) -> Pick:
    """Picks from finite ``logits`` [vocab] float32. ``position`` is where the token will stand.
    Log-probabilities are the model's own, before bias, penalties, temperature and filters."""
    scores = _weighed(logits, sampling, said)
    if sampling.grammar is not None:
        allowed = sampling.grammar.allowed(_answer(sampling, said)).to(scores.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sampling.greedy:
        token = int(scores.argmax())
    else:
        at = uniform(sampling.seed, position, sampling.index)
        token = _draw(scores / sampling.temperature, sampling, at)
    whole = torch.logsumexp(logits, 0)
    top: tuple[tuple[int, float], ...] = ()
    if sampling.top_logprobs:
        values, ids = _likeliest(logits, min(sampling.top_logprobs, logits.shape[0]))
        top = tuple(zip(ids.tolist(), (values - whole).tolist(), strict=True))
    return Pick(token, float(logits[token] - whole), top)


def _weighed(logits: torch.Tensor, sampling: Sampling, said: Said | None) -> torch.Tensor:
    """Logits after bias and penalties; the given tensor is left alone."""
    history = said if sampling.wants_history else None
    if not sampling.logit_bias and history is None:
        return logits
    scores = logits.clone()
    if sampling.logit_bias:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        scores.index_add_(
            0, _ids(tokens, scores), torch.tensor(biases, dtype=scores.dtype, device=scores.device)
        )
    if history is None:
        return scores
    if sampling.repetition_penalty != 1.0:
        known = {token for token in history.tokens if token >= 0}
        seen = _ids(sorted(known.union(sampling.seen, sampling.answered)), scores)
        found = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(found > 0, found / penalty, found * penalty)
    counts = Counter(token for token in _answer(sampling, history) if token >= 0)
    if counts:
        times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores[_ids(list(counts), scores)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return scores


def _answer(sampling: Sampling, said: Said | None) -> list[int]:
    return [*sampling.answered, *(said.tokens[said.prompt_tokens :] if said is not None else ())]


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)


def _draw(scaled: torch.Tensor, sampling: Sampling, at: float) -> int:
    probabilities = torch.softmax(scaled, 0)
    if sampling.min_p:
        unlikely = probabilities < sampling.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(unlikely, 0.0)
        probabilities = probabilities / probabilities.sum()
    if not sampling.top_k and sampling.top_p >= 1.0:
        return _invert(probabilities, at)
    ordered, ids = _ordered(probabilities, sampling)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    if sampling.top_p < 1.0:
        upto = ordered.cumsum(0, dtype=torch.float64)
        kept = int((upto - ordered < sampling.top_p * float(upto[-1] if sampling.top_k else 1.0)).sum())
        ordered = ordered[: max(1, kept)]
    return int(ids[_invert(ordered, at)])


def _ordered(probabilities: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, ids), likeliest first, as many as the filters can keep: all only where few do not
    suffice."""
    size = probabilities.shape[0]
    few = min(size, sampling.top_k or CANDIDATES)
    values, ids = _likeliest(probabilities, few)
    if sampling.top_k or few == size or float(values.sum(dtype=torch.float64)) >= sampling.top_p:
        return values, ids
    return torch.sort(probabilities, descending=True, stable=True)


def _likeliest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest values and their ids in order; ties go by id, so that the choice depends on
    values alone."""
    least = torch.topk(scores, count).values[-1]
    ids = (scores >= least).nonzero().squeeze(1)
    values, order = torch.sort(scores[ids], descending=True, stable=True)
    return values[:count], ids[order][:count]


def _invert(weights: torch.Tensor, at: float) -> int:
    """The first index whose cumulative weight exceeds ``at`` of the whole; never one of weight zero."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    found = int(torch.searchsorted(cumulative, at * float(cumulative[-1]), right=True))
    return min(found, int(weights.nonzero()[-1]))
