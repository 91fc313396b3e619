"""Starting a mesh of processes, and ending exactly those, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import testnet
from testnet import AlreadyRunning, LaunchFailed, StateProblem, Testnet, processes, read_state, stop_recorded
from testnet.interrupts import Interrupts


def alive(nodes) -> list[str]:
    return [node.name for node in nodes if processes.running(node)]


def test_public_face():
    assert sorted(testnet.__all__) == [
        "AlreadyRunning",
        "LaunchFailed",
        "LaunchOptions",
        "LocalNode",
        "StateProblem",
        "Testnet",
        "TestnetError",
        "read_state",
        "stop_recorded",
    ]


def test_nodes_become_one_mesh_and_end_with_the_block(options, state_dir):
    with Testnet(options(3)) as net:
        net.form()
        assert [node.name for node in net.nodes] == ["node-1", "node-2", "node-3"]
        assert len(net.client().get("/mesh")["nodes"]) == 3
        assert alive(net.nodes) == ["node-1", "node-2", "node-3"]
        assert read_state(state_dir) == net.nodes
    assert alive(net.nodes) == []
    assert read_state(state_dir) == ()
    assert not (state_dir / "node-1").exists()
    assert (state_dir / "node-1.log").exists()


def test_released_nodes_go_on_until_they_are_ended(options, state_dir):
    with Testnet(options()) as net:
        net.form()
        net.release()
    assert alive(net.nodes) == ["node-1", "node-2"]
    assert stop_recorded(state_dir, read_state(state_dir)) == list(net.nodes)
    assert alive(net.nodes) == []


def test_an_interrupt_ends_what_was_started(options):
    def form_and_be_told_to_end(net: Testnet) -> None:
        with net:
            net.form()
            os.kill(os.getpid(), signal.SIGTERM)

    net = Testnet(options())
    with pytest.raises(KeyboardInterrupt):
        form_and_be_told_to_end(net)
    assert len(net.nodes) == 2
    assert alive(net.nodes) == []


def test_a_node_that_ends_is_named_with_the_last_line_of_its_log(options, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "node-2:exit")
    with pytest.raises(
        LaunchFailed, match=r"node-2 ended with status 1; its log .*node-2\.log ends: the disk is full"
    ):
        with Testnet(options(3)) as net:
            net.form()
    assert alive(net.nodes) == []


def test_a_node_that_is_not_ready_in_time_is_named(options, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "node-1:silent")
    now = iter(range(1000))
    with pytest.raises(LaunchFailed, match=r"node-1 is not ready after 5 s; its log is "):
        with Testnet(options(timeout_s=5.0), sleep=lambda _: None, clock_s=lambda: next(now)) as net:
            net.form()


def test_a_node_killed_by_a_signal_is_noticed(options):
    with Testnet(options()) as net:
        net.form()
        os.kill(net.nodes[1].pid, signal.SIGKILL)
        net._children["node-2"].wait(5)
        with pytest.raises(LaunchFailed, match="node-2 ended by signal 9"):
            net.pause(0.0)


def test_a_deaf_node_is_ended_by_force(options, monkeypatch, state_dir):
    monkeypatch.setenv("FAKE_FAULT", "node-1:deaf")
    with Testnet(options(1)) as net:
        net.form()
        assert processes.stop(net.nodes, grace_s=0.2) == list(net.nodes)
        assert alive(net.nodes) == []


def test_a_pid_that_belongs_to_another_process_is_left_alone(options, state_dir):
    with Testnet(options(1)) as net:
        net.form()
        stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            recorded = replace(net.nodes[0], pid=stranger.pid)
            assert processes.running(recorded) is None
            assert stop_recorded(state_dir, [recorded]) == []
            assert stranger.poll() is None
        finally:
            stranger.communicate(b"\n")


def test_a_clock_that_was_set_does_not_hide_our_process(options):
    with Testnet(options(1)) as net:
        net.form()
        assert processes.running(replace(net.nodes[0], started_s=1.0)) is not None


def test_a_second_mesh_in_the_same_place_is_refused(options):
    with Testnet(options(1)) as net:
        net.form()
        with pytest.raises(AlreadyRunning, match=r"a node of .* testnet down"), Testnet(options(1)):
            pass
        assert alive(net.nodes) == ["node-1"]


def test_a_record_of_dead_nodes_is_no_hindrance(options, state_dir):
    with Testnet(options(1)) as first:
        first.form()
        first.release()
    processes.stop(first.nodes)
    with Testnet(options(1)) as second:
        second.form()
        assert second.nodes[0].pid != first.nodes[0].pid


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"nodes": [{"pid": 1}]}', '{"nodes": 3}'])
def test_a_damaged_record_is_one_clear_error(state_dir, content):
    state_dir.mkdir()
    (state_dir / "testnet.json").write_text(content)
    with pytest.raises(StateProblem, match="is not a record of local nodes"):
        read_state(state_dir)
    (state_dir / "testnet.json").unlink()


def test_only_directories_of_the_state_directory_are_removed(options, state_dir, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    with Testnet(options(1)) as net:
        net.form()
        stop_recorded(state_dir, [replace(net.nodes[0], data_dir=str(precious))])
    assert precious.is_dir()


def test_a_place_that_cannot_be_written_is_one_clear_error(options, tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StateProblem, match="cannot be used"), Testnet(options(1)):
        pass
    (tmp_path / "state").unlink()


def test_a_command_that_cannot_be_started(options):
    with pytest.raises(StateProblem, match="node-1 cannot be started"):
        with Testnet(replace(options(1), command=("/nowhere/shoal",))) as net:
            net.form()


def test_nodes_do_not_take_over_the_users_settings(monkeypatch):
    monkeypatch.setenv("SHOAL_DATA_DIR", "/mine")
    monkeypatch.setenv("OTHER", "1")
    child = processes.child_environment(os.environ)
    assert "SHOAL_DATA_DIR" not in child
    assert child["OTHER"] == "1"


def test_the_flags_of_a_node(options, state_dir):
    net = Testnet(options(2, node_memory_bytes=5))
    command = net._command("node-2", state_dir / "node-2", "shoal1-x")
    assert list(command[command.index("--api") :][:2]) == ["--api", "127.0.0.1:0"]
    assert list(command[command.index("--memory") :][:2]) == ["--memory", "5"]
    assert list(command[command.index("--join") :][:2]) == ["--join", "shoal1-x"]
    assert list(command[command.index("--model") :][:2]) == ["--model", "none"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("a\nb\n\n", "b"),
        ("shoal: no\n", "no"),
        ("x" * 20000 + "\nend", "end"),
        ("\xff", "\xff"),
        ("b\n2026-01-02 03:04:05,678 INFO    shoal.mesh: joined\n", "b"),
    ],
)
def test_last_words(tmp_path, text, words):
    log = tmp_path / "x.log"
    log.write_text(text)
    assert processes.last_words(log) == words
    assert processes.last_words(tmp_path / "absent.log") == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("ready\n", None),
        ("ready api=u\n", None),
        ("hello\nready api=http://a:1 peer=P more=2\n", ("http://a:1", "P")),
    ],
)
def test_ready_line(tmp_path, text, found):
    (tmp_path / "x.out").write_text(text)
    assert processes.ready_line(tmp_path / "x.log") == found


def test_held_interrupts_wait():
    reached = []

    def be_interrupted(interrupts: Interrupts) -> None:
        with interrupts.held():
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the inner block")

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            be_interrupted(interrupts)
        with interrupts.deaf():
            os.kill(os.getpid(), signal.SIGINT)
        reached.append("deaf")
    assert reached == ["after the inner block", "deaf"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_state_is_json_that_others_can_read(options, state_dir):
    with Testnet(options(1)) as net:
        net.form()
        document = json.loads((state_dir / "testnet.json").read_text())
        assert document["version"] == 1
        assert document["nodes"][0]["pid"] == net.nodes[0].pid
        assert Path(document["nodes"][0]["data_dir"]).is_dir()
