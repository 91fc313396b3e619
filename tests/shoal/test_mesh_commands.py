"""invite, status, models and add against a fake daemon."""

from __future__ import annotations

import json

import pytest

from shoal import cli_mesh
from shoal.daemon_client import DaemonClient
from shoal.errors import CommandFailed


def test_invite_in_a_pipe_is_the_bare_text(shoal, daemon):
    outcome = shoal("invite")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"shoal1-fake-{daemon.api[7:]}\n"
    assert daemon.seen == [("/shoal/invite", {"ttl_s": 86400.0, "single_use": False})]


def test_invite_as_json(shoal, daemon):
    assert json.loads(shoal("invite", "--json", "--ttl", "30m").out)["ttl_s"] == 1800


def test_invite_without_an_invite_in_the_answer_fails(shoal, daemon):
    daemon.answers["/shoal/invite"] = (200, {})
    outcome = shoal("invite")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "shoal: the daemon answered without an invite\n"


def test_invite_for_a_person_has_a_code_and_the_command_to_type(shoal, daemon, monkeypatch):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "60")
    outcome = shoal("invite")
    assert outcome.out == f"shoal join shoal1-fake-{daemon.api[7:]}\n"
    assert "▀" in outcome.err
    assert "Good for 1 day" in outcome.err
    assert "▀" not in shoal("invite", "--no-qr").err


def test_small_window_gets_a_remark_instead_of_a_broken_code(shoal, daemon, monkeypatch):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    outcome = shoal("invite")
    assert "▀" not in outcome.err
    assert "a window of" in outcome.err


def test_status_in_a_pipe_is_plain_aligned_text(shoal, daemon):
    daemon.add("tiny", 1)
    outcome = shoal("status")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["NODE", "PEER", "MEMORY", "RTT", "LAYERS", "STATE"]
    assert lines[1].split()[:2] == ["node-1", f"…{daemon.peer[-8:]}"]
    assert "tiny 0-7" in lines[1]
    assert lines[-1].split() == ["tiny", "8", "512", "0", "of", "1", "nodes", "are", "loading"]
    assert "\x1b" not in outcome.out


def test_status_as_json_is_the_daemons_document(shoal, daemon):
    assert json.loads(shoal("status", "--json").out) == daemon.mesh(me=daemon.peer)


def test_status_in_a_terminal_is_a_picture(shoal, daemon, monkeypatch):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "120")
    daemon.add("tiny", 1)
    outcome = shoal("status")
    assert "mesh fa4e  seen from node-1" in outcome.out
    assert "○ tiny" in outcome.out


def test_status_by_address(shoal, daemon, home):
    (home / "data" / "shoal" / "daemon.json").unlink()
    assert shoal("status", "--api", daemon.api.removeprefix("http://")).status == 0


def test_models_empty_and_not(shoal, daemon):
    assert "shoal add" in shoal("models").err
    daemon.add("tiny", 2)
    assert shoal("models").out.splitlines()[1].startswith("tiny")
    assert json.loads(shoal("models", "--json").out)["models"][0]["name"] == "tiny"


def test_add_publishes_waits_and_says_where_the_layers_went(shoal, daemon, model_dir, monkeypatch):
    monkeypatch.setattr(cli_mesh, "POLL_S", 0.0)
    outcome = shoal("add", str(model_dir), "--name", "t")
    assert (outcome.status, outcome.out) == (0, "t is served: 8 layers on 1 node\n  node-1  layers 0-7\n")
    body = {"directory": str(model_dir), "name": "t", "copies": 1}
    assert daemon.seen[0] == ("/shoal/models", body)
    assert "shoal run t" in outcome.err or "-m shoal run t" in outcome.err


def test_add_as_json(shoal, daemon, model_dir, monkeypatch):
    monkeypatch.setattr(cli_mesh, "POLL_S", 0.0)
    outcome = shoal("add", str(model_dir), "--json")
    assert outcome.err == ""
    spans = [{"node": "node-1", "peer": daemon.peer, "start": 0, "end": 8}]
    assert json.loads(outcome.out) == {"model": "tiny", "copies": 1, "spans": spans}


def test_add_without_waiting_does_not_look(shoal, daemon, model_dir):
    outcome = shoal("add", str(model_dir), "--no-wait")
    assert outcome.out.startswith("tiny is published")
    assert [path for path, _ in daemon.seen] == ["/shoal/models"]


def test_add_the_built_in_model(shoal, daemon):
    shoal("add", "embedded", "--no-wait")
    assert daemon.seen[0][1] == {"directory": "embedded", "name": "embedded", "copies": 1}


def test_relative_directories_are_told_absolutely(shoal, daemon, model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    shoal("add", "tiny", "--no-wait")
    assert daemon.seen[0][1]["directory"] == str(model_dir)


@pytest.mark.parametrize(("name", "says"), [("absent", "is not a directory"), ("empty", "no config.json")])
def test_add_refuses_what_is_no_model(shoal, daemon, tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    outcome = shoal("add", str(tmp_path / name))
    assert outcome.status == 1
    assert says in outcome.err
    assert outcome.err.count("\n") == 1
    assert daemon.seen == []


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": {"message": "model.safetensors is truncated"}}),
        (
            200,
            b'{"state": "hashing", "done": 1, "total": 2}\n{"error": {"message": "model.safetensors is truncated"}}\n',
        ),
    ],
)
def test_add_reports_the_daemons_refusal_in_one_line(shoal, daemon, model_dir, answer):
    daemon.answers["/shoal/models"] = answer
    outcome = shoal("add", str(model_dir))
    assert (outcome.status, outcome.err) == (1, "shoal: model.safetensors is truncated\n")


def test_publishing_ends_when_the_mesh_knows_the_model(shoal, daemon, model_dir):
    """What the daemon streams about placing comes from the mesh as well, where a deadline holds."""
    daemon.answers["/shoal/models"] = (200, b'{"state": "published"}\n{"error": "never read"}\n')
    assert shoal("add", str(model_dir), "--no-wait").status == 0


def test_waiting_ends_with_what_is_missing(daemon):
    daemon.add("tiny", 2)
    now = iter(range(100))
    looked = []
    with pytest.raises(CommandFailed, match=r"layers 0-7 of 8 of 'tiny' are not served 3 times.* after 5 s"):
        cli_mesh.wait_served(
            DaemonClient(daemon.api),
            "tiny",
            3,
            5.0,
            looked.append,
            sleep=lambda _: None,
            clock_s=lambda: next(now),
        )
    assert len(looked) == 5


def test_nobody_waits_for_a_model_that_the_mesh_has_no_room_for(daemon):
    daemon.add("tiny", 2)
    daemon.shortage = "needs 9 GiB, the mesh offers 7 GiB: 2 GiB short"
    now = iter(range(100))
    with pytest.raises(CommandFailed) as caught:
        cli_mesh.wait_served(
            DaemonClient(daemon.api),
            "tiny",
            3,
            900.0,
            lambda mesh: None,
            sleep=lambda _: None,
            clock_s=lambda: next(now),
        )
    assert str(caught.value) == f"'tiny' is served, but not 3 times: {daemon.shortage}"
    assert next(now) < 10


def test_watch_stops_at_ctrl_c(shoal, daemon, monkeypatch):
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    monkeypatch.setattr("shoal.cli_mesh.time.sleep", interrupt)
    outcome = shoal("status", "--watch")
    assert (outcome.status, outcome.err) == (130, "")
