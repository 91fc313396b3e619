"""Where libp2p is imported from: the installed one if it is the right one, else the bundled one."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from p2p import _bootstrap


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """sys.path of an interpreter that has not imported libp2p yet."""
    monkeypatch.setattr(sys, "path", ["first", "second"])
    monkeypatch.delitem(sys.modules, "libp2p", raising=False)
    return sys.path


def installed(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        assert name == "libp2p"
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(_bootstrap, "version", version)


@pytest.mark.parametrize("found", [None, "0.7.0", "0.9.0"])
def test_the_bundled_library_goes_first_without_the_right_one(
    tmp_path: Path, path: list[str], monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    installed(monkeypatch, found)
    _bootstrap.ensure_libp2p(tmp_path)
    _bootstrap.ensure_libp2p(tmp_path)
    assert path == [str(tmp_path), "first", "second"]


def test_the_right_installed_library_is_left_alone(
    tmp_path: Path, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, _bootstrap.LIBP2P_VERSION)
    _bootstrap.ensure_libp2p(tmp_path)
    assert path == ["first", "second"]


def test_a_checkout_without_a_bundle_changes_nothing(
    tmp_path: Path, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, None)
    _bootstrap.ensure_libp2p(tmp_path / "absent")
    assert path == ["first", "second"]


def test_an_imported_library_is_not_changed_under_its_users(
    tmp_path: Path, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "libp2p", sys)
    _bootstrap.ensure_libp2p(tmp_path)
    assert path == ["first", "second"]
