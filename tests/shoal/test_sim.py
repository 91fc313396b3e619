"""`shoal sim`: flags to figures, a table, JSON and pictures."""

import json

import pytest

from shoal.cli import main

QUICK = ["sim", "--nodes", "12", "--layers", "24", "--hours", "0.01", "--rate", "1"]


def test_the_figures_come_as_one_json_object(capsys):
    assert main([*QUICK, "--json", "--policy", "petals", "--seed", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["policy"], found["nodes"], found["layers"], found["seed"]) == ("petals", 12, 24, 3)
    assert found["requests"] == found["done"] + found["failed"]


def test_all_policies_are_rows_of_one_table_and_lines_of_the_pictures(capsys, tmp_path):
    assert main([*QUICK, "--policy", "all", "--plot", str(tmp_path / "new" / "place")]) == 0
    shown = capsys.readouterr()
    for name in ("shoal", "petals", "parallax", "random"):
        assert name in shown.out
    assert "the best other" in shown.err + shown.out
    pictures = sorted(path.name for path in (tmp_path / "new" / "place").iterdir())
    assert pictures == ["goodput.svg", "times.svg"]


def test_a_trace_is_taken_by_its_path(capsys, tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    assert main([*QUICK, "--trace", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 36


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--trace", "none.csv"], 2, "can be read"),
        (["--churn-per-hour", "-1"], 2, "not a share"),
        (["--hours", "0"], 2, "above 0"),
        (["--policy", "best"], 2, "invalid choice"),
        (["--nodes", "1"], 1, "short"),
        (["--nodes", "1", "--policy", "all"], 1, "short"),
    ],
)
def test_what_cannot_be_simulated_is_one_plain_line(more, status, said, capsys):
    assert main([*QUICK, *more]) == status
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_the_mesh_is_as_the_flags_say(capsys, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[[1, 80], [80, 1]]")
    flags = ["--gateways", "3", "--view-age", "1", "--ttft", "7", "--tpot", "0.3", "--copies", "1"]
    flags += ["--crash-share", "0", "--return-share", "1", "--diurnal", "0", "--latencies", str(rows)]
    assert main([*QUICK, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == {"ttft_s": 7.0, "tpot_s": 0.3}
    rows.write_text("[1, 2]")
    assert main([*QUICK, *flags]) == 2
    assert "milliseconds" in capsys.readouterr().err


def test_the_highest_load_that_is_borne_is_found(capsys):
    assert main([*QUICK, "--capacity", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shoal"]["requests_per_s"] > 0


def test_a_folder_that_cannot_be_made_is_said(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--plot", str(tmp_path / "file" / "in")]) == 1
    assert "cannot be written" in capsys.readouterr().err
