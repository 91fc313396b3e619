"""The benchmark of links between two processes measures what it says."""

import pytest

from p2p.links.bench import BenchConfig, measure


@pytest.mark.parametrize("path", ["direct", "stream"])
def test_two_processes_are_measured(path):
    figures = measure(BenchConfig(total_bytes=4 << 20, path=path))
    assert figures["path"] == path
    assert figures["sockets"] == (1 if path == "direct" else 0)
    for name in ("one_way_gb_per_s", "both_ways_gb_per_s", "one_way_cpu_s_per_gb", "echo_8k_us"):
        assert figures[name] > 0
