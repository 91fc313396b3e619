"""`shoal testnet` and `shoal demo` with fake nodes in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from shoal.cli import main


@pytest.fixture(autouse=True)
def quick(fake_nodes, monkeypatch):
    monkeypatch.setattr("shoal.cli_mesh.POLL_S", 0.0)


@pytest.fixture
def shoal(capsys, state_dir):
    def run(*arguments: str, state: bool = True):
        capsys.readouterr()
        status = main([*arguments, "--state-dir", str(state_dir)] if state else list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_up_prints_the_contract_and_leaves_the_nodes_running(shoal, state_dir):
    status, out, err = shoal("testnet", "up", "-n", "4", "--json", "--node-memory", "6")
    assert (status, err) == (0, "")
    nodes = json.loads(out)["nodes"]
    assert [node["spans"] for node in nodes[:2]] == [
        [{"model": "embedded", "start": 0, "end": 2}],
        nodes[1]["spans"],
    ]
    covered = sorted(
        layer for node in nodes for span in node["spans"] for layer in range(span["start"], span["end"])
    )
    assert covered == list(range(8))
    assert {"pid", "api", "peer", "spans"} <= set(nodes[0])
    assert all(psutil.pid_exists(node["pid"]) for node in nodes)
    status, out, err = shoal("testnet", "down", "--json")
    assert [entry["pid"] for entry in json.loads(out)["ended"]] == [node["pid"] for node in nodes]
    assert not (state_dir / "testnet.json").exists()


def test_copies_are_waited_for(shoal):
    _, out, _ = shoal("testnet", "up", "-n", "4", "--copies", "2", "--json")
    spans = [(span["start"], span["end"]) for node in json.loads(out)["nodes"] for span in node["spans"]]
    assert sorted(spans) == [(0, 4), (0, 4), (4, 8), (4, 8)]


def test_for_a_person_it_says_what_to_do_next(shoal, state_dir):
    status, out, err = shoal("testnet", "up", "-n", "2")
    assert (status, out.splitlines()[0]) == (0, "embedded is served: 8 layers on 2 nodes")
    assert f"testnet down --state-dir {state_dir}" in err
    ask = re.search(r'run embedded "\.\.\." --api (\S+)', err)
    assert ask
    status, out, _ = shoal("testnet", "status")
    assert ask[1] in out
    assert out.count("running") == 2
    status, out, _ = shoal("testnet", "down")
    assert out == "ended 2 of 2 nodes\n"
    assert shoal("testnet", "down")[2] == "no local nodes are recorded; nothing to end\n"


def test_status_tells_the_dead_from_the_living(shoal):
    _, out, _ = shoal("testnet", "up", "-n", "2", "--json")
    pid = json.loads(out)["nodes"][1]["pid"]
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(5)
    _, out, _ = shoal("testnet", "status", "--json")
    assert [node["running"] for node in json.loads(out)["nodes"]] == [True, False]
    assert shoal("testnet", "down")[1] == "ended 1 of 2 nodes; 1 had ended before\n"


def test_a_model_that_is_none_fails_before_anything_starts(shoal, state_dir, tmp_path):
    status, _, err = shoal("testnet", "up", "--model", str(tmp_path / "absent"))
    assert (status, err.count("\n")) == (1, 1)
    assert not state_dir.exists()


def test_a_node_that_fails_ends_all_with_one_line(shoal, monkeypatch, state_dir):
    monkeypatch.setenv("FAKE_FAULT", "node-2:exit")
    status, out, err = shoal("testnet", "up", "-n", "3")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"shoal: node-2 ended with status 1; its log .* ends: the disk is full\n", err)
    assert not (state_dir / "testnet.json").exists()


def test_a_model_that_is_not_served_in_time_names_the_layers(shoal, monkeypatch):
    monkeypatch.setattr("testnet.Testnet.left_s", lambda net: -1.0)
    status, _, err = shoal("testnet", "up", "-n", "2")
    assert status == 1
    assert re.fullmatch(r"shoal: layers 0-7 of 8 of 'embedded' are not served by any node .*\n", err)


def test_ctrl_c_while_starting_leaves_nothing(state_dir):
    code = f"""
        import sys
        import shoal.cli_testnet as cli
        from shoal.cli import main
        from testnet import LaunchOptions
        command = ({sys.executable!r}, "-P", "-m", "testnet.fake_daemon")
        cli.LaunchOptions = lambda **changes: LaunchOptions(command=command, **changes)
        sys.exit(main(["testnet", "up", "-n", "2", "--state-dir", {str(state_dir)!r}]))
    """
    environment = {**os.environ, "FAKE_FAULT": "node-2:silent"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stderr is not None
        assert b"starting nodes" in process.stderr.readline()
        nodes = json.loads((state_dir / "testnet.json").read_text())["nodes"]
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (130, b"", b"")
    assert len(nodes) == 2
    assert not any(psutil.pid_exists(node["pid"]) for node in nodes)


def test_demo_in_a_pipe_tells_the_story_in_plain_lines(shoal):
    status, out, err = shoal("demo", state=False)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    story = [
        "founds a mesh",
        "join by its invite",
        "every layer is served",
        "asking node-",
        "no first layer",
        "tokens/s",
    ]
    positions = [out.index(words) for words in story]
    assert positions == sorted(positions)
    assert "All 4 nodes were stopped" in out
    assert len(out[out.index("try next:") :].splitlines()) == 4


def test_demo_leaves_nothing_behind(shoal, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    shoal("demo", state=False)
    assert set(tmp_path.iterdir()) == before


def test_demo_kept_can_be_asked_and_ended(shoal, home):
    _, out, _ = shoal("demo", "--keep", state=False)
    commands = [line.partition("#")[0].split() for line in out[out.index("try next:") :].splitlines()[1:]]
    api = commands[1][-1]
    assert main(["status", "--api", api]) == 0
    assert shoal("testnet", "down", state=False)[1] == "ended 4 of 4 nodes\n"


def test_demo_in_a_terminal(shoal, monkeypatch):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("TERM", "xterm")
    status, out, _ = shoal("demo", state=False)
    assert status == 0
    assert "✓ spreading its layers" in out
    assert "│ def read_file(path):" in out
    assert "Try next" in out
