"""Fixtures for all tests."""

import math
import sys
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))  # helpers that several folders' tests share


@pytest.fixture
def autojump_clock(autojump_clock, monkeypatch):
    """The virtual clock, which stands still while a thread works: to trio a task that waits for a thread is idle, so
    the plain clock would leap over every deadline during a write to disk, and the test would fail on a slow machine.
    """
    real = trio.to_thread.run_sync
    at_work = 0

    async def run_sync(*given, **more):
        nonlocal at_work
        at_work += 1
        autojump_clock.autojump_threshold = math.inf
        try:
            return await real(*given, **more)
        finally:
            at_work -= 1
            if not at_work:
                autojump_clock.autojump_threshold = 0

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    return autojump_clock
