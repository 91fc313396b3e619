"""A checkpoint is whole or it is not there, wherever its writer was killed and whatever was cut off."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from collectives import Snapshot
from collectives.checkpoint import files, newest, read, write
from collectives.errors import CheckpointProblem

WRITER = Path(__file__).with_name("killed_writer.py")


def a_state(seed=0, size=3):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.norm.weight": torch.randn(size, generator=g),
        "outer.momentum.model.norm.weight": torch.randn(size, generator=g),
        "model.embed.weight": torch.randn(size, 2, generator=g, dtype=torch.float64),
        "half": torch.randn(3, generator=g).to(torch.bfloat16),
        "count": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 4),
    }


def test_what_was_saved_comes_back(tmp_path):
    state = a_state()
    path = write(tmp_path, Snapshot.take(state, 12), {"tokens": 10, "strategy": "diloco"})
    loaded = newest(tmp_path)
    assert loaded.path == path
    assert (loaded.epoch, loaded.meta, loaded.refused) == (12, {"tokens": 10, "strategy": "diloco"}, ())
    assert loaded.snapshot.digest == Snapshot.take(state, 12).digest
    assert all(torch.equal(loaded.snapshot.tensors[key], value) for key, value in state.items())


def test_any_reader_of_safetensors_reads_it(tmp_path):
    state = a_state()
    path = write(tmp_path, Snapshot.take(state, 1), {})
    found = load_file(path / "state-00000.safetensors")
    assert sorted(found) == sorted(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_large_states_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FILE_BYTES_MAX", 40)
    state = a_state()
    path = write(tmp_path, Snapshot.take(state, 1), {})
    assert len(list(path.glob("*.safetensors"))) > 2
    assert read(path).snapshot.digest == Snapshot.take(state, 1).digest


def test_every_truncation_gives_the_one_before_and_says_so(tmp_path):
    old, new = (write(tmp_path / "whole", Snapshot.take(a_state(n), n), {"n": n}) for n in (1, 2))
    cut = 0
    for name in sorted(os.listdir(new)):
        raw = (new / name).read_bytes()
        for length in range(len(raw)):
            root = tmp_path / "cut"
            (root / new.name).mkdir(parents=True)
            for other in os.listdir(new):
                os.link(new / other, root / new.name / other)
            os.symlink(old, root / old.name)
            (root / new.name / name).unlink()
            (root / new.name / name).write_bytes(raw[:length])
            found = newest(root)
            assert (found.epoch, found.meta) == (1, {"n": 1}), (name, length)
            assert [one.path.name for one in found.refused] == [new.name], (name, length)
            cut += 1
            shutil.rmtree(root)
    assert cut > 1000


@pytest.mark.parametrize("name", ["state-00000.safetensors", "manifest.json"])
def test_altered_bytes_are_seen(tmp_path, name):
    path = write(tmp_path, Snapshot.take(a_state(), 1), {"n": 1})
    raw = bytearray((path / name).read_bytes())
    for at in range(0, len(raw), 7):
        raw[at] ^= 0x10
        (path / name).write_bytes(raw)
        try:
            loaded = read(path)
        except CheckpointProblem:
            pass
        else:  # spaces between JSON's words may be others, what they say may not
            assert name == "manifest.json"
            assert (loaded.meta, loaded.snapshot.digest) == ({"n": 1}, Snapshot.take(a_state(), 1).digest)
        raw[at] ^= 0x10


def test_files_of_two_checkpoints_are_no_checkpoint(tmp_path):
    one, two = (write(tmp_path, Snapshot.take(a_state(n), n), {}) for n in (1, 2))
    shutil.copy(one / "state-00000.safetensors", two / "state-00000.safetensors")
    with pytest.raises(CheckpointProblem, match="SHA-256"):
        read(two)
    assert newest(tmp_path).epoch == 1


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 16)
    write(tmp_path, Snapshot.take(a_state(1), 1), {})
    for stop_at in range(1, 60, 7):
        calls = iter(range(1, 1000))

        def between(calls=calls, stop_at=stop_at):
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, Snapshot.take(a_state(2), 2), {}, between)
        assert len(list(tmp_path.iterdir())) == 1
    assert newest(tmp_path).epoch == 1


def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path, monkeypatch):
    write(tmp_path, Snapshot.take(a_state(1), 1), {})

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointProblem, match="No space left on device"):
        write(tmp_path, Snapshot.take(a_state(2), 2), {})
    assert len(list(tmp_path.iterdir())) == 1
    assert newest(tmp_path).epoch == 1


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": object()}, {"x": "y" * (1 << 20)}])
def test_bad_meta_is_refused(tmp_path, meta):
    with pytest.raises(CheckpointProblem, match="meta"):
        write(tmp_path, Snapshot.take(a_state(), 1), meta)
    assert not list(tmp_path.iterdir())


def test_no_folder_no_checkpoint(tmp_path):
    assert newest(tmp_path / "absent") is None
    (tmp_path / "000000000001-0123456789abcdef").mkdir()
    assert newest(tmp_path) is None


def killed(tmp_path, kills, seed):
    done = subprocess.run(
        [sys.executable, str(WRITER), str(tmp_path), str(kills), str(seed)],
        capture_output=True, check=True, timeout=600,
    )  # fmt: skip
    return json.loads(done.stdout)


def check(found, kills):
    print(found)
    assert (found["kills"], found["mixtures"], found["lost"]) == (kills, 0, 0)
    assert found["debris"] > kills / 4  # it was killed while it wrote


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked here, which this system cannot")
def test_kills_during_writes_leave_the_old_or_the_new_one(tmp_path):
    check(killed(tmp_path, 60, 1), 60)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked here, which this system cannot")
def test_a_thousand_kills_during_writes_leave_the_old_or_the_new_one(tmp_path):
    check(killed(tmp_path, 1000, 2), 1000)
