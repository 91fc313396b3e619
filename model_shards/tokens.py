"""Text to tokens and back: the tokenizer of a model directory, and incremental decoding.

Tokenising is the `tokenizers` library's; this file finds the special tokens, cuts streams of tokens at whole
UTF-8 characters and finds stop strings across token boundaries. Templates are `chat.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from model_shards.chat import ChatTemplate
from model_shards.errors import ConfigError, TokenizerError
from model_shards.fields import Fields, read_json_object
from model_shards.pieces import PieceReader

TOKENIZER_BYTES_MAX = 256 << 20
PENDING_TOKENS_MAX = 32
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of one model directory (tokenizer.json, tokenizer_config.json, chat_template.jinja)."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        specials: dict[str, str],
        template: ChatTemplate,
        eos_ids: Sequence[int],
    ) -> None:
        self._backend = backend
        self._specials = specials
        self._template = template
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self._pieces: PieceReader | None = None

    @classmethod
    def from_dir(cls, directory: Path) -> Tokenizer:
        """Reads a model directory. Raises TokenizerError (or ConfigError) naming the file."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError("tokenizer.json", f"missing from {directory}")
        if path.stat().st_size > TOKENIZER_BYTES_MAX:
            raise TokenizerError("tokenizer.json", f"larger than {TOKENIZER_BYTES_MAX} bytes")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise TokenizerError("tokenizer.json", f"cannot be used: {str(error)[:200]}") from error
        settings = _optional_json(directory / "tokenizer_config.json")
        specials = {name: text for name in _SPECIALS if (text := _token_text(settings.get(name))) is not None}
        eos_ids = list(generation_eos_ids(directory))
        if "eos_token" in specials and (found := backend.token_to_id(specials["eos_token"])) is not None:
            eos_ids.append(found)
        return cls(backend, specials, ChatTemplate.find(directory, settings), eos_ids)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it."""
        return str(self._backend.to_str())

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; the model's own vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of ``text``; ``add_special`` lets the tokenizer add its own, such as the beginning of
        text."""
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; ids outside the vocabulary give nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for by itself: a character may need the bytes of several. b"" for an unknown id."""
        if self._pieces is None:
            self._pieces = PieceReader(self._backend)
        return self._pieces.read(token)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, or None."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def chat_text(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt text of a conversation. Raises TokenizerError with what the template says."""
        values = {**self._specials, **extra}
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, values=values)

    def chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Token ids of a conversation. The template writes its own special tokens, so none are added."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **extra), add_special=False)


def generation_eos_ids(directory: Path) -> tuple[int, ...]:
    """End-of-text ids by generation_config.json and config.json together; () where neither names one."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found.update(Fields(_optional_json(directory / name)).integers("eos_token_id", 0, 1 << 31))
    return tuple(sorted(found))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    """A special token as tokenizer_config.json spells it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ConfigError("tokenizer_config.json token", value, "a string or an object with content")
    return value


class IncrementalDecoder:
    """Text of a growing stream of tokens, given out in whole UTF-8 characters.

    The parts joined equal ``decode`` of all tokens, minus what ``prompt`` (the tokens before the first)
    decodes to: a leading space that belongs between prompt and answer is kept.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoding starts a little before the unread tokens, for decoders that treat the first token apart.
        self._ids: list[int] = list(prompt[-8:])
        self._read = len(self._ids)
        self._before = self._tokenizer.decode(self._ids) if self._ids else ""

    def push(self, token: int) -> str:
        """The new text that is certain now; "" while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        waiting = len(self._ids) - self._read
        if len(text) <= len(self._before) or (text.endswith("\ufffd") and waiting < PENDING_TOKENS_MAX):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end of the stream, incomplete characters as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        return self._advance(text) if len(text) > len(self._before) else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._before = self._tokenizer.decode(self._ids)
        return new


class StopMatcher:
    """Finds stop strings in a stream of text pieces, however it is cut. The stop string itself is not given
    out.

    The stop that is complete first wins; text that could still begin one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to give out, whether a stop string was met). After a stop nothing more comes."""
        if self._stopped:
            return "", True
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, at = min(matches)
            safe, self._held, self._stopped = self._held[:at], "", True
            return safe, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def flush(self) -> str:
        """The text held back, now that no more will come."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """The longest proper beginning of ``stop`` that the held text ends with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
