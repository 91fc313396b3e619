"""`shoal bench allreduce` averages over real processes and prints figures that hang together."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("codec", "error_max"), [("fp32", 1e-6), ("int8", 0.02)])
def test_the_figures_of_two_peers(tmp_path, tools, codec, error_max):
    command = [
        sys.executable,
        "-m",
        "shoal",
        "bench",
        "allreduce",
        "--peers",
        "2",
        "--mib",
        "2",
        "--codec",
        codec,
    ]
    done = subprocess.run(
        [*command, "--rounds", "2", "--json"], env=tools.environment(tmp_path), capture_output=True, text=True,
        timeout=240, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["peers"] == 2
    assert found["rounds"] == 2
    assert 0 < found["min_s"] <= found["median_s"] <= found["max_s"]
    assert found["mb_per_s"] == pytest.approx(2 * (1 << 20) / 1e6 / found["median_s"])
    assert found["rel_l2_error"] <= error_max
    # Half of what is averaged goes out as contributions, half as results.
    encoded_bytes = {"fp32": 2 << 20, "int8": (2 << 20) / 4 * (1 + 4 / 256)}[codec]
    assert found["bytes_sent_per_peer"] == pytest.approx(encoded_bytes, rel=0.15)
    assert found["encrypted"] is True
    assert found["paths"] == ["direct"]


def test_an_unknown_codec_is_wrong_usage_in_one_line(tmp_path, tools):
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "bench", "allreduce", "--codec", "zip9", "--mib", "1"],
        env=tools.environment(tmp_path), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "zip9" in done.stderr
    assert done.stderr.count("\n") == 1
