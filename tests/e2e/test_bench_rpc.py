"""`shoal bench rpc` measures a real pair of processes and prints figures that hang together."""

import json
import subprocess
import sys

import pytest


def bench(tools, tmp_path, *options):
    return subprocess.run(
        [sys.executable, "-m", "shoal", "bench", "rpc", *options],
        env=tools.environment(tmp_path), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_the_figures_of_two_processes(tmp_path, tools):
    done = bench(
        tools, tmp_path, "--round-trips", "50", "--at-once", "1000", "--calls", "1000", "--connections", "2",
        "--bulk-mib", "8", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind in ("rtt_us", "channel_rtt_us"):
        assert list(found[kind]) == ["16", "8192", "65536"]
        assert all(0 < one["p50"] <= one["p99"] for one in found[kind].values())
    assert found["at_once"]["completed"] == found["at_once"]["calls"] == 1000
    left = found["left_behind"]
    assert (left["streams"], left["tasks"], left["in_flight"]) == (0, 0, 0)
    assert 0 < found["first_connection_ms"]["p50"] <= found["first_connection_ms"]["max"]
    assert found["bulk_path"] == "direct"
    assert found["stream_path"] == "stream"
    for name in ("bulk_mb_per_s", "stream_mb_per_s", "stream_each_of_both_ways_mb_per_s"):
        assert found[name] > 0
    assert found["encrypted"] is True


@pytest.mark.parametrize("wrong", [("--calls", "0"), ("--bulk-mib", "much")])
def test_wrong_numbers_are_wrong_usage_in_one_line(tmp_path, tools, wrong):
    done = bench(tools, tmp_path, *wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr
    assert done.stderr.count("\n") == 1
