"""What a wheel is built from, and the files around it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

TOP = ("collectives", "dht", "model_shards", "node", "p2p", "scheduler", "shoal", "testnet")


def test_packages_are_listed_one_by_one_and_completely(root: Path, project: dict[str, Any]) -> None:
    found = {path.parent.relative_to(root) for top in TOP for path in (root / top).rglob("*.py")}
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(".".join(path.parts) for path in found)


def test_every_package_opens_with_an_init(root: Path, project: dict[str, Any]) -> None:
    for name in project["tool"]["setuptools"]["packages"]:
        assert (root / name.replace(".", "/") / "__init__.py").is_file(), name


def test_every_file_of_a_package_that_is_no_code_is_package_data(root: Path, project: dict[str, Any]) -> None:
    declared = project["tool"]["setuptools"]["package-data"]
    covered = {
        path
        for name, globs in declared.items()
        for g in globs
        for path in (root / name.replace(".", "/")).glob(g)
    }
    needed = {p for p in (root / "node").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert needed <= covered


def test_the_installed_shoal_is_this_checkout(project: dict[str, Any]) -> None:
    assert version("shoal") == project["project"]["version"]


def test_the_licence_is_apache(root: Path, project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (root / "LICENSE").read_text()
    assert "limitations under the License." in (root / "LICENSE").read_text()


def test_ci_runs_the_same_command_as_people(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "make test" in text


def test_the_makefile_names_no_absolute_path_of_its_own(root: Path) -> None:
    """A path from CURDIR would break, unquoted, where the checkout's path has a space."""
    text = (root / "Makefile").read_text()
    assert "CURDIR" not in text
    assert "PWD" not in text
    assert "PYTHON ?= python3" in text
