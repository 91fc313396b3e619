"""`shoal bench diloco` from its flags to its figures, on a text and for as few steps as show them."""

import json

import pytest

from shoal.bench_diloco import diloco
from shoal.cli_parser import build_parser
from shoal.errors import ShoalError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{n} times {n + 1} is {n * (n + 1)}.\n" for n in range(800)))
    return path


def bench(capsys, *words):
    options = build_parser().parse_args(["bench", "diloco", *map(str, words)])
    assert diloco(options) == 0
    return capsys.readouterr().out


def test_it_prints_loss_and_bytes_of_both(text, capsys):
    words = ("--corpus", text, "--workers", 2, "--inner-steps", 2, "--steps", 4, "--failure-every", 60)
    found = json.loads(bench(capsys, *words, "--json"))
    apart, together = found["diloco"], found["data_parallel"]
    assert apart["tokens"] == together["tokens"] == 2 * 4 * 12 * 64
    assert apart["rounds"] == 2
    assert found["bytes_ratio"] == pytest.approx(2 * 3.9, rel=0.03)
    assert found["loss_difference"] == pytest.approx(apart["val_loss"] - together["val_loss"])
    assert 0.5 < found["goodput"]["60"] <= 1


def test_streaming_through_deaths_as_a_table(text, capsys):
    words = ("--streaming", "--inner-steps", 4, "--steps", 6, "--churn", 0.3, "--workers", 2, "--alone")
    shown = bench(capsys, "--corpus", text, *words)
    assert "val_loss" in shown
    assert "QUIET" in shown
    assert "int4" in shown


def test_wrong_values_are_named(text, capsys, tmp_path):
    with pytest.raises(ShoalError, match="is no file"):
        bench(capsys, "--corpus", tmp_path / "absent.txt")
    with pytest.raises(ShoalError, match="--inner-steps 9 are more than --steps 3"):
        bench(capsys, "--corpus", text, "--steps", 3, "--inner-steps", 9)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ShoalError, match="training tokens"):
        bench(capsys, "--corpus", tmp_path / "short.txt", "--steps", 2, "--inner-steps", 1)
