"""Finding the daemon, and what its answers and silences become."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from node.config import load_config
from shoal import daemon_client
from shoal.daemon_client import DaemonClient, connect, data_dir, one_event, read_address
from shoal.errors import (
    CommandFailed,
    DaemonAbsent,
    DaemonGarbled,
    DaemonRefused,
    DaemonSilent,
    ResourceLimit,
    UsageProblem,
)


@pytest.mark.parametrize("flag", [None, "/from/flag"])
@pytest.mark.parametrize("variable", [None, "/from/env"])
@pytest.mark.parametrize("file", [None, "/from/file"])
@pytest.mark.parametrize("xdg", [None, "/xdg"])
def test_data_dir_is_the_one_that_the_daemon_would_use(tmp_path, flag, variable, file, xdg):
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    if variable:
        env["SHOAL_DATA_DIR"] = variable
    if xdg:
        env["XDG_DATA_HOME"] = xdg
    if file:
        (tmp_path / "shoal").mkdir()
        (tmp_path / "shoal" / "config.toml").write_text(f'data_dir = "{file}"\n')
    assert data_dir(flag, env) == load_config({"data_dir": flag}, env).data_dir


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"pid": "x", "api": 1, "peer": 2}', "\x00"])
def test_unreadable_address_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "daemon.json").write_text(content)
    assert read_address(tmp_path) is None


def test_no_daemon_says_how_to_start_one(home):
    with pytest.raises(DaemonAbsent, match="shoal up"):
        connect(None, None)


def test_address_left_by_a_killed_daemon_is_reported_as_absent(home):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    directory = home / "data" / "shoal"
    directory.mkdir(parents=True)
    (directory / "daemon.json").write_text(
        json.dumps({"pid": 1, "api": f"http://127.0.0.1:{port}", "peer": "p"})
    )
    with pytest.raises(DaemonAbsent, match=r"process 1.*refused.*shoal up"):
        connect(None, None).get("/mesh")


@pytest.mark.parametrize(
    ("given", "api"),
    [
        ("127.0.0.1:81", "http://127.0.0.1:81"),
        ("http://0.0.0.0:81/", "http://127.0.0.1:81"),
        ("http://[::]:81", "http://[::1]:81"),
        ("https://mesh.example", "https://mesh.example:443"),
    ],
)
def test_addresses(given, api):
    assert DaemonClient(given).api == api


@pytest.mark.parametrize("given", ["", "http://", "ftp://a:1", "http://a:99999", "http://a:b"])
def test_addresses_that_cannot_be(given):
    with pytest.raises(UsageProblem):
        DaemonClient(given)


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (
            400,
            {"error": {"message": "no such model", "code": "model_not_found"}},
            DaemonRefused,
            "no such model",
        ),
        (500, {"error": "plain"}, DaemonRefused, "plain"),
        (500, b"<html>", DaemonRefused, "500"),
        (404, {"detail": "Not Found"}, DaemonGarbled, "/mesh"),
        (404, {"error": {"message": "gone"}}, DaemonRefused, "gone"),
        (200, b"", DaemonGarbled, "not JSON"),
        (200, b"[1]", DaemonGarbled, "not a JSON object"),
        (200, b"[" * 100_000, DaemonGarbled, "not JSON"),
    ],
)
def test_answers_that_are_errors(daemon, status, body, error, says):
    daemon.answers["/mesh"] = (status, body)
    with pytest.raises(error, match=says):
        connect(None, None).get("/mesh")


def raw_server(answer: bytes, *, then_close: bool = True) -> str:
    """Serve exactly `answer` to one connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        link, _ = listener.accept()
        with listener, link:
            link.recv(65536)
            link.sendall(answer)
            if not then_close:
                link.recv(1)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def chunked(*lines: str, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [f"{len(line):x}\r\n{line}\r\n".encode() for line in lines]
    return head + b"".join(parts) + (b"0\r\n\r\n" if end else b"")


def test_busy_daemon_says_when_to_come_back():
    body = b'{"error": {"message": "no room"}}'
    answer = b"HTTP/1.1 429 Busy\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with pytest.raises(ResourceLimit, match=r"no room \(try again in 3 s\)") as caught:
        DaemonClient(raw_server(answer)).get("/x")
    assert caught.value.retry_after_s == 3.0


def test_silent_daemon_is_given_up():
    client = DaemonClient(raw_server(b"", then_close=False), answer_timeout_s=0.05)
    with pytest.raises(DaemonSilent, match="does not answer"):
        client.get("/x")


def test_events_end_at_done_and_skip_comments():
    api = raw_server(chunked(": hi\n\n", 'data: {"a": 1}\n\n', "data: [DONE]\n\n", 'data: {"a": 2}\n\n'))
    assert list(DaemonClient(api).events("/x", {})) == [{"a": 1}]


@pytest.mark.parametrize("end", [True, False])
def test_stream_that_breaks_off_is_an_error(end):
    api = raw_server(chunked('data: {"a": 1}\n\n', end=end))
    events = DaemonClient(api).events("/x", {})
    assert next(events) == {"a": 1}
    with pytest.raises(DaemonSilent):
        next(events)


def test_error_within_a_stream_is_raised():
    api = raw_server(chunked('data: {"error": {"message": "node b was lost"}}\n\n'))
    with pytest.raises(DaemonRefused, match="node b was lost"):
        list(DaemonClient(api).events("/x", {}))


def test_overlong_line_is_refused(monkeypatch):
    monkeypatch.setattr(daemon_client, "LINE_BYTES_MAX", 100)
    with pytest.raises(DaemonGarbled, match="line"):
        list(DaemonClient(raw_server(chunked("x" * 300))).ndjson("/x", {}))


def test_overlong_body_is_refused(monkeypatch):
    monkeypatch.setattr(daemon_client, "BODY_BYTES_MAX", 10)
    with pytest.raises(DaemonGarbled, match="more than"):
        DaemonClient(raw_server(chunked('{"a": "' + "x" * 30 + '"}'))).get("/x")


def test_api_key_is_sent(monkeypatch):
    monkeypatch.setenv("SHOAL_API_KEY", "secret")
    assert daemon_client._headers(None)["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("error", ["disk full", {"message": "disk full"}])
def test_failure_among_progress_events(error):
    with pytest.raises(CommandFailed, match="disk full"):
        one_event({"error": error})


def test_home_is_expanded():
    assert data_dir("~/x") == Path(os.path.expanduser("~/x"))
