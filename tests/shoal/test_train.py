"""`shoal train` against a fake daemon: what it asks for, what a person sees, and one clear line for what is wrong."""

import json

import pytest

from shoal.daemon_client import DaemonClient

RUN = {
    "run": "ab" * 32, "name": "tiny", "state": "training", "generation": 1, "rounds": 3, "rounds_whole": 30,
    "tokens_per_s": 1234.5, "loss": 2.5, "val_loss": None, "computing": 0.75, "bytes_sent": 2048, "problem": "",
    "members": [
        {"node": "p1", "name": "desk", "state": "training", "epoch": 3, "loss": 2.5, "tokens_per_s": 1234.5,
         "computing": 0.75},
        {"node": "p2", "name": "", "state": "resting", "epoch": 2, "loss": None, "tokens_per_s": 0.0,
         "computing": 0.0},
    ],
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("name = 'tiny'")
    return path


def test_a_run_is_begun_and_shown_until_its_end(shoal, daemon, recipe):
    daemon.answers["/shoal/train"] = (200, RUN)
    outcome = shoal("train", str(recipe), "--serve", "mine")
    assert outcome.status == 0
    assert outcome.out == (
        "tiny  training  round 3 of 30  1 training  1234 tokens/s  loss 2.500  computing 75%  sent 2.0 KiB\n"
    )
    assert daemon.seen == [("/shoal/train", {"recipe": str(recipe), "serve": "mine"})]


def test_another_computer_takes_part_with_one_command(shoal, daemon):
    daemon.answers["/shoal/train/join"] = (200, RUN)
    outcome = shoal("train", "--join", "tiny", "--json")
    assert json.loads(outcome.out) == RUN
    assert daemon.seen == [("/shoal/train/join", {"run": "tiny", "serve": ""})]


def test_a_run_that_failed_here_is_a_failure_of_the_command(shoal, daemon, recipe):
    daemon.answers["/shoal/train"] = (200, {**RUN, "state": "failed", "problem": "the disk is full"})
    outcome = shoal("train", str(recipe))
    assert (outcome.status, outcome.err) == (1, "shoal: the disk is full\n")


def test_ctrl_c_ends_the_showing_and_not_the_run(shoal, daemon, recipe, monkeypatch):
    def lines(self, path, body):
        yield RUN
        raise KeyboardInterrupt

    monkeypatch.setattr(DaemonClient, "ndjson", lines)
    outcome = shoal("train", str(recipe))
    assert outcome.status == 0
    assert "the run goes on; leave it with:" in outcome.err
    assert "train stop tiny" in outcome.err


def test_status_shows_every_member(shoal, daemon):
    daemon.answers["/shoal/train/status"] = (200, {"runs": [RUN]})
    outcome = shoal("train", "status")
    assert outcome.status == 0
    rows = outcome.out.splitlines()
    assert rows[1].split() == ["NODE", "STATE", "STEPS", "LOSS", "TOKENS/S", "COMPUTING"]
    assert rows[2].split() == ["desk", "training", "3", "2.500", "1234", "75%"]
    assert rows[3].split() == ["p2", "resting", "2", "0", "0%"]
    assert json.loads(shoal("train", "status", "tiny", "--json").out) == [RUN]
    assert [body for _, body in daemon.seen] == [{"run": ""}, {"run": "tiny"}]


def test_no_run_is_said_so(shoal, daemon):
    daemon.answers["/shoal/train/status"] = (200, {"runs": []})
    outcome = shoal("train", "status")
    assert (outcome.status, outcome.out) == (0, "")
    assert "no training run" in outcome.err


def test_stop_and_export(shoal, daemon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    daemon.answers["/shoal/train/stop"] = (200, {"stopped": "tiny"})
    daemon.answers["/shoal/train/export"] = (200, {"directory": str(tmp_path / "out")})
    assert shoal("train", "stop", "tiny").out == "this node has left tiny\n"
    assert shoal("train", "export", "tiny", "out").out == f"tiny is in {tmp_path / 'out'}\n"
    assert daemon.seen == [
        ("/shoal/train/stop", {"run": "tiny"}),
        ("/shoal/train/export", {"run": "tiny", "directory": str(tmp_path / "out"), "serve": ""}),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to train"),
        (["absent.toml"], "absent.toml is no file"),
        (["stop"], "say which run to leave"),
        (["export", "tiny"], "say which run and where to"),
        (["status", "a", "b"], "status takes one run at most"),
        (["--join", "tiny", "stop"], "--join takes part in one run and nothing else"),
    ],
)
def test_wrong_usage_is_one_clear_line(shoal, daemon, words, said):
    outcome = shoal("train", *words)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert daemon.seen == []


def test_what_the_daemon_refuses_is_one_clear_line(shoal, daemon, recipe):
    said = "train.lr: got 'fast', expected a number from 1e-09 to 10"
    daemon.answers["/shoal/train"] = (400, {"error": {"message": said}})
    outcome = shoal("train", str(recipe))
    assert (outcome.status, outcome.err) == (1, f"shoal: {said}\n")
