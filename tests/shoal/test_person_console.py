"""What the daemon says to a script, to a log and to a person at a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from node.console import Console, set_up_logging
from node.gateway import ModelInfo
from shoal.cli_up import PersonConsole, greeting

API, PEER = "http://127.0.0.1:8080", "12D3KooWx"


def model(name: str, *, ready: bool = True, detail: str = "") -> ModelInfo:
    return ModelInfo(name, "m", 0, 512, 8, ready, detail)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_terminal(monkeypatch):
    """Call it in the test, because pytest changes stderr between set-up and test."""

    def begin() -> Tty:
        stream = Tty()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        return stream

    return begin


@pytest.fixture
def root_logger():
    """Logging as it was before, after the test."""
    loggers = [logging.getLogger(), *map(logging.getLogger, ("shoal", "p2p", "dht", "libp2p", "node"))]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_a_script_gets_the_ready_line_once_and_nothing_else(capsys):
    console = Console()
    console.busy("reading", 0.5)
    console.ready(API, PEER, [model("a")])
    console.ready(API, PEER, [])
    console.stopping()
    assert capsys.readouterr() == (f"ready api={API} peer={PEER}\n", "")


def test_a_failure_is_one_line(capsys):
    Console().failed(ValueError("two\n  lines"))
    assert capsys.readouterr() == ("", "shoal: two lines\n")


def test_a_person_sees_progress_then_what_to_do_next(capsys, at_terminal):
    tty = at_terminal()
    console = PersonConsole("/d e")
    console.busy("reading big", 0.5)
    console.ready(API, PEER, [model("big")])
    assert capsys.readouterr().out == f"ready api={API} peer={PEER}\n"
    said = tty.getvalue()
    assert "reading big" in said
    assert f"{API}/v1" in said
    assert """run big "..." --data-dir '/d e'""" in said
    assert said.endswith("Ctrl-C stops this node.\n")
    before = tty.getvalue()
    console.busy("joining")
    assert tty.getvalue() == before


def test_the_cursor_is_back_when_the_daemon_is_told_to_stop(at_terminal):
    tty = at_terminal()
    console = PersonConsole()
    console.busy("starting")
    console.stopping()
    assert tty.getvalue().rfind("\x1b[?25h") > tty.getvalue().rfind("\x1b[?25l") >= 0


def test_the_greeting_says_why_a_model_is_not_served():
    lines = greeting(API, [model("a", ready=False, detail="needs 9 GiB"), model("b")], "shoal")
    assert "  a is not served yet: needs 9 GiB" in lines
    assert '  ask it            shoal run b "..."' in lines


def test_nobody_is_told_to_ask_a_node_without_models():
    assert not any("run" in line for line in greeting(API, [], "shoal"))


@pytest.mark.parametrize(("level", "heard"), [("warning", ["odd"]), ("info", ["usual", "odd"])])
def test_libraries_are_not_heard_below_an_error(capsys, root_logger, level, heard):
    set_up_logging(level)
    logging.getLogger("p2p.host").info("usual")
    logging.getLogger("shoal.mesh").warning("odd")
    logging.getLogger("multiaddr").warning("chatter")
    logging.getLogger("libp2p.x").error("chatter")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == heard


def test_log_lines_go_where_stderr_is_now(monkeypatch, root_logger):
    set_up_logging("warning")
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logging.getLogger("shoal.mesh").warning("odd")
    assert later.getvalue().endswith("odd\n")
