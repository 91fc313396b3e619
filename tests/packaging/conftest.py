"""The repository as a whole, and its tools, which are scripts and not packages."""

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(path: str) -> Iterator[ModuleType]:
    name = "tool_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture
def install_tool() -> Iterator[ModuleType]:
    yield from load("tools/install.py")


@pytest.fixture
def lock_tool() -> Iterator[ModuleType]:
    yield from load("tools/lock.py")


@pytest.fixture
def backend() -> Iterator[ModuleType]:
    yield from load("tools/build/backend.py")


@pytest.fixture
def training_tool() -> Iterator[ModuleType]:
    yield from load("tools/train_embedded_model.py")
