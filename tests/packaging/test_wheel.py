"""The build backend: the library goes into the wheel whole, recorded, and only if it is the pinned file."""

import base64
import csv
import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LIBRARY = {
    "lib/__init__.py": b"value = 1\n",
    "lib/deep/data.bin": b"\x00\x01",
    "lib-1.0.dist-info/METADATA": b"Name: lib\nVersion: 1.0\n",
    "lib-1.0.dist-info/licenses/LICENSE": b"Do as you like.\n",
    "lib-1.0.dist-info/RECORD": b"lib/__init__.py,,\n",
    "lib-1.0.dist-info/entry_points.txt": b"[console_scripts]\nlib = lib:main\n",
    "examples/demo.py": b"print()\n",
}
OURS = {
    "p2p/__init__.py": b"",
    "shoal-0.1.0.dist-info/METADATA": b"Name: shoal\n",
    "shoal-0.1.0.dist-info/RECORD": b"p2p/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n",
}


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def bundled(tmp_path: Path, backend: ModuleType) -> Path:
    ours = wheel(tmp_path / "shoal-0.1.0-py3-none-any.whl", OURS)
    backend.bundle(ours, wheel(tmp_path / "lib-1.0-py3-none-any.whl", LIBRARY), "lib")
    return ours


def test_the_package_and_its_licence_are_bundled_and_its_examples_and_scripts_are_not(bundled: Path) -> None:
    with zipfile.ZipFile(bundled) as archive:
        added = {n for n in archive.namelist() if n.startswith("p2p/_vendor/")}
        assert archive.read("p2p/_vendor/lib/deep/data.bin") == b"\x00\x01"
    assert added == {
        "p2p/_vendor/lib/__init__.py",
        "p2p/_vendor/lib/deep/data.bin",
        "p2p/_vendor/lib-1.0.dist-info/METADATA",
        "p2p/_vendor/lib-1.0.dist-info/licenses/LICENSE",
    }


def test_every_file_is_recorded_with_its_hash_and_size(bundled: Path) -> None:
    with zipfile.ZipFile(bundled) as archive:
        rows = list(csv.reader(io.StringIO(archive.read("shoal-0.1.0.dist-info/RECORD").decode())))
        recorded = {name: (digest, size) for name, digest, size in rows}
        for name in recorded:
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert recorded[name] == (f"sha256={digest}", str(len(content)))
        assert {n for n in archive.namelist() if n.startswith("p2p/")} == recorded.keys()


def downloads(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], code: int = 0) -> list[list[str]]:
    """Puts a pip in place that leaves `files` in its --dest."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", "no such index\n")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def pin(content: bytes) -> dict[str, str]:
    return {"name": "lib", "version": "1.0", "sha256": hashlib.sha256(content).hexdigest()}


def test_the_pinned_file_is_taken(
    tmp_path: Path, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = downloads(monkeypatch, {"lib-1.0-py3-none-any.whl": b"right"})
    assert backend.fetch(pin(b"right"), tmp_path).read_bytes() == b"right"
    assert "lib==1.0" in commands[0]
    assert "--no-deps" in commands[0]


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({"lib-1.0-py3-none-any.whl": b"wrong"}, 0, "pins"),
        ({}, 1, "no such index"),
        ({}, 0, "could not download lib==1.0"),
    ],
)
def test_anything_but_the_pinned_file_is_refused(
    tmp_path: Path,
    backend: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    code: int,
    said: str,
) -> None:
    downloads(monkeypatch, files, code)
    with pytest.raises(backend.BundleError, match=said):
        backend.fetch(pin(b"right"), tmp_path)


def test_the_pin_in_pyproject_is_read(
    root: Path, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert backend.pinned()["name"] == "libp2p"
    assert len(backend.pinned()["sha256"]) == 64
