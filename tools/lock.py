"""Writes requirements/lock.txt and dev.txt from what is installed: the closure of pyproject.toml's dependencies.

Run it in an environment where the tests pass (`make lock`). lock.txt is what Shoal needs to run, dev.txt what its tests
and checks need besides. It resolves nothing and fetches nothing; a package that is missing is an error, not a wish.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {
    "lock.txt": "# What Shoal needs to run, all of it, installed with --no-deps. Written by `make lock`.\n",
    "dev.txt": "# What the tests and checks need besides lock.txt. Written by `make lock`.\n",
}
# libp2p asks for these to type-check and to generate its sources; nothing imports them.
NOT_NEEDED = frozenset({"types-requests", "mypy-protobuf"})
# What other systems need, which no closure made on Linux or macOS finds: click, tqdm and pytest colour with it.
ELSEWHERE = ("colorama==0.4.6; sys_platform == 'win32'\n",)


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Canonical name to installed public version, for the roots and all that they need here."""
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in NOT_NEEDED:
            continue
        installed = distribution(name)
        found[name] = Version(installed.version).public
        for text in installed.requires or []:
            needed = Requirement(text)
            if applies(needed, requirement.extras):
                waiting.append(needed)
    return found


def lines(packages: dict[str, str]) -> str:
    # fastecdsa has no Windows wheels and libp2p does without it there.
    markers = {"fastecdsa": "; sys_platform != 'win32'"}
    return "".join(
        f"{name}=={version}{markers.get(name, '')}\n" for name, version in sorted(packages.items())
    )


def texts(project: dict[str, Any]) -> dict[str, str]:
    """File name under requirements/ to what it has to hold."""
    bundled = project["tool"]["shoal"]["bundle"]
    needed = closure([*project["project"]["dependencies"], f"{bundled['name']}=={bundled['version']}"])
    extra = {k: v for k, v in closure(project["dependency-groups"]["dev"]).items() if k not in needed}
    return {
        "lock.txt": HEADERS["lock.txt"] + lines(needed) + "".join(ELSEWHERE),
        "dev.txt": HEADERS["dev.txt"] + lines(extra),
    }


def main() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    for name, text in texts(project).items():
        (ROOT / "requirements" / name).write_text(text, encoding="utf-8")
        print(f"wrote requirements/{name}")


if __name__ == "__main__":
    try:
        main()
    except PackageNotFoundError as error:
        sys.exit(f"lock: {error.name} is not installed")
