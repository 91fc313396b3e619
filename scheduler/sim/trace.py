"""Requests to replay: Azure's CSV, Mooncake's JSONL, or synthetic Poisson arrivals with lognormal lengths.

A trace becomes a list of asks by time. Files are read by the path given; none is part of the package. What a line
must be is said in the error when it is not.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scheduler.errors import InputError
from scheduler.shapes import ModelShape
from scheduler.sim.config import Load

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BLOCK_TOKENS = 512
"""Tokens that a hash of a Mooncake trace stands for, with all that come before them."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when it comes, how many tokens go in and come out, and the hashes of the prompt's whole blocks."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


def asks(load: Load, model: ModelShape, until_s: float, seed: int) -> list[Ask]:
    """The requests before `until_s`, by time; those longer than the model's context are cut to it.

    A trace shorter than `until_s` is played again from its beginning.
    """
    found: list[Ask] = []
    source = _synthetic(load, seed) if load.trace is None else _again(_read(Path(load.trace), load))
    for ask in source:
        if ask.at_s >= until_s or len(found) >= load.requests_max:
            break
        answer = max(1, min(ask.answer_tokens, model.context_tokens // 2))
        prompt = max(1, min(ask.prompt_tokens, model.context_tokens - answer))
        found.append(Ask(ask.at_s, prompt, answer, ask.blocks[: prompt // BLOCK_TOKENS]))
    return found


def _synthetic(load: Load, seed: int) -> Iterator[Ask]:
    rng = random.Random(f"{seed}/load")
    now = 0.0
    while True:
        now += rng.expovariate(load.requests_per_s * load.speed)
        prompt = load.prompt_median_tokens * rng.lognormvariate(0.0, load.sigma)
        yield Ask(now, round(prompt), round(load.answer_median_tokens * rng.lognormvariate(0.0, load.sigma)))


def _again(once: list[Ask]) -> Iterator[Ask]:
    if not once:
        raise InputError("trace", "no requests", "a file with at least one request")
    length_s = once[-1].at_s + 1.0
    offset_s = 0.0
    while True:
        for ask in once:
            yield Ask(ask.at_s + offset_s, ask.prompt_tokens, ask.answer_tokens, ask.blocks)
        offset_s += length_s


def _read(path: Path, load: Load) -> list[Ask]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _mooncake(file) if path.suffix == ".jsonl" else _azure(file)
            found = sorted(rows)
    except OSError as problem:
        raise InputError("trace", str(path), f"a file that can be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("trace", str(path), "a text file in UTF-8") from None
    first_s = found[0][0] if found else 0.0
    return [Ask((row[0] - first_s) / load.speed, *row[1:]) for row in found]


Row = tuple[float, int, int, tuple[int, ...]]


def _azure(lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.DictReader(lines)
    if not set(AZURE_COLUMNS) <= set(reader.fieldnames or ()):
        raise InputError("trace", reader.fieldnames, "a CSV with the columns " + ", ".join(AZURE_COLUMNS))
    for number, row in enumerate(reader, 2):
        try:
            # Seven digits of a second; the standard library reads six.
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()
        except (TypeError, ValueError):
            raise InputError(
                f"trace line {number}", list(row.values()), "a time and two whole numbers"
            ) from None


def _mooncake(lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at_s, prompt, answer = float(row["timestamp"]) / 1000.0, row["input_length"], row["output_length"]
            yield at_s, int(prompt), int(answer), tuple(int(each) for each in row.get("hash_ids", ()))
        except (TypeError, ValueError, KeyError):
            right = "an object with timestamp (ms), input_length and output_length"
            raise InputError(f"trace line {number}", line.strip(), right) from None
