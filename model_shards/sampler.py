"""From logits to a token. Randomness is a pure function of (seed, position, index), so that a replaced stage
repeats it.

Filters apply in the usual order: temperature, top_k, top_p. The token is found by inverting the cumulative
distribution at one uniform number, in float64. Knows nothing of sessions.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import torch

from model_shards.errors import SamplingError

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request picks tokens. temperature 0 is greedy; top_p 1 and top_k 0 filter nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_p", self.top_p, 0.0, 1.0)
        _require("top_k", self.top_k, 0, 1 << 30)
        _require("seed", self.seed, -(1 << 63), (1 << 64) - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def _require(field: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise SamplingError(field, value, f"from {low:g} to {high:g}")


def uniform(seed: int, position: int, index: int = 0) -> float:
    """A number in [0, 1), the same wherever and whenever it is asked for."""
    counter = struct.pack("<QQQ", seed % (1 << 64), position, index)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"shoal-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def pick(logits: torch.Tensor, sampling: Sampling, position: int) -> tuple[int, float]:
    """(token, log-probability) from finite ``logits`` [vocab] float32. ``position`` is where the token will
    stand; the log-probability is the model's own, before temperature and filters."""
    if sampling.greedy:
        token = int(logits.argmax())
    else:
        token = _draw(logits.double() / sampling.temperature, sampling, uniform(sampling.seed, position))
    return token, float(logits[token].double() - torch.logsumexp(logits.double(), 0))


def _draw(scaled: torch.Tensor, sampling: Sampling, at: float) -> int:
    probabilities = torch.softmax(scaled, 0)
    if not sampling.top_k and sampling.top_p >= 1.0:
        return _invert(probabilities, at)
    # Ties are broken by token id (a stable sort), so that the choice is a function of the logits alone.
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    if sampling.top_p < 1.0:
        before = ordered.cumsum(0) - ordered
        kept = int((before < sampling.top_p * float(ordered.sum())).sum())
        ordered = ordered[: max(1, kept)]
    return int(ids[_invert(ordered, at)])


def _invert(weights: torch.Tensor, at: float) -> int:
    """The first index whose cumulative weight exceeds ``at`` of the whole; never one of weight zero."""
    cumulative = weights.cumsum(0)
    found = int(torch.searchsorted(cumulative, at * float(cumulative[-1]), right=True))
    return min(found, int(weights.nonzero()[-1]))
