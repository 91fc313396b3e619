"""What guessing brings on this machine: the same answers with and without it, in turn, by an engine over a whole model.

One prompt repeats itself and is answered greedily; one is random and answered at temperature 1, so that there is next
to nothing to guess from and only the price of trying shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from model_shards.bench_decode import CHUNK_TOKENS
from model_shards.checkpoint import CheckpointIndex
from model_shards.config import ModelConfig
from model_shards.draft import Draft
from model_shards.engine import Engine
from model_shards.errors import ConfigError, LocalFault
from model_shards.sampler import Sampling
from model_shards.span import load_span
from model_shards.speculate import Guesser, Pace, PromptLookup, Speculation
from model_shards.steps import Step

GUESSERS = ("lookup", "draft")
ROUNDS = 5
PHRASE_TOKENS = 16
TASKS = {"repetitive": Sampling(temperature=0), "random": Sampling(temperature=1.0, seed=7)}


def bench_speculation(
    directory: Path,
    guesser: str,
    *,
    draft: Path | None = None,
    dtype: str = "bfloat16",
    quant: str = "none",
    device: str = "cpu",
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    rows: int = 8,
) -> dict[str, float]:
    """For each task ``.._tokens_per_s`` with guesses, ``.._without`` them (medians of rounds in turn), ``.._right``,
    the share of guesses that were, and ``.._passes`` for ``new_tokens`` tokens. ``guesser`` is "lookup", or "draft"
    with the model in ``draft``. Raises ModelError; LocalFault where guesses changed a text."""
    if guesser not in GUESSERS or (guesser == "draft") != (draft is not None):
        raise ConfigError("speculate", guesser, "lookup, or draft with a draft model")
    room = prompt_tokens + new_tokens
    engine = _engine(directory, room, dtype, quant, device)
    small = _engine(draft, room, dtype, quant, device) if draft is not None else None
    generator = torch.Generator().manual_seed(1)
    many = torch.randint(0, engine.span.config.vocab, (prompt_tokens,), generator=generator).tolist()
    prompts = {"repetitive": (many[:PHRASE_TOKENS] * prompt_tokens)[:prompt_tokens], "random": many}
    figures: dict[str, float] = {}
    for task, sampling in TASKS.items():
        runs = [
            _run(engine, small, guesser if at % 2 else "", prompts[task], new_tokens, sampling, rows)
            for at in range(2 * ROUNDS + 2)
        ][2:]
        if any(run[0] != runs[0][0] for run in runs):
            raise LocalFault("guesses changed a text")
        without, guessing = runs[::2], runs[1::2]
        figures[f"{task}_tokens_per_s"] = new_tokens / statistics.median(run[1] for run in guessing)
        figures[f"{task}_without"] = new_tokens / statistics.median(run[1] for run in without)
        told = [run[2] for run in guessing]
        figures[f"{task}_right"] = sum(one.right for one in told) / max(1, sum(one.guessed for one in told))
        figures[f"{task}_passes"] = statistics.median(run[3] for run in guessing)
    return figures


def _engine(directory: Path, room: int, dtype: str, quant: str, device: str) -> Engine:
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    span = load_span(directory, index, config, 0, config.layers, device=device, dtype=dtype, quant=quant)
    rows = -(-room // 16) * 16 * config.layers
    return Engine(span, kv_bytes_max=rows * config.kv_elements * span.dtype.itemsize)


def _run(
    engine: Engine,
    small: Engine | None,
    guesser: str,
    prompt: Sequence[int],
    new_tokens: int,
    sampling: Sampling,
    rows: int,
) -> tuple[list[int], float, Speculation, int]:
    """(tokens, seconds after the first one, what became of guesses, passes)."""
    room = len(prompt) + new_tokens
    engine.open("s", 0, engine.span.config.layers, room)
    made: list[int] = []
    for at in range(0, len(prompt), CHUNK_TOKENS):
        piece = tuple(prompt[at : at + CHUNK_TOKENS])
        asked = sampling if at + CHUNK_TOKENS >= len(prompt) else None
        token = engine.run([Step("s", at, piece, sample=asked)])[0].token
    made.append(token or 0)
    draft = None
    guesses: Guesser = PromptLookup(prompt)
    if guesser == "draft" and small is not None:
        vocab = engine.span.config.vocab
        guesses = draft = Draft(small, "s", room, sampling, vocab, prompt)
    speculation = Speculation(guesses, Pace(rows if guesser else 1))
    speculation.read(made)
    passes, began = 0, time.perf_counter()
    while len(made) < new_tokens:
        asked_s = time.perf_counter()
        window = speculation.next(new_tokens - len(made))
        step = Step("s", len(prompt) + len(made) - 1, window.tokens, sample=sampling)
        step.window = window if window.rows > 1 else None
        result = engine.run([step])[0]
        tokens = [token.token for token in result.verdict.picks] if result.verdict else [result.token or 0]
        speculation.came(tokens, time.perf_counter() - asked_s)
        made += tokens
        passes += 1
    took_s = time.perf_counter() - began
    engine.close("s")
    if draft is not None:
        draft.close()
    return made, took_s, speculation, passes
