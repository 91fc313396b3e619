"""The commands with real daemons, as a person would type them: a testnet's life, the demo, and a change of mesh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from testnet.processes import child_environment

SHOAL = (sys.executable, "-P", "-m", "shoal")
WAIT_S = 120.0
STOP_S = 10.0  # the contract is three seconds, on a machine that has nothing else to do


def shoal(*arguments: str, status: int = 0, **more) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    done = subprocess.run(
        [*SHOAL, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=environment(),
        check=False,
        **more,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return done


def environment() -> dict[str, str]:
    return child_environment(os.environ)


def view_of(directory: Path, *, nodes: int = 1) -> dict[str, Any]:
    """The mesh as the daemon on `directory` sees it, once it sees so many nodes."""
    end_s = time.monotonic() + WAIT_S
    while True:
        view = json.loads(shoal("status", "--json", "--data-dir", str(directory)).stdout)
        if len(view["nodes"]) >= nodes or time.monotonic() > end_s:
            return view


@contextmanager
def daemon(directory: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`shoal up` that said it is ready; the process ends with the block."""
    command = [*SHOAL, "up", "--data-dir", str(directory), "--api", "127.0.0.1:0", "--threads", "1", *flags]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready api=http://127.0.0.1:")
            yield process
        finally:
            process.kill()


def test_a_testnet_comes_up_answers_everywhere_and_goes(state_dir):
    where = ("--state-dir", str(state_dir))
    up = shoal("testnet", "up", "-n", "2", "--node-memory", "10", "--json", *where)
    assert up.stderr == ""
    nodes = json.loads(up.stdout)["nodes"]
    spans = sorted((span["start"], span["end"]) for node in nodes for span in node["spans"])
    assert len(spans) == 2
    assert (spans[0][0], spans[0][1], spans[1][1]) == (0, spans[1][0], 8)
    assert all(psutil.pid_exists(node["pid"]) for node in nodes)

    ask = ("run", "embedded", "def read_file(path):", "--temperature", "0", "--max-tokens", "12")
    texts = [shoal(*ask, "--api", node["api"]).stdout for node in nodes]
    assert texts[0] == texts[1]
    assert len(texts[0].strip()) > 10

    unknown = shoal("run", "absent", "x", "--api", nodes[1]["api"], status=1)
    assert unknown.stderr.startswith("shoal: the model 'absent' does not exist in this mesh; see: ")
    again = shoal("testnet", "up", *where, status=1)
    assert "2 nodes" in again.stderr
    assert shoal("testnet", "status", *where).stdout.count("running") == 2

    assert shoal("testnet", "down", *where).stdout == "ended 2 of 2 nodes\n"
    assert not any(psutil.pid_exists(node["pid"]) for node in nodes)
    assert not list(state_dir.glob("node-?"))
    assert all("ERROR" not in log.read_text() for log in state_dir.glob("*.log"))


def test_the_demo_is_true(home, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(home))
    out = shoal("demo", "--plain").stdout
    assert out.count("fetched from its peers") == 3
    assert out.count("from its own disk") == 1
    assert "and no first layer" in out
    assert "through 4 processes" in out
    assert "    def read_file(path):\n" in out
    assert not list(home.glob("shoal-demo-*"))


def test_a_running_daemon_moves_to_the_mesh_of_an_invite(tmp_path):
    with (
        daemon(tmp_path / "a", "--name", "alice", "--model", "none") as alice,
        daemon(tmp_path / "b", "--name", "bob") as bob,
    ):
        api = json.loads((tmp_path / "b" / "daemon.json").read_text())["api"]
        invite = shoal("invite", "--data-dir", str(tmp_path / "a")).stdout.strip()
        mesh = view_of(tmp_path / "a")["mesh"]

        moved = shoal("join", invite, "--data-dir", str(tmp_path / "b"))
        assert moved.stdout == f"the node at {api} now belongs to mesh {mesh}, with 1 other node\n"
        for directory in ("a", "b"):
            view = view_of(tmp_path / directory, nodes=2)
            assert sorted(node["name"] for node in view["nodes"]) == ["alice", "bob"]
            assert view["models"] == [], "what bob shared with his old mesh is not offered to this one"

        already = shoal("join", invite, "--data-dir", str(tmp_path / "b"))
        assert "already belongs to mesh" in already.stdout
        damaged = shoal("join", invite[:-3], "--data-dir", str(tmp_path / "b"), status=1)
        assert damaged.stderr.startswith("shoal: the invite is damaged")

        for process, number in ((bob, signal.SIGTERM), (alice, signal.SIGINT)):
            began_s = time.monotonic()
            process.send_signal(number)
            out, errors = process.communicate(timeout=WAIT_S)
            assert (process.returncode, out, errors) == (0, "", "")
            assert time.monotonic() - began_s < STOP_S


def test_what_another_program_holds_is_named_in_one_line(tmp_path):
    with daemon(tmp_path / "a", "--model", "none"):
        address = json.loads((tmp_path / "a" / "daemon.json").read_text())["api"].removeprefix("http://")
        mine = view_of(tmp_path / "a")["nodes"][0]
        listen = mine["addrs"][0].partition("/p2p/")[0]
        other = ("--data-dir", str(tmp_path / "b"))
        for flags, words in (
            ((*other, "--api", address), f"cannot serve HTTP on {address}: another program uses this port"),
            ((*other, "--api", "127.0.0.1:0", "--listen", listen), "is already in use"),
            (("--data-dir", str(tmp_path / "a"), "--api", "127.0.0.1:0"), "is in use by process"),
        ):
            refused = shoal("up", *flags, status=1)
            assert refused.stderr.startswith("shoal: ")
            assert refused.stderr.count("\n") == 1
            assert words in refused.stderr
            assert refused.stdout == ""
