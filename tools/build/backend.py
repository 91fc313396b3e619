"""Shoal's build backend: setuptools, and inside the wheel the one library that cannot be a dependency.

libp2p 0.8.1 pins fastecdsa 2.3.2, which exists only as source and needs GMP's headers; a machine without them could
not `pip install` Shoal, although later fastecdsa wheels work in its place. Metadata cannot override a pin deep in a
dependency, so `build_wheel` puts libp2p's own files, unchanged, under `p2p/_vendor/`, and pyproject.toml lists what
libp2p needs to run. `p2p/_bootstrap.py` finds them there. Editable installs and sdists bundle nothing. To go when
libp2p no longer pins fastecdsa. It knows nothing of what Shoal does with libp2p.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # re-exported: they are a backend's hooks
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

VENDOR = "p2p/_vendor/"


class BundleError(Exception):
    """The library to bundle could not be fetched, or is not the file that was pinned."""


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """PEP 517's hook: setuptools' wheel with the pinned library added. Returns the wheel's file name."""
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    with tempfile.TemporaryDirectory() as folder:
        bundle(Path(wheel_directory) / name, fetch(pinned(), Path(folder)), pinned()["name"])
    return name


def pinned() -> Mapping[str, str]:
    """name, version and sha256 from pyproject.toml; a backend runs in the project's root."""
    with open("pyproject.toml", "rb") as file:
        pin: Mapping[str, str] = tomllib.load(file)["tool"]["shoal"]["bundle"]
    return pin


def fetch(pin: Mapping[str, str], folder: Path) -> Path:
    """Downloads the wheel from whatever index pip is set up for and checks that it is the pinned file."""
    wanted = f"{pin['name']}=={pin['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise BundleError(
            f"could not download {wanted} to bundle it: {done.stderr.strip() or 'no wheel came'}"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != pin["sha256"]:
        raise BundleError(f"{wheels[0].name} has sha256 {digest}, pyproject.toml pins {pin['sha256']}")
    return wheels[0]


def bundled_files(library: zipfile.ZipFile, package: str) -> Iterator[tuple[str, bytes]]:
    """(path in our wheel, content): the import package and its metadata with the licences, not examples or scripts."""
    for item in library.infolist():
        top, _, rest = item.filename.partition("/")
        is_metadata = top.endswith(".dist-info") and rest not in ("RECORD", "entry_points.txt")
        if not item.is_dir() and (top == package or is_metadata):
            yield VENDOR + item.filename, library.read(item)


def record_line(path: str, content: bytes) -> str:
    """A RECORD row as the wheel specification has it: path, url-safe sha256 without padding, size."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}\n"


def bundle(wheel: Path, library: Path, package: str) -> None:
    """Rewrites `wheel`, in one rename, with `package` of `library` and its licences inside."""
    partial = wheel.with_suffix(".partial")
    with (
        zipfile.ZipFile(wheel) as ours,
        zipfile.ZipFile(library) as theirs,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        record = next(
            n for n in ours.namelist() if n.endswith(".dist-info/RECORD") and not n.startswith(VENDOR)
        )
        rows = ours.read(record).decode()
        for item in ours.infolist():
            if item.filename != record:
                out.writestr(item, ours.read(item), zipfile.ZIP_DEFLATED)
        for path, content in bundled_files(theirs, package):
            info = zipfile.ZipInfo(path)
            info.external_attr = 0o100644 << 16
            out.writestr(info, content, zipfile.ZIP_DEFLATED)
            rows += record_line(path, content)
        out.writestr(ours.getinfo(record), rows, zipfile.ZIP_DEFLATED)
    os.replace(partial, wheel)
