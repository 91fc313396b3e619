"""Local nodes that are fake daemons in real processes, and the certainty that none outlives a test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testnet import LaunchOptions
from testnet.processes import read_state, stop

COMMAND = (sys.executable, "-P", "-m", "testnet.fake_daemon")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of nobody."""
    for name in [name for name in os.environ if name.startswith(("SHOAL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose recorded nodes are ended after the test."""
    directory = tmp_path / "state"
    yield directory
    stop(read_state(directory), grace_s=0.1)


@pytest.fixture
def options(state_dir: Path) -> Callable[..., LaunchOptions]:
    """Options for fake nodes."""

    def build(nodes: int = 2, **changes) -> LaunchOptions:
        return LaunchOptions(state_dir=state_dir, nodes=nodes, command=COMMAND, **changes)

    return build


@pytest.fixture
def fake_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the commands start fake nodes."""

    def build(**changes) -> LaunchOptions:
        return LaunchOptions(command=COMMAND, **changes)

    monkeypatch.setattr("shoal.cli_testnet.LaunchOptions", build)
    monkeypatch.setattr("shoal.demo.LaunchOptions", build)
