"""What is measured of a machine with one device or several."""

from __future__ import annotations

import pytest
import torch

from node import hardware
from node.hardware import device_names, measure, split_bytes


@pytest.fixture
def bench(monkeypatch):
    """Two fake GPUs and a processor; the devices that were measured, in order."""
    seen = []
    figures = {"cuda:0": (4e12, 8e11), "cuda:1": (2e12, 4e11), "cpu": (1e11, 2e10)}
    free = {"cuda:0": 24_000, "cuda:1": 8_000, "cpu": 6_000}

    def micro_benchmark(device, dtype, budget_s):
        seen.append(device)
        return dict(zip(("flops_per_s", "read_bytes_per_s"), figures[device], strict=True))

    monkeypatch.setattr(hardware, "micro_benchmark", micro_benchmark)
    monkeypatch.setattr(hardware, "_free_bytes", free.__getitem__)
    return seen


def test_one_device_is_what_it_was(bench):
    found = measure("cpu", "auto", 5_000)
    assert (found.device, found.memory_bytes, found.flops_per_s, found.read_bytes_per_s) == (
        "cpu",
        5_000,
        1e11,
        2e10,
    )
    assert len(found.devices) == 1


def test_several_devices_share_the_owner_s_cap_by_what_is_free(bench):
    found = measure("cuda:0,cuda:1", "auto", 8_000)
    assert [(d.device, d.memory_bytes) for d in found.devices] == [("cuda:0", 6_000), ("cuda:1", 2_000)]
    assert [d.flops_per_s for d in found.devices] == [4e12, 2e12]
    assert (found.device, found.memory_bytes, found.flops_per_s) == ("cuda:0,cuda:1", 8_000, 6e12)
    assert [d.memory_bytes for d in measure("cuda:0,cuda:1", "auto", None).devices] == [24_000, 8_000]


def test_a_device_that_is_named_twice_is_measured_once_and_lent_in_halves(bench):
    found = measure("cpu,cpu", "auto", None)
    assert bench == ["cpu"]
    assert [(d.memory_bytes, d.read_bytes_per_s) for d in found.devices] == [(3_000, 1e10)] * 2
    assert found.read_bytes_per_s == 2e10


@pytest.mark.parametrize(("gpus", "names"), [(0, ["cpu"]), (2, ["cuda:0", "cuda:1"])])
def test_all_means_every_gpu_and_else_the_processor(monkeypatch, gpus, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_names("all") == names


@pytest.mark.parametrize(("total", "weights"), [(10, [1, 1, 1]), (7, [5]), (9, [0, 0]), (100, [3, 0, 97])])
def test_no_byte_is_lost_in_sharing(total, weights):
    parts = split_bytes(total, weights)
    assert (sum(parts), len(parts)) == (total, len(weights))
    assert min(parts) >= 0
