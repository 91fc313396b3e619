"""A fake daemon on the data directory that the commands find by themselves, and a way to run commands in-process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.cli import main
from testnet.fake_daemon import FakeDaemon


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of nobody: no settings, no data."""
    for name in [name for name in os.environ if name.startswith(("SHOAL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    """A fake daemon that runs on the default data directory."""
    with FakeDaemon() as fake:
        fake.announce(home / "data" / "shoal")
        yield fake


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line in this process."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        status = main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that looks like a model."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory
