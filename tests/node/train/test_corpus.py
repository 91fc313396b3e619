"""Texts to tokens on disk, and who draws which samples."""

import json

import numpy as np
import pytest

from node.errors import ConfigProblem
from node.train.corpus import LANES, Corpus, byte_tokenizer, open_corpus, permuted, texts_of
from node.train.recipe import DataRecipe


def made(tokens, sequence=8):
    return Corpus(np.arange(tokens, dtype=np.uint32), np.arange(0), tokens, None, "", sequence)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_a_permutation_of_any_size(size):
    values = np.arange(size, dtype=np.uint64)
    first, other = permuted(values, size, 7), permuted(values, size, 8)
    assert sorted(first.tolist()) == sorted(other.tolist()) == list(range(size))
    assert size < 64 or first.tolist() != other.tolist()


def test_no_window_is_drawn_twice_within_a_pass_whoever_draws_it():
    corpus = made(64 * LANES + 100)
    windows = (len(corpus.train) - 9) // 8
    each = windows // LANES
    drawn = np.concatenate([corpus.starts(3, claim, np.arange(each)) for claim in range(LANES)])
    assert len(np.unique(drawn)) == len(drawn) == each * LANES
    assert len(np.unique(drawn % 8)) == 1  # windows of one grid do not overlap
    again = np.concatenate([corpus.starts(3, claim, np.arange(each, 2 * each)) for claim in range(LANES)])
    assert len(np.unique(again)) == each * LANES
    assert set(again.tolist()) != set(drawn.tolist())


def test_what_a_claim_draws_depends_on_nothing_else():
    corpus = made(4000)
    whole = [corpus.batch(1, 5, index, 3) for index in range(6)]
    assert whole[4].equal(corpus.batch(1, 5, 4, 3))
    rows = np.concatenate([one.numpy() for one in whole])
    assert (np.diff(rows) == 1).all()
    assert rows.max() < 4000
    assert not corpus.batch(2, 5, 4, 3).equal(whole[4])
    assert not corpus.batch(1, 5 + LANES, 4, 3).equal(whole[4])


def test_too_little_text_is_said():
    with pytest.raises(ConfigProblem, match="expected at least 521 of them"):
        made(500).batch(1, 0, 0, 1)
    with pytest.raises(ConfigProblem, match="5 training tokens"):
        made(5).batch(1, 0, 0, 1)
    assert made(521).batch(1, 0, 0, 1).shape == (1, 9)


def test_texts_of_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n\n{"body": "three"}\n')
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert list(texts_of(files, "body")) == ["one\n", "two", "three"]
    with pytest.raises(ConfigProblem, match=r"line 1.*a text under 'text'"):
        list(texts_of(files, "text"))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigProblem, match="UTF-8"):
        list(texts_of([tmp_path / "c.txt"], "text"))
    with pytest.raises(ConfigProblem, match="a readable file"):
        list(texts_of([tmp_path / "absent.txt"], "text"))


def test_texts_of_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert list(texts_of([path], "text")) == ["one", "two"]
    with pytest.raises(ConfigProblem, match="one of text, n"):
        list(texts_of([path], "body"))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigProblem, match="a parquet file"):
        list(texts_of([path], "text"))


def test_bytes_are_tokens_and_a_text_ends_with_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("zwölf")
    corpus = open_corpus(DataRecipe((tmp_path / "a.txt",), validation=0.0, sequence=2), tmp_path / "cache")
    assert corpus.train.tolist() == [*"zwölf".encode(), 256]
    assert (corpus.vocab, corpus.end_id) == (257, 256)
    backend = byte_tokenizer()
    assert backend.encode("zwölf").ids == list("zwölf".encode())
    assert backend.decode(list("zwölf\n".encode())) == "zwölf\n"


def test_characters_are_tokens(corpus, text):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(corpus.tokenizer_json)
    whole = [*corpus.train.tolist(), *corpus.held_out.tolist()]
    assert backend.decode(whole[:40]) == text[:40]
    assert backend.encode(text[:40]).ids == whole[:40]
    assert len(corpus.held_out) == len(text) // 10
    assert corpus.windows_held_out(5).shape == (5, 9)


def test_a_model_directory_gives_its_own_tokens(tmp_path):
    from node.embedded import path

    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 3)
    recipe = DataRecipe((tmp_path / "a.txt",), tokenizer=str(path()), validation=0.0, sequence=2)
    corpus = open_corpus(recipe, tmp_path / "cache")
    assert corpus.vocab == 4096
    assert corpus.train[-1] == corpus.end_id == 0


def test_it_is_tokenised_once_and_again_when_a_file_changes_or_the_tokens_are_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one two three")
    recipe = DataRecipe((path,), validation=0.0, sequence=2)
    open_corpus(recipe, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("node.train.corpus.texts_of", lambda *_: pytest.fail("it was tokenised before"))
        assert len(open_corpus(recipe, tmp_path / "cache").train) == 14
    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ConfigProblem, match="damaged"):
        open_corpus(recipe, tmp_path / "cache")
    assert len(open_corpus(recipe, tmp_path / "cache").train) == 14
    path.write_text("four")
    assert len(open_corpus(recipe, tmp_path / "cache").train) == 5
    assert json.loads((folder / "corpus.json").read_text())["tokens"] == 14
