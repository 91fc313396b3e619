"""`shoal run`: what it asks, what it prints, and its figures."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from shoal.cli_run import Figures, generate
from shoal.daemon_client import DaemonClient
from shoal.terminal import program
from testnet.fake_daemon import TEXT


def test_text_goes_to_stdout_and_nothing_else(shoal, daemon):
    outcome = shoal("run", "tiny", "hello")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == TEXT + " \n"


def test_request_carries_only_what_was_asked_for(shoal, daemon):
    shoal("run", "tiny", "hello")
    plain = {"model": "tiny", "max_tokens": 128, "stream": True, "stream_options": {"include_usage": True}}
    assert daemon.seen == [("/v1/completions", plain | {"prompt": "hello"})]
    daemon.seen.clear()
    shoal(
        "run",
        "tiny",
        "hello",
        "--chat",
        "--temperature",
        "0",
        "--top-p",
        "0.5",
        "--seed",
        "0",
        "--max-tokens",
        "2",
    )
    path, body = daemon.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0, 0.5, 0, 2)


def test_chat_streams_too(shoal, daemon):
    assert shoal("run", "tiny", "hello", "--chat", "--max-tokens", "2").out == "the sea \n"


def test_prompt_from_stdin(shoal, daemon, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    shoal("run", "tiny", "-")
    assert daemon.seen[0][1]["prompt"] == "from a pipe\n"


def test_json_has_text_and_figures(shoal, daemon):
    document = json.loads(shoal("run", "tiny", "hello", "--json", "--max-tokens", "3").out)
    assert document["text"] == "the sea is "
    assert (document["finish_reason"], document["prompt_tokens"], document["completion_tokens"]) == (
        "length",
        3,
        3,
    )
    assert document["ttft_s"] > 0


def test_stats_go_to_stderr(shoal, daemon):
    assert "3 tokens, first after" in shoal("run", "tiny", "hello", "--stats", "--max-tokens", "3").err


def test_figures_are_those_of_the_clock(daemon):
    ticks = iter([10.0, 10.5, 10.75, 11.0])
    figures = Figures()
    body = {"max_tokens": 3}
    list(generate(DaemonClient(daemon.api), "/v1/completions", body, figures, clock_s=lambda: next(ticks)))
    assert (figures.ttft_s, figures.tokens_per_s) == (0.5, 4.0)
    assert figures.line() == "3 tokens, first after 500 ms, 4.0 tokens/s"


@pytest.mark.parametrize(
    ("figures", "line"), [(Figures(), "0 tokens"), (Figures(1.0, 1.0, 1, 1), "1 token, first after 1 s")]
)
def test_short_answers_have_no_speed(figures, line):
    assert figures.line() == line


def test_unknown_model_is_one_line(shoal, daemon):
    error = {"error": {"message": "the model 'x' does not exist in this mesh", "code": "model_not_found"}}
    daemon.answers["/v1/completions"] = (404, error)
    outcome = shoal("run", "x", "hello")
    assert (outcome.status, outcome.out) == (1, "")
    said = f"the model 'x' does not exist in this mesh; see: {program()} models"
    assert outcome.err == f"shoal: {said}\n"


@pytest.mark.parametrize(("person", "out"), [(True, "half a sen\n"), (False, "half a sen")])
def test_an_answer_that_breaks_off_ends_its_line_before_the_reason_is_said(
    shoal, daemon, monkeypatch, person, out
):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: person)
    events = [{"choices": [{"text": "half a sen"}]}, {"error": {"message": "node-3 was lost"}}]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    daemon.answers["/v1/completions"] = (200, stream.encode())
    outcome = shoal("run", "tiny", "hello")
    assert (outcome.status, outcome.out, outcome.err) == (1, out, "shoal: node-3 was lost\n")


def test_generated_text_cannot_steer_a_terminal(shoal, daemon, monkeypatch):
    monkeypatch.setattr("shoal.terminal.is_terminal", lambda stream: True)
    daemon.text = "a\x1b[2Jb"
    assert shoal("run", "tiny", "hello").out == "a[2Jb \n"


def test_in_a_pipe_the_text_is_untouched(shoal, daemon):
    daemon.text = "a\x1b[2Jb"
    assert shoal("run", "tiny", "hello").out == "a\x1b[2Jb \n"


def test_ctrl_c_is_silent_and_130(daemon):
    daemon.hold.set()
    command = [sys.executable, "-m", "shoal", "run", "tiny", "hello", "--api", daemon.api]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, b"")


@pytest.mark.parametrize(
    "arguments", [["run", "tiny", "hello", "--max-tokens", "100000"], ["status", "--json"]]
)
def test_a_reader_that_leaves_is_no_fault(daemon, arguments):
    daemon.text = "word " * 20_000
    daemon.answers["/mesh"] = (200, {"mesh": "m" * 1_000_000})
    command = [sys.executable, "-m", "shoal", *arguments, "--api", daemon.api]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        errors = process.stderr.read() if process.stderr else b""
        process.wait(timeout=20)
    assert (process.returncode, errors) == (141, b"")
