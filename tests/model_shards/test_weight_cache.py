"""Weights quantised once are read from disk the next time, and never wrongly."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_shards import CheckpointIndex, LocalFault, ModelConfig, WeightCache, load_span
from model_shards.integers import PackedInt8

TOKENS = [1, 5, 42, 17, 90, 3, 3, 61, 28]
ROOM = 64 << 20


@pytest.fixture
def directory(make_reference, tmp_path):
    reference = make_reference("llama", hidden_size=64, intermediate_size=192)
    shutil.copytree(reference.directory, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path):
    return WeightCache(tmp_path / "cache", ROOM)


def load(directory, cache=None, start=0, end=4, **options):
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    return load_span(directory, index, config, start, end, cache=cache, **{"quant": "int4", **options})


def tensors_of(span):
    linears = [linear for layer in span.layers for linear in layer.linears()]
    weights = [linear.weight for linear in linears]
    weights += [span.embed_weight] if span.embed_weight is not None else []
    weights += [span.head.weight] if span.head is not None else []
    return [tensor for weight in weights for tensor in _held(weight)]


def _held(weight):
    if isinstance(weight, PackedInt8):
        return [weight.packed.to_dense(), weight.scale]
    return list(weight.tensors().values())


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True))


def entries(cache):
    return sorted(cache.directory.glob("*.safetensors"))


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_load_reads_no_matrix_and_gives_the_same_bits(directory, cache, quant, dtype):
    first = load(directory, cache, quant=quant, dtype=dtype)
    told = []
    second = load(
        directory, cache, quant=quant, dtype=dtype, progress=lambda done, total: told.append((done, total))
    )
    assert same(first, second)
    assert same(load(directory, None, quant=quant, dtype=dtype), second)
    norms = (4 * 2 + 1) * 64 * 4
    assert second.bytes_read == norms
    assert first.bytes_read == told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_entries_do_not_depend_on_where_the_layers_are_cut(directory, cache):
    load(directory, cache)
    count = len(entries(cache))
    for start, end in [(0, 1), (1, 3), (3, 4)]:
        assert load(directory, cache, start, end).bytes_read <= (2 * 2 + 1) * 64 * 4
    assert len(entries(cache)) == count == 4 * 4 + 2


def test_other_settings_are_other_entries(directory, cache):
    settings = list(itertools.product(["int8", "int4"], ["float32", "bfloat16", "float16"]))
    for quant, dtype in settings:
        load(directory, cache, quant=quant, dtype=dtype)
    for quant, dtype in settings:
        found = load(directory, cache, quant=quant, dtype=dtype)
        assert same(found, load(directory, None, quant=quant, dtype=dtype))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_source_is_never_answered_from_the_cache(directory, cache, in_place):
    load(directory, cache)
    path = directory / "model.safetensors"
    before = path.stat()
    changed = {name: -tensor for name, tensor in load_file(path).items()}
    save_file(changed, directory / "other", metadata={"format": "pt"})
    if in_place:
        path.write_bytes((directory / "other").read_bytes())
    else:
        (directory / "other").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert same(load(directory, cache), load(directory))


def test_a_callers_identity_counts_instead_of_the_files(directory, tmp_path):
    names = {"model.safetensors": "a hash"}
    cache = WeightCache(tmp_path / "cache", ROOM, identity=lambda path: names[path.name])
    first = load(directory, cache)
    os.utime(directory / "model.safetensors")
    assert load(directory, cache).bytes_read < first.bytes_read
    names["model.safetensors"] = "another"
    assert load(directory, cache).bytes_read == first.bytes_read


TEARS = {
    "empty": lambda data, other: b"",
    "cut in the header": lambda data, other: data[:40],
    "cut in the data": lambda data, other: data[:-100],
    "longer": lambda data, other: data + b"x",
    "a byte of data": lambda data, other: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
    "a byte of the hash": lambda data, other: data[:-1] + bytes([data[-1] ^ 1]),
    "another entry": lambda data, other: other,
    "zeros of the same length": lambda data, other: bytes(len(data)),
    "text": lambda data, other: b"not ours at all" * 50,
    "an enormous header": lambda data, other: (1 << 26).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_or_foreign_entry_counts_as_absent_and_is_made_again(directory, cache, caplog, tear):
    load(directory, cache)
    found = {path: path.read_bytes() for path in entries(cache)}
    for path, data in found.items():
        alike = [held for held in found.values() if len(held) == len(data) and held != data]
        other = alike[0] if alike else b""
        path.write_bytes(TEARS[tear](data, other))
    assert same(load(directory, cache), load(directory))
    assert "made again" in caplog.text
    assert {path: path.read_bytes() for path in entries(cache)} == found


def test_a_directory_in_the_place_of_an_entry_is_lived_with(directory, cache, caplog):
    load(directory, cache)
    path = entries(cache)[0]
    path.unlink()
    path.mkdir()
    assert same(load(directory, cache), load(directory))
    assert path.is_dir()
    assert "not cached" in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_it_never_holds_more_than_it_may(directory, cache, tmp_path, share, monkeypatch):
    load(directory, cache)
    small = WeightCache(tmp_path / "small", int(cache.bytes_used() * share))
    most, store = [0], WeightCache.store

    def watched(self, *given):
        store(self, *given)
        most.append(small.bytes_used())

    monkeypatch.setattr(WeightCache, "store", watched)
    for start, end in [(0, 4), (2, 4), (0, 2), (0, 4)]:
        assert same(load(directory, small, start, end), load(directory, None, start, end))
    assert max(most) <= small.bytes_max
    assert bool(max(most)) == bool(share)


def test_the_longest_unused_go_first(directory, cache, tmp_path):
    load(directory, cache, 0, 1)
    first = entries(cache)
    size = cache.bytes_used()
    for at, path in enumerate(first):
        os.utime(path, ns=(at, at))
    load(directory, cache, 0, 1)
    for path in first:
        assert path.stat().st_mtime_ns > len(first)
    small = WeightCache(cache.directory, size)
    for at, path in enumerate(first):
        os.utime(path, ns=(at, at))
    small.store("0" * 64, {"q": torch.zeros(10, dtype=torch.int8)})
    left = entries(small)
    assert first[0] not in left
    assert set(first[1:]) < set(left)


def test_files_of_others_are_neither_counted_nor_touched(directory, tmp_path):
    (tmp_path / "cache").mkdir()
    theirs = [tmp_path / "cache" / name for name in ("notes.txt", "model.safetensors", ".part", "a" * 64)]
    for path in theirs:
        path.write_bytes(b"mine" * 1000)
    cache = WeightCache(tmp_path / "cache", 50_000)
    assert cache.bytes_used() == 0
    load(directory, cache)
    assert 0 < cache.bytes_used() <= 50_000
    assert all(path.read_bytes() == b"mine" * 1000 for path in theirs)


def test_what_a_killed_writer_left_is_counted_and_goes_like_the_rest(tmp_path):
    cache = WeightCache(tmp_path, 2000)
    left = tmp_path / f".{'a' * 64}.x1_y.part"
    left.write_bytes(bytes(1500))
    assert cache.bytes_used() == 1500
    cache.store("0" * 64, {"q": torch.zeros(1000, dtype=torch.int8)})
    assert not left.exists()
    assert [path.name for path in entries(cache)] == ["0" * 64 + ".safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace", "mkstemp"])
def test_a_disk_that_fails_costs_only_the_entry(directory, cache, monkeypatch, caplog, call):
    def full(*_given, **_options):
        raise OSError(28, "No space left on device")

    target = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "mkstemp": "tempfile.mkstemp"}[call]
    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        assert same(load(directory, cache), load(directory))
    assert "No space left" in caplog.text
    assert list(cache.directory.iterdir()) == []


def test_a_cache_that_cannot_be_made_costs_nothing_but_itself(directory, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = WeightCache(tmp_path / "file" / "cache", ROOM)
    assert same(load(directory, cache), load(directory))
    assert "not cached" in caplog.text


def test_unquantised_spans_leave_it_empty(directory, cache):
    load(directory, cache, quant="none")
    assert cache.bytes_used() == 0


def test_a_negative_bound_is_refused(tmp_path):
    with pytest.raises(LocalFault, match="bytes_max"):
        WeightCache(tmp_path, -1)
