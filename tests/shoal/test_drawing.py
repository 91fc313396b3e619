"""Sizes, times, tables, progress, bars and codes."""

from __future__ import annotations

import argparse
import io
import sys

import pytest
from rich.console import Console

from shoal import terminal
from shoal.mesh_picture import layer_bar, mesh_picture
from shoal.mesh_view import MeshView, SpanView
from shoal.qr import QUIET_MODULES, half_blocks


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (250 << 30, "250 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes(count, text):
    assert terminal.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0874, "87 ms"),
        (2.44, "2.4 s"),
        (5.0, "5 s"),
        (12.6, "13 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (5400, "1 h 30 min"),
        (86400, "1 day"),
        (90000, "1 day 1 h"),
        (7 * 86400, "7 days"),
    ],
)
def test_durations(seconds, text):
    assert terminal.duration(seconds) == text


def test_plain_table_keeps_long_values_whole(capsys):
    terminal.table(("a", "n"), [("x" * 200, "1"), ("y", "22")], right=("n",))
    assert capsys.readouterr().out == f"{'A'.ljust(200)}   N\n{'x' * 200}   1\n{'y'.ljust(200)}  22\n"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "is_one"), [("xterm", True), ("dumb", False), ("", True)])
def test_what_counts_as_a_terminal(monkeypatch, term, is_one):
    monkeypatch.setenv("TERM", term)
    assert terminal.is_terminal(Tty()) is is_one
    assert terminal.is_terminal(io.StringIO()) is False


def test_closed_stream_is_no_terminal():
    stream = Tty()
    stream.close()
    assert terminal.is_terminal(io.StringIO()) is False


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal.console().print("x", style="red")
    assert "\x1b[31m" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.console().print("x", style="red")
    assert sys.stdout.getvalue() == "x\n"


def test_progress_without_a_terminal_mentions_only_what_takes_long(capsys):
    times = iter([0.0, 0.5, 0.6, 1.7, 1.8])
    show = terminal._line_progress(clock_s=lambda: next(times))
    show("quick", 0.0)
    show("quick", 1.0)
    show("slow", 0.0)
    show("slow", 0.5, "half")
    show("slow", 0.9, "more")
    assert capsys.readouterr().err == "slow: half\n"


def test_progress_bar_finishes_the_steps_before(monkeypatch):
    stream = Tty()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress() as show:
        show("first", None)
        show("second", 0.5, "1 MiB")
    assert "✓" in stream.getvalue()
    assert "1 MiB" in stream.getvalue()


def test_a_long_detail_leaves_label_and_bar_whole(monkeypatch):
    stream = Tty()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with terminal.progress() as show:
        show(
            "spreading dice",
            0.0,
            "needs 2.2 MiB for weights and cache, the mesh offers 2.1 MiB: 74 KiB short",
        )
    line = stream.getvalue().splitlines()[-2]
    assert "spreading dice" in line
    assert "needs 2.2 MiB" in line
    assert "…" in line


@pytest.mark.parametrize(
    ("api", "data_dir", "words"),
    [
        (None, None, ""),
        ("http://a:1", None, " --api http://a:1"),
        (None, "/d e", " --data-dir '/d e'"),
        ("x", "y", " --api x"),
    ],
)
def test_the_next_command_asks_the_same_daemon(api, data_dir, words):
    assert terminal.aim(argparse.Namespace(api=api, data_dir=data_dir)) == words


def test_quiet_progress_is_silent(capsys):
    with terminal.progress(quiet=True) as show:
        show("x", 0.5)
    assert capsys.readouterr() == ("", "")


def test_generated_text_loses_control_characters_only():
    assert terminal.safe_for_terminal("a\x1b\x07\x9b\x7f\tö\n│") == "a\tö\n│"


@pytest.mark.parametrize("layers", [1, 5, 8, 24, 25, 80, 1000])
def test_a_bar_covers_each_layer_once(layers):
    cut = max(1, layers // 2)
    parts = [SpanView("x", 0, cut, "ready"), SpanView("x", cut, layers, "ready")]
    bars = [layer_bar(part, layers, "cyan").plain for part in parts]
    assert len(bars[0]) == len(bars[1]) <= 24
    held = [{i for i, cell in enumerate(bar) if cell == "━"} for bar in bars]
    assert not held[0] & held[1]
    assert held[0] | held[1] == set(range(len(bars[0])))


@pytest.mark.parametrize(
    ("span", "bar"),
    [
        (None, "────────"),
        (SpanView("x", 0, 2, "ready"), "━━──────"),
        (SpanView("x", 2, 6, "loading", progress=0.5), "──╸╸────"),
        (SpanView("x", 2, 6, "failed"), "──━━━━──"),
    ],
)
def test_bar_states(span, bar):
    assert layer_bar(span, 8, "cyan", cells=8).plain == bar


def test_bar_colours_tell_failed_from_ready():
    styles = {
        state: str(layer_bar(SpanView("x", 0, 8, state), 8, "cyan").spans[0].style)
        for state in ("ready", "failed")
    }
    assert styles == {"ready": "cyan", "failed": "red"}


@pytest.mark.parametrize(("width", "shown"), [(80, False), (110, True)])
def test_a_picture_fits_its_terminal(width, shown):
    span = {"model": "m", "start": 0, "end": 8, "state": "ready", "bytes_fetched": 2_900_000}
    node = {"peer": "12D3KooWabcdefgh", "name": "node-1", "memory_bytes": 6 << 20, "connected": True}
    mesh = MeshView.parse({"nodes": [{**node, "spans": [span]}], "models": [{"name": "m", "layers": 8}]})
    screen = Console(width=width, file=io.StringIO())
    screen.print(mesh_picture(mesh, width))
    text = screen.file.getvalue()
    assert ("abcdefgh" in text) is shown
    assert all(words in text for words in ("node-1", "6.0 MiB", "0-7", "2.8 MiB", "serving"))


def test_picture_names_models_where_there_are_several():
    span = {"model": "b", "start": 0, "end": 4, "state": "ready"}
    models = [
        {"name": "a", "layers": 4, "detail": "2 GiB short"},
        {"name": "b", "layers": 4, "ready": True, "copies_min": 1},
    ]
    nodes = [{"peer": "p", "name": "n", "connected": True, "spans": [span]}]
    out = io.StringIO()
    Console(file=out, width=120).print(mesh_picture(MeshView.parse({"nodes": nodes, "models": models})))
    assert "0-3  b" in out.getvalue()
    assert "○ a" in out.getvalue()
    assert "2 GiB short" in out.getvalue()


@pytest.mark.parametrize("side", [21, 22])
def test_code_can_be_read_back_from_its_blocks(side):
    matrix = [[(row * 7 + column * row) % 3 == 0 for column in range(side)] for row in range(side)]
    lines = half_blocks(matrix)
    assert len({len(line) for line in lines}) == 1
    rows = (
        [[cell in "▀█" for cell in line] for line in lines],
        [[cell in "▄█" for cell in line] for line in lines],
    )
    modules = [row for pair in zip(*rows, strict=True) for row in pair]
    margin = QUIET_MODULES
    assert [row[margin : margin + side] for row in modules[margin : margin + side]] == matrix
    assert not any(any(row) for row in modules[:margin] + modules[margin + side :])


def test_inverted_code_is_the_exact_opposite():
    matrix = [[(row + column) % 3 == 0 for column in range(21)] for row in range(21)]
    opposite = str.maketrans(" ▀▄█", "█▄▀ ")
    assert [line.translate(opposite) for line in half_blocks(matrix, inverted=True)] == half_blocks(matrix)


def test_program_is_the_script_on_the_path(monkeypatch, tmp_path):
    script = tmp_path / "with space" / "shoal"
    script.parent.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(script.parent))
    monkeypatch.setattr("shutil.which", lambda _: str(script))
    assert terminal.program() == "shoal"
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert terminal.program().endswith(" -m shoal")
    script.touch()
    assert terminal.program() == f"'{script}'"
    monkeypatch.chdir(tmp_path)
    assert terminal.program() == "'with space/shoal'"
