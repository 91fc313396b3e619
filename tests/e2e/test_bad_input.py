"""What a person can get wrong: each gives one clear line and the right exit status, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from node import embedded
from p2p import Invite

PROMPT = "def read_file(path):\n"
UP_S_MAX = 60.0


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_header(directory: Path, change: Callable[[dict], None]) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    fresh = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(fresh)) + fresh + data[8 + size :])


def overlap(header: dict) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


NORM = "model.layers.3.input_layernorm.weight"
UP = "model.layers.2.mlp.up_proj.weight"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weights": (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    "truncated weights": (lambda d: os.truncate(d / "model.safetensors", 3_000_000), "model.safetensors"),
    "weights of four bytes": (lambda d: (d / "model.safetensors").write_bytes(b"1234"), "model.safetensors"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "absurd header": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    "garbage header": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"{not json" + bytes(99)),
        "model.safetensors",
    ),
    "wrong shape": (lambda d: edit_tensors(d, lambda t: t.update({UP: t[UP][:-1].contiguous()})), UP),
    "wrong dtype": (lambda d: edit_tensors(d, lambda t: t.update({NORM: t[NORM].int()})), NORM),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), NORM),
    "misnamed tensor": (lambda d: edit_tensors(d, rename(UP, "model.layers.2.mlp.upp.weight")), UP),
    "overlapping ranges": (lambda d: edit_header(d, overlap), "model.safetensors"),
    "unknown architecture": (
        lambda d: edit_config(d, architectures=["BertForMaskedLM"], model_type="bert"),
        "BertForMaskedLM",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "garbage config": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config of another kind": (lambda d: (d / "config.json").write_text("[1, 2]"), "config.json"),
    "a billion layers": (lambda d: edit_config(d, num_hidden_layers=10**9), "num_hidden_layers"),
    "no layers": (lambda d: edit_config(d, num_hidden_layers=-1), "num_hidden_layers"),
    "layers in words": (lambda d: edit_config(d, num_hidden_layers="eight"), "num_hidden_layers"),
    "more layers than weights": (lambda d: edit_config(d, num_hidden_layers=9), "layers.8"),
    "missing tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "garbage tokenizer": (lambda d: (d / "tokenizer.json").write_text('{"model": 5}'), "tokenizer"),
}  # fmt: skip


@pytest.fixture
def broken(tmp_path):
    """A copy of the embedded model, broken in a named way."""

    def make(how: str) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(embedded.path(), directory)
        BREAKS[how][0](directory)
        return directory

    return make


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_model_is_refused_with_its_fault_and_the_node_goes_on(alone, tools, broken, how):
    last = list(tools.lines(alone.api + "/shoal/models", {"directory": str(broken(how)), "name": "broken"}))[
        -1
    ]
    assert "error" in last, last
    message = last["error"]["message"]
    assert "\n" not in message
    assert BREAKS[how][1] in message
    assert [model["name"] for model in alone.view()["models"]] == ["embedded"]


@pytest.mark.parametrize(
    ("order", "word"),
    [
        ({"directory": "/nowhere/at/all", "name": "x"}, "directory"),
        ({"directory": "/etc/hostname", "name": "x"}, "directory"),
        ({"directory": "relative", "name": "x"}, "absolute"),
        ({"directory": "embedded", "name": "two words"}, "name"),
        ({"directory": "embedded", "name": "\x1b[2J"}, "name"),
        ({"directory": "embedded", "name": "x", "copies": 10**6}, "copies"),
        ({"directory": 5, "name": "x"}, "directory"),
        ({"name": "x"}, "directory"),
        ([], "object"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(alone, tools, order, word):
    last = list(tools.lines(alone.api + "/shoal/models", order))[-1]
    assert word in last["error"]["message"], last


def test_a_name_that_another_model_has_is_refused(alone, tools, tmp_path):
    directory = tmp_path / "other"
    shutil.copytree(embedded.path(), directory)
    edit_config(directory, rms_norm_eps=1e-4)
    last = list(tools.lines(alone.api + "/shoal/models", {"directory": str(directory), "name": "embedded"}))[
        -1
    ]
    assert "no other model" in last["error"]["message"], last
    assert alone.add()["state"] == "ready", "the same model again is no fault"


def test_the_node_still_serves_the_same_text_after_all_that(alone, tools):
    assert alone.running()
    assert "Traceback" not in alone.log()
    assert len(tools.complete(alone.api, PROMPT)) > 10


ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from shoal.cli import main
said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(command)
    said.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refusals(alone, tools, tmp_path_factory):
    """What `shoal up` says to each of these, in one process that loads torch once: name -> (status, stdout, stderr)."""
    directory = tmp_path_factory.mktemp("refusals")
    truncated = directory / "truncated"
    shutil.copytree(embedded.path(), truncated)
    BREAKS["truncated weights"][0](truncated)
    (directory / "file").write_text("")
    for name, file, text in (("bad-key", "identity.key", "?"), ("bad-mesh", "mesh.json", "{")):
        (directory / name).mkdir()
        (directory / name / file).write_text(text)
    expired = Invite(
        "0123456789abcdef", bytes(32), (f"/ip4/127.0.0.1/tcp/1/p2p/{alone.peer}",), time.time() - 9
    ).encode()
    port = alone.api.rpartition(":")[2]
    peer_port = next(a.split("/")[4] for n in alone.view()["nodes"] for a in n["addrs"])
    cases = {
        "a truncated model": ["--model", truncated],
        "no such model": ["--model", directory / "nowhere"],
        "a port in use": ["--api", f"127.0.0.1:{port}"],
        "a peer port in use": ["--listen", f"/ip4/127.0.0.1/tcp/{peer_port}"],
        "a data directory in use": ["--data-dir", alone.data_dir],
        "a data directory that cannot be": ["--data-dir", directory / "file" / "x"],
        "an unreadable key": ["--data-dir", directory / "bad-key"],
        "an unreadable mesh": ["--data-dir", directory / "bad-mesh"],
        "a malformed invite": ["--join", "shoal1-nonsense"],
        "an expired invite": ["--join", expired],
        "layers upside down": ["--layers", "4:2"],
        "a size without size": ["--memory", "0"],
        "a strange listen address": ["--listen", "over-there"],
    }
    commands = []
    for i, flags in enumerate(cases.values()):
        defaults = {"--data-dir": directory / f"data-{i}", "--api": "127.0.0.1:0", "--model": "none",
                    "--listen": "/ip4/127.0.0.1/tcp/0"}  # fmt: skip
        given = [part for key, value in defaults.items() if key not in flags for part in (key, value)]
        commands.append([str(part) for part in ("up", *flags, *given)])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands)], capture_output=True, text=True,
        env=tools.environment(directory), timeout=UP_S_MAX, check=True,
    )  # fmt: skip
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("case", "status", "word"),
    [
        ("a truncated model", 1, "model.safetensors"),
        ("no such model", 1, "nowhere"),
        ("a port in use", 1, "uses this port"),
        ("a peer port in use", 1, "in use"),
        ("a data directory in use", 1, "in use"),
        ("a data directory that cannot be", 1, "cannot be"),
        ("an unreadable key", 1, "identity.key"),
        ("an unreadable mesh", 1, "mesh.json"),
        ("a malformed invite", 1, "invite"),
        ("an expired invite", 1, "expired"),
        ("layers upside down", 2, "layers"),
        ("a size without size", 2, "memory"),
        ("a strange listen address", 1, "over-there"),
    ],
)
def test_shoal_up_says_in_one_line_what_is_wrong(refusals, case, status, word):
    got, stdout, stderr = refusals[case]
    assert (got, stdout) == (status, ""), stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert stderr.startswith("shoal: ")
    assert word in stderr


def test_the_process_ends_with_that_status_and_line(tools, broken, tmp_path):
    command = tools.shoal(
        "up", "--model", broken("truncated weights"), "--data-dir", tmp_path / "d", "--api", "127.0.0.1:0"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=tools.environment(tmp_path), timeout=UP_S_MAX
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert "model.safetensors" in done.stderr


def test_whoever_held_the_directory_and_the_port_never_noticed(alone, refusals, tools):
    assert alone.running()
    assert (alone.data_dir / "daemon.json").exists()
    assert len(tools.complete(alone.api, PROMPT)) > 10
