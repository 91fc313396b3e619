"""From the pieces of a vocabulary, as their tokenizer spells them, to the bytes that they stand for.

Two spellings are in use: GPT-2's, where each byte is one printable character (openai/gpt-2, encoder.py), and
SentencePiece's, where U+2581 is a space and <0x0A> a byte that no piece has.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceReader:
    """The pieces of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {id_: token.content for id_, token in backend.get_added_tokens_decoder().items()}
        kinds = _kinds(json.loads(backend.to_str()).get("decoder"))
        self._by_byte = _bytes_of_characters() if "ByteLevel" in kinds else None

    def read(self, token: int) -> bytes:
        """b"" for an id that is not in the vocabulary."""
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._by_byte is not None:
            return b"".join(
                bytes([self._by_byte[char]]) if char in self._by_byte else char.encode() for char in piece
            )
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of those it is made of."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders") or ()))


def _bytes_of_characters() -> dict[str, int]:
    """Printable bytes stand for themselves; the others, in order, for the characters from U+0100 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
