"""What a load test asks (requests from a trace, or of one size), and the figures of what came back."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.errors import UsageProblem

# Token ids that every vocabulary has; single bytes in most.
LOWEST_TOKEN, TOKENS = 10, 200
HASHED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: sent `at_s` seconds after the start (None: as soon as a client is free)."""

    at_s: float | None
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one. Times in seconds; `problem` is empty where it was answered to the end."""

    ttft_s: float | None
    total_s: float
    tokens: int
    problem: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first."""
        if self.ttft_s is None or self.tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.tokens - 1)


def uniform(requests: int, prompt_tokens: int, new_tokens: int, seed: int) -> list[Planned]:
    """`requests` of one size with prompts that share nothing."""
    return [Planned(None, _prompt((seed, number), prompt_tokens), new_tokens) for number in range(requests)]


def traced(
    path: Path, requests: int, context_tokens: int, speed: float, seed: int
) -> tuple[list[Planned], int]:
    """The first `requests` of a trace and how many of them were cut to the model's context.

    Two forms are read: Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`) and Mooncake's JSON lines (`timestamp`
    in ms, `input_length`, `output_length`, and `hash_ids`, one for each 512 tokens: equal ones stand for equal text).
    Pauses are divided by `speed`. Raises UsageProblem with the entry that is wrong.
    """
    planned, cut = [], 0
    first_s: float | None = None
    for number, (at_s, prompt_tokens, new_tokens, hashes) in enumerate(islice(_lines(path), requests)):
        first_s = at_s if first_s is None else first_s
        new = max(1, min(new_tokens, context_tokens // 2))
        kept = max(1, min(prompt_tokens, context_tokens - new))
        cut += kept < prompt_tokens or new < new_tokens
        blocks = hashes or [(number << 20) + block for block in range(math.ceil(kept / HASHED_TOKENS))]
        prompt = [token for block in blocks for token in _prompt((seed, block), HASHED_TOKENS)][:kept]
        planned.append(Planned((at_s - first_s) / speed, tuple(prompt), new))
    if not planned:
        raise UsageProblem(f"{path} holds no requests")
    return planned, cut


def _lines(path: Path) -> Iterator[tuple[float, int, int, list[int]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: Iterator[Any] = map(json.loads, file) if path.suffix == ".jsonl" else csv.DictReader(file)
            for number, row in enumerate(rows, 1):
                try:
                    yield _entry(row)
                except (KeyError, TypeError, ValueError) as problem:
                    raise UsageProblem(f"{path}: entry {number} is not of a trace: {problem!r}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise UsageProblem(f"{path} cannot be read as a trace: {problem}") from None


def _entry(row: dict[str, Any]) -> tuple[float, int, int, list[int]]:
    if "TIMESTAMP" in row:
        # Azure writes seven digits of a second, of which Python reads six.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        return at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]), []
    hashes = [int(one) for one in row.get("hash_ids", ())]
    return float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), hashes


def _prompt(key: tuple[int, int], tokens: int) -> tuple[int, ...]:
    """Tokens that follow from the key alone: a linear congruential generator."""
    state = (key[0] * 1_000_003 + key[1]) & 0xFFFFFFFF
    found = []
    for _ in range(tokens):
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        found.append(LOWEST_TOKEN + (state >> 16) % TOKENS)
    return tuple(found)


def figures(seen: Sequence[Seen], wall_s: float) -> dict[str, Any]:
    """The figures of a run, JSON-able. Times in ms; None where nothing was measured."""
    whole = [one for one in seen if not one.problem]
    tokens = sum(one.tokens for one in whole)
    failures: dict[str, int] = {}
    for one in seen:
        if one.problem:
            failures[one.problem] = failures.get(one.problem, 0) + 1
    return {
        "requests": len(seen),
        "failures": len(seen) - len(whole),
        "failed_by": failures,
        "wall_s": round(wall_s, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / wall_s, 2) if wall_s > 0 else None,
        "ttft_ms": _spread([one.ttft_s for one in whole]),
        "tpot_ms": _spread([one.tpot_s for one in whole]),
        "total_ms": _spread([one.total_s for one in whole]),
    }


def _spread(times_s: Sequence[float | None]) -> dict[str, float | None]:
    found = sorted(time for time in times_s if time is not None)

    def at(share: float) -> float | None:
        return None if not found else round(1e3 * found[math.ceil(share * len(found)) - 1], 2)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}
