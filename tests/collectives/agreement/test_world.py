"""Histories of faults: one value an epoch, the exact mean over its members, an end by every deadline, and progress."""

import importlib.util
from pathlib import Path

import pytest

BATCH = 150


@pytest.mark.parametrize("first", range(0, 1500, BATCH))
def test_no_history_breaks_a_rule(world, first):
    commits = 0
    for seed in range(first, first + BATCH):
        commits += world.World(seed).run().stats["commits"]
    assert commits > 5 * BATCH


def test_a_seed_is_one_history(world):
    def trace(seed):
        one = world.World(seed)
        one.trace = []
        one.run()
        return [repr(step) for step in one.trace]

    assert trace(5) == trace(5)


@pytest.mark.slow
def test_many_more_histories():
    path = Path(__file__).with_name("check.py")
    spec = importlib.util.spec_from_file_location("agreement_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.check(first=2_000_000, seeds=10_000)["violations"] == 0
