"""A small model that guesses for a large one of the same vocabulary.

It draws by the very numbers that the large model's sampler will draw by, so that at any temperature the two agree
wherever their distributions nearly do. Knows nothing of the large model.
"""

from __future__ import annotations

from collections.abc import Sequence

from model_shards.engine import Engine
from model_shards.errors import ConfigError
from model_shards.sampler import Sampling
from model_shards.steps import Step
from model_shards.windows import Window

PIECE_TOKENS = 128


class Draft:
    """Guesses with ``engine``, which holds all of the small model; `close` gives its room back.

    ``sampling`` is how the large model chooses; forms and penalties are left to it. ``tokens_max`` bounds the text.
    Raises ConfigError where the vocabularies differ in size, NoRoom.
    """

    def __init__(
        self,
        engine: Engine,
        session: str,
        tokens_max: int,
        sampling: Sampling,
        vocab: int,
        tokens: Sequence[int] = (),
    ) -> None:
        config = engine.span.config
        if config.vocab != vocab:
            raise ConfigError("vocab_size", config.vocab, f"that of the model it guesses for, {vocab}")
        self._engine = engine
        self._session = session
        self._tokens_max = min(tokens_max, config.context_tokens)
        self._sampling = Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            index=sampling.index,
        )
        engine.open(session, 0, config.layers, self._tokens_max)
        self._text: list[int] = []
        self._read: list[int] = []
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """The text went on with ``tokens``."""
        self._text.extend(tokens)

    def guess(self, rows: int) -> Window:
        """A window of at most ``rows`` rows; of one row where the text outgrew the small model."""
        line = self._text[-1:]
        rows = min(rows, self._tokens_max - len(self._text) + 1)
        if rows < 2:
            return Window.line(line)
        self._catch_up()
        while len(line) < rows:
            token = self._step((line[-1],), sample=True)
            line.append(token)
        return Window.line(line)

    def close(self) -> None:
        """The small model's cache is free again."""
        self._engine.close(self._session)

    def _catch_up(self) -> None:
        """Reads all of the text but its last token; guesses that were right stay read."""
        same = 0
        for mine, theirs in zip(self._read, self._text[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        if same < len(self._read):
            self._engine.rewind(self._session, same)
            del self._read[same:]
        for first in range(same, len(self._text) - 1, PIECE_TOKENS):
            self._step(tuple(self._text[first : min(first + PIECE_TOKENS, len(self._text) - 1)]))

    def _step(self, tokens: tuple[int, ...], *, sample: bool = False) -> int:
        asked = self._sampling if sample else None
        step = Step(self._session, len(self._read), tokens, sample=asked)
        token = self._engine.run([step])[0].token
        self._read.extend(tokens)
        return token if token is not None else 0
