"""Token events become text: whole characters, no stop strings, the right end."""

from __future__ import annotations

import pytest

from node.gateway import TokenEvent
from node.text import Piece, TextStream

EOS = 256


def play(stream: TextStream, tokens, finish_last=None) -> list[Piece]:
    pieces = []
    for index, token in enumerate(tokens):
        finish = "stop" if token == EOS else None
        if index == len(tokens) - 1 and finish is None:
            finish = finish_last
        pieces.append(stream.push(TokenEvent(token, index, None, finish)))
        if pieces[-1].finish:
            break
    return pieces


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("text", ["plain", "né", "✓✓", "a👋b", ""])
def test_text_comes_in_whole_characters(byte_tokenizer, text) -> None:
    pieces = play(TextStream(byte_tokenizer, (), 100), [*text.encode(), EOS])
    assert joined(pieces) == text
    assert "\ufffd" not in joined(pieces)
    assert all(len(piece.text) <= 1 for piece in pieces)
    assert (pieces[-1].finish, pieces[-1].tokens) == ("stop", len(text.encode()) + 1)


@pytest.mark.parametrize(
    ("stops", "shown", "finish"),
    [
        (("cd",), "ab", "stop"),
        (("abcdef",), "", "stop"),
        (("f",), "abcde", "stop"),
        (("cx", "de"), "abc", "stop"),
        (("e", "cde"), "ab", "stop"),
        (("é",), "abcdefgh", "length"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_shown(byte_tokenizer, stops, shown, finish) -> None:
    pieces = play(TextStream(byte_tokenizer, stops, 100), [*b"abcdefgh"], "length")
    assert (joined(pieces), pieces[-1].finish) == (shown, finish)


def test_the_beginning_of_a_stop_string_is_held_back_then_shown(byte_tokenizer) -> None:
    stream = TextStream(byte_tokenizer, ("cde",), 100)
    pieces = play(stream, [*b"abcdx"], None)
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "cdx"]


@pytest.mark.parametrize("end", [[EOS], []])
def test_what_is_held_back_is_shown_at_the_end(byte_tokenizer, end) -> None:
    pieces = play(TextStream(byte_tokenizer, ("cde",), 100), [*b"abcd", *end], "length")
    assert joined(pieces) == "abcd"
    assert pieces[-1].finish == ("stop" if end else "length")


def test_an_incomplete_character_at_the_end_is_shown_as_such(byte_tokenizer) -> None:
    pieces = play(TextStream(byte_tokenizer, (), 100), ["é".encode()[0]], "length")
    assert joined(pieces) == "\ufffd"


def test_a_stop_string_completed_by_the_very_end_counts(byte_tokenizer) -> None:
    pieces = play(TextStream(byte_tokenizer, ("a\ufffd",), 100), [ord("a"), "é".encode()[0]], "length")
    assert (joined(pieces), pieces[-1].finish) == ("", "stop")


def test_max_tokens_is_kept_even_where_the_events_run_on(byte_tokenizer) -> None:
    pieces = play(TextStream(byte_tokenizer, (), 3), [*b"abcdef"])
    assert (joined(pieces), pieces[-1].finish, len(pieces)) == ("abc", "length", 3)


def test_an_end_token_that_is_ignored_goes_on(byte_tokenizer) -> None:
    stream = TextStream(byte_tokenizer, (), 10)
    assert stream.push(TokenEvent(EOS, 0, None, None)).finish is None
    assert stream.push(TokenEvent(ord("a"), 1, None, None)).text == "a"


def test_nothing_is_taken_after_the_end(byte_tokenizer) -> None:
    stream = TextStream(byte_tokenizer, (), 10)
    stream.push(TokenEvent(EOS, 0, None, "stop"))
    with pytest.raises(ValueError, match="already ended"):
        stream.push(TokenEvent(97, 1, None, None))


def test_tokens_are_told_with_their_text_and_those_of_a_stop_string_never(byte_tokenizer) -> None:
    pieces = play(TextStream(byte_tokenizer, ("stop",), 100), [*"xést stop".encode()], "length")
    told = [bytes(event.token for event in piece.events).decode() for piece in pieces]
    assert told == [piece.text for piece in pieces]
    assert "".join(told) == "xést "
    stream = TextStream(byte_tokenizer, (), 2)
    pieces = [stream.push(TokenEvent(97, at, -0.25, None)) for at in range(2)]
    assert stream.logprob == -0.5
