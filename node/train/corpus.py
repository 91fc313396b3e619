"""A run's text as tokens on disk, and which of them each worker trains on at each step.

Files are tokenised once into one memory-mapped array beside a manifest that is written last. Samples are windows of the
training share: a pass cuts it at an offset of its own and deals the windows, by a keyed permutation, to the
`LANES` lanes. A worker's claim names its lane, so that what it draws is a function of (seed, claim, index) alone, and
members with different claims never meet the same window within a pass, whoever joined or died meanwhile. It knows
nothing of models or rounds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch

from model_shards import Tokenizer
from node.errors import ConfigProblem
from node.train.recipe import DataRecipe

LANES = 64
PIECE_CHARS = 1 << 20
END_OF_TEXT = "<|endoftext|>"
MANIFEST = "corpus.json"
TOKENS = "tokens.bin"
_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens of all files, one behind another. `train` and `held_out` are memory-mapped, of uint16 or uint32."""

    train: npt.NDArray[Any]
    held_out: npt.NDArray[Any]
    vocab: int
    end_id: int | None
    tokenizer_json: str
    sequence: int

    def batch(self, seed: int, claim: int, index: int, rows: int) -> torch.Tensor:
        """int64 [rows, sequence + 1]: samples [index * rows, (index + 1) * rows) of this claim."""
        starts = self.starts(seed, claim, np.arange(index * rows, (index + 1) * rows, dtype=np.int64))
        picked = self.train[starts[:, None] + np.arange(self.sequence + 1)]
        return torch.from_numpy(picked.astype(np.int64))

    def starts(self, seed: int, claim: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the windows of these samples of the claim begin, in tokens from the first training token. Claims below
        LANES never share a window within a pass; further ones are dealt again from other orders."""
        # One offset's worth less than there are, so that each pass has as many windows.
        windows = (len(self.train) - self.sequence - 1) // self.sequence
        each = windows // LANES
        if each < 1:
            need = (LANES + 1) * self.sequence + 1
            raise ConfigProblem(
                "data.files", f"{len(self.train)} training tokens", f"at least {need} of them"
            )
        passes, within = np.divmod(samples, each)
        lane, deck = claim % LANES, claim // LANES
        found = np.empty(len(samples), np.int64)
        for number in np.unique(passes):
            key = _key(seed, deck, int(number))
            chosen = passes == number
            order = permuted((within[chosen] * LANES + lane).astype(np.uint64), windows, key)
            found[chosen] = order.astype(np.int64) * self.sequence + key % self.sequence
        return found

    def windows_held_out(self, most: int) -> torch.Tensor:
        """int64 [n, sequence + 1], at most `most` windows, evenly spread over the held-out share; [0, ...] if it is
        too short."""
        count = max(0, (len(self.held_out) - 1) // self.sequence)
        picks = np.unique(np.linspace(0, max(0, count - 1), min(most, count)).astype(np.int64))
        starts = picks[:, None] * self.sequence + np.arange(self.sequence + 1)
        return torch.from_numpy(self.held_out[starts].astype(np.int64))


def _key(seed: int, deck: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{deck}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permuted(values: U64, size: int, key: int) -> U64:
    """Where a permutation of [0, size) takes `values`: a Feistel network over the next power of four, walked until it
    falls within (Black and Rogaway 2002), so that no table of the size is needed."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = values.copy()
    left = np.ones(len(values), bool)
    while left.any():
        found[left] = _feistel(found[left], half, mask, key)
        left = found >= size
    return found


def _feistel(values: U64, half: np.uint64, mask: np.uint64, key: int) -> U64:
    high, low = values >> half, values & mask
    with np.errstate(over="ignore"):
        for number in range(_ROUNDS):
            salt = np.uint64((key + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
            mixed = (low + salt) * _MIX[0]
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[1]
            high, low = low, high ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return (high << half) | low


# ---- from files to tokens


def open_corpus(recipe: DataRecipe, cache: Path) -> Corpus:
    """The corpus of these files, tokenised into a folder of `cache` unless it is there already. A folder that a killed
    process left half-made is made anew. Raises ConfigProblem for files that cannot be read."""
    return read_corpus(tokenised(recipe, cache), recipe)


def tokenised(recipe: DataRecipe, cache: Path) -> Path:
    """The folder of `cache` that holds the tokens of these files, made unless it is there."""
    folder = cache / _fingerprint(recipe)
    if not (folder / MANIFEST).is_file():
        _tokenise(recipe, folder)
    return folder


def read_corpus(folder: Path, recipe: DataRecipe) -> Corpus:
    """The corpus whose tokens are in `folder`. Raises ConfigProblem for a damaged one."""
    manifest = folder / MANIFEST
    values = json.loads(manifest.read_text())
    if values["dtype"] not in ("<u2", "<u4"):  # another member may have written it
        raise ConfigProblem("corpus.json: dtype", values["dtype"], "<u2 or <u4")
    tokens = np.memmap(folder / TOKENS, np.dtype(values["dtype"]), "r")
    if len(tokens) != values["tokens"]:
        manifest.unlink()
        raise ConfigProblem("data.files", f"{folder} is damaged", "another start: it will be tokenised again")
    held = int(len(tokens) * recipe.validation)
    return Corpus(
        tokens[: len(tokens) - held],
        tokens[len(tokens) - held :],
        values["vocab"],
        values["end_id"],
        values["tokenizer"],
        recipe.sequence,
    )


def _fingerprint(recipe: DataRecipe) -> str:
    """Names what the tokens depend on: the files as they are now, column and tokenizer."""
    seen = hashlib.blake2b(digest_size=12)
    for path in recipe.files:
        try:
            stat = path.stat()
        except OSError as error:
            raise ConfigProblem("data.files", str(path), f"a readable file ({error.strerror})") from None
        seen.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    seen.update(f"{recipe.column}\0{recipe.tokenizer}".encode())
    if recipe.tokenizer not in ("bytes", "chars"):
        seen.update((Path(recipe.tokenizer) / "tokenizer.json").read_bytes())
    return seen.hexdigest()


def _tokenise(recipe: DataRecipe, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend, end_id = _tokenizer(recipe)
    vocab = int(backend.get_vocab_size(with_added_tokens=True))
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    count = 0
    partial = folder / (TOKENS + ".partial")
    with partial.open("wb") as out:
        for text in texts_of(recipe.files, recipe.column):
            for ids in _encoded(backend, recipe.tokenizer, text):
                count += len(ids)
                out.write(ids.astype(dtype).tobytes())
            if end_id is not None:
                count += 1
                out.write(np.array([end_id], dtype).tobytes())
        out.flush()
        os.fsync(out.fileno())
    if count == 0:
        raise ConfigProblem("data.files", ", ".join(map(str, recipe.files[:3])), "files that hold some text")
    os.replace(partial, folder / TOKENS)
    values = {
        "dtype": dtype.str,
        "tokens": count,
        "vocab": vocab,
        "end_id": end_id,
        "tokenizer": str(backend.to_str()),
    }
    written = folder / (MANIFEST + ".partial")
    written.write_text(json.dumps(values))
    os.replace(written, folder / MANIFEST)


def _tokenizer(recipe: DataRecipe) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer, and the token that ends a text, if it has one."""
    if recipe.tokenizer == "bytes":
        return byte_tokenizer(), 256
    if recipe.tokenizer == "chars":
        found: set[str] = set()
        for text in texts_of(recipe.files, recipe.column):
            found.update(text)
        return character_tokenizer(sorted(found)), None
    directory = Path(recipe.tokenizer)
    model = Tokenizer.from_dir(directory)
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), next(iter(model.eos_ids), None)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token n is the byte n; 256 ends a text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    # GPT-2's table of a printable character for each byte: printable ones stand for themselves, the others follow.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return backend


def character_tokenizer(characters: Sequence[str]) -> tokenizers.Tokenizer:
    """Token n is the n-th character. What is none of them gives nothing."""
    from tokenizers import Regex, decoders, models, pre_tokenizers

    vocab = {character: at for at, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(
        models.WordLevel(vocab=vocab, unk_token=characters[0] if characters else "")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _encoded(backend: tokenizers.Tokenizer, kind: str, text: str) -> Iterator[npt.NDArray[Any]]:
    """Token ids of `text`, in pieces."""
    if kind == "bytes":
        yield np.frombuffer(text.encode(), np.uint8)
        return
    if kind == "chars":
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = np.array(sorted(map(ord, backend.get_vocab())), np.uint32)
        yield np.searchsorted(known, points)
        return
    for piece in _pieces(text):
        yield np.array(backend.encode(piece, add_special_tokens=False).ids, np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Cut at ends of lines, so that a tokenizer need not hold all of a large file."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            line = text.rfind("\n", start, end)
            end = line + 1 if line > start else end
        yield text[start:end]
        start = end


def texts_of(files: Iterable[Path], column: str) -> Iterator[str]:
    """Each text of the files: a whole file, or a row's `column` of jsonl and parquet. Raises ConfigProblem."""
    for path in files:
        kind = path.suffix.lower()
        try:
            if kind in (".jsonl", ".ndjson"):
                yield from _json_texts(path, column)
            elif kind == ".parquet":
                yield from _parquet_texts(path, column)
            else:
                yield path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigProblem("data.files", str(path), f"a readable file ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ConfigProblem(
                "data.files", str(path), f"text in UTF-8 ({error.reason} at {error.start})"
            ) from None


def _json_texts(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ConfigProblem(
                    "data.files",
                    f"{path}, line {number}",
                    f"a JSON object with a text under {column!r} (data.column)",
                )
            yield row[column]


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # ArrowInvalid is one
        raise ConfigProblem("data.files", str(path), f"a parquet file ({error})") from None
    with file:
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ConfigProblem("data.column", column, f"a column of {path.name}: one of {names}")
        for rows in file.iter_batches(columns=[column]):
            for text in rows.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
