"""What `shoal up` and `shoal join` hand to the daemon."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from node.config import DaemonConfig, ModelSource
from node.errors import DataDirProblem
from shoal.cli_up import moved
from shoal.errors import DaemonAbsent, DaemonSilent
from testnet.fake_daemon import FakeDaemon

FLAGS = [
    *("--data-dir", "/d", "--name", "n", "--log-level", "debug", "--api", "127.0.0.1:0"),
    *("--listen", "/ip4/1.2.3.4/tcp/1", "--listen", "/ip4/1.2.3.4/tcp/2", "--public", "--model", "embedded"),
    *("--model", "/m=x", "--memory", "6MiB", "--copies", "2", "--layers", "0:4", "--device", "cpu"),
    *(
        "--dtype",
        "float32",
        "--kv-quant",
        "int8",
        "--quant",
        "int8",
        "--threads",
        "1",
        "--disk",
        "1GiB",
        "--concurrency",
        "3",
        "--no-serve",
    ),
]


@pytest.fixture
def started(monkeypatch) -> list[DaemonConfig]:
    """The configurations that a daemon was started with; none really starts."""
    configs: list[DaemonConfig] = []
    module = types.ModuleType("node.daemon")
    module.run_daemon = lambda config, console: configs.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "node.daemon", module)
    return configs


def test_without_flags_the_defaults_hold(shoal, started, home):
    assert shoal("up").status == 0
    assert started == [DaemonConfig(data_dir=home / "data" / "shoal")]


def test_every_flag_arrives(shoal, started):
    assert shoal("up", *FLAGS, "--join", "shoal1-x").status == 0
    config = started[0]
    assert config == DaemonConfig(
        data_dir=Path("/d"),
        api_port=0,
        listen=("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/2"),
        join="shoal1-x",
        public=True,
        models=(ModelSource("embedded", "embedded"), ModelSource("/m", "x")),
        layers=(0, 4),
        dtype="float32",
        quant="int8",
        kv_quant="int8",
        serve=False,
        memory_bytes=6 << 20,
        disk_bytes=1 << 30,
        copies=2,
        concurrency=3,
        threads=1,
        name="n",
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("flags", "level"),
    [([], "warning"), (["-v"], "info"), (["-vv"], "debug"), (["-v", "--log-level", "error"], "error")],
)
def test_a_person_hears_only_what_matters_unless_asked_for(shoal, started, flags, level):
    shoal("up", *flags)
    assert started[0].log_level == level


def test_settings_file(shoal, started, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('name = "from file"\ncopies = 3\n')
    shoal("up", "--config", str(file), "--copies", "4")
    assert (started[0].name, started[0].copies) == ("from file", 4)
    assert shoal("up", "--config", str(tmp_path / "absent.toml")).status == 2


def test_the_daemons_own_status_is_passed_on(shoal, started, monkeypatch):
    monkeypatch.setattr(sys.modules["node.daemon"], "run_daemon", lambda config, console: 1)
    assert shoal("up").status == 1


def test_a_problem_of_the_daemon_is_one_line(shoal, started, monkeypatch):
    def fail(config, console):
        raise DataDirProblem("/d", "cannot be written: read-only file system")

    monkeypatch.setattr(sys.modules["node.daemon"], "run_daemon", fail)
    outcome = shoal("up")
    assert (outcome.status, outcome.err) == (1, "shoal: /d cannot be written: read-only file system\n")


def test_join_asks_the_running_daemon_and_waits_until_it_met_somebody(shoal, started, daemon):
    with FakeDaemon("node-2") as founder:
        outcome = shoal("join", f"shoal1-fake-{founder.api[7:]}")
    assert outcome.status == 0
    assert outcome.out == f"the node at {daemon.api} already belongs to mesh fa4e, with 1 other node\n"
    assert ("/shoal/join", {"invite": f"shoal1-fake-{founder.api[7:]}"}) in daemon.seen
    assert started == []


def test_join_says_when_nobody_answers_at_the_invites_addresses(shoal, started, daemon, monkeypatch):
    monkeypatch.setattr("shoal.cli_up.MOVE_WAIT_S", 0.0)
    daemon.answers["/shoal/join"] = (200, {"joined": True})
    outcome = shoal("join", "shoal1-a")
    assert outcome.status == 1
    assert "none of the invite's addresses answers yet; it keeps trying" in outcome.err
    assert outcome.err.count("\n") == 1


def test_join_outlasts_the_moment_in_which_the_daemon_changes_over():
    class Client:
        api = "http://a"
        answers = iter(
            [
                DaemonSilent("stopped answering"),
                DaemonAbsent("refused"),
                {"mesh": "new", "nodes": [{"self": True}]},
                {"mesh": "new", "nodes": [{"self": True}, {"connected": True}, {"connected": True}]},
            ]
        )

        def get(self, path):
            answer = next(self.answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    said = moved(Client(), "old", sleep=lambda seconds: None)
    assert said == "the node at http://a now belongs to mesh new, with 2 other nodes"


def test_join_reports_a_bad_invite_of_the_running_daemon(shoal, started, daemon):
    outcome = shoal("join", "nonsense")
    assert (outcome.status, outcome.err) == (1, "shoal: the invite does not start with shoal1-\n")


def test_join_starts_a_daemon_where_none_runs(shoal, started):
    assert shoal("join", "shoal1-a\n b", *FLAGS).status == 0
    assert started[0].join == "shoal1-ab"
    assert started[0].memory_bytes == 6 << 20


def test_join_starts_a_daemon_where_one_was_killed(shoal, started, daemon):
    daemon.__exit__()
    assert shoal("join", "shoal1-a").status == 0
    assert started[0].join == "shoal1-a"


def test_a_fault_of_our_own_is_one_line_too(shoal, started, monkeypatch):
    def bug(config, console):
        raise KeyError("x")

    monkeypatch.setattr(sys.modules["node.daemon"], "run_daemon", bug)
    outcome = shoal("up")
    assert outcome.status == 1
    assert (
        outcome.err == "shoal: this is a fault of shoal itself: KeyError: 'x' (SHOAL_DEBUG=1 shows where)\n"
    )
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    with pytest.raises(KeyError):
        shoal("up")
