"""What is pinned: complete, consistent, and covering every import."""

import ast
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = ("shoal", "node", "scheduler", "collectives", "model_shards", "dht", "p2p", "testnet")
# libp2p's metadata is what the pins exist to overrule; the other two are for its own development.
OVERRULED = {("libp2p", "fastecdsa"), ("libp2p", "types-requests"), ("libp2p", "mypy-protobuf")}
# What a CUDA build of torch needs is not ours to pin: who has one keeps it.
ACCELERATOR = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def pins(root: Path, *names: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        for line in (root / "requirements" / name).read_text().splitlines():
            text = line.split("#")[0].strip()
            if not text:
                continue
            requirement = Requirement(text)
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{text} is no exact pin"
            assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonicalize_name(requirement.name)] = pin.version
    return found


def imports(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.Import):
                found |= {alias.name.split(".")[0] for alias in item.names}
            elif isinstance(item, ast.ImportFrom) and item.level == 0 and item.module:
                found.add(item.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(OURS)


def distributions(names: set[str]) -> dict[str, set[str]]:
    providers = packages_distributions()
    return {name: {canonicalize_name(d) for d in providers.get(name, [])} for name in names}


def test_every_run_time_import_is_pinned_and_declared(root: Path, project: dict[str, Any]) -> None:
    locked = pins(root, "lock.txt")
    declared = {canonicalize_name(Requirement(d).name) for d in project["project"]["dependencies"]}
    declared.add(project["tool"]["shoal"]["bundle"]["name"])
    for name, providers in distributions(set().union(*(imports(root / folder) for folder in OURS))).items():
        assert providers & locked.keys(), f"nothing in lock.txt provides {name!r}"
        assert providers & declared, f"nothing in pyproject.toml's dependencies provides {name!r}"


def test_every_import_of_tests_and_tools_is_pinned(root: Path) -> None:
    locked = pins(root, "lock.txt", "dev.txt")
    # Without the helpers that tests share by a path of their own.
    used = (imports(root / "tests") | imports(root / "tools")) - {
        p.stem for p in (root / "tests").rglob("*.py")
    }
    for name, providers in distributions(used).items():
        assert providers & locked.keys(), f"nothing in requirements/ provides {name!r}"


def test_pins_satisfy_one_another_without_resolving(root: Path) -> None:
    locked = pins(root, "lock.txt", "dev.txt")
    for name in locked:
        if name == "colorama" and sys.platform != "win32":
            continue
        for text in distribution(name).requires or []:
            need = Requirement(text)
            needed = canonicalize_name(need.name)
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if not applies or (name, needed) in OVERRULED or needed.startswith(ACCELERATOR):
                continue
            assert needed in locked, f"{name} needs {needed}, which nothing pins"
            assert need.specifier.contains(locked[needed], prereleases=True), f"{name} needs {need}"


def test_pins_satisfy_what_pyproject_declares(root: Path, project: dict[str, Any]) -> None:
    locked = pins(root, "lock.txt", "dev.txt")
    declared = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for need in map(Requirement, declared):
        assert need.specifier.contains(locked[canonicalize_name(need.name)]), str(need)


def test_the_bundled_library_is_the_locked_one(root: Path, project: dict[str, Any]) -> None:
    from p2p._bootstrap import LIBP2P_VERSION

    bundle = project["tool"]["shoal"]["bundle"]
    assert pins(root, "lock.txt")[bundle["name"]] == bundle["version"] == LIBP2P_VERSION


def test_what_the_bundled_library_needs_is_declared(project: dict[str, Any]) -> None:
    declared = {canonicalize_name(Requirement(d).name) for d in project["project"]["dependencies"]}
    for text in distribution("libp2p").requires or []:
        need = Requirement(text)
        name = canonicalize_name(need.name)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        assert name in declared or name in ("types-requests", "mypy-protobuf"), f"libp2p needs {text}"


def test_gmp_is_never_needed_to_install(root: Path, project: dict[str, Any]) -> None:
    (declared,) = [Requirement(d) for d in project["project"]["dependencies"] if d.startswith("fastecdsa")]
    assert not declared.specifier.contains("2.3.2")
    assert int(pins(root, "lock.txt")["fastecdsa"].split(".")[0]) >= 3


def test_the_lock_is_what_the_tool_would_write(
    root: Path, project: dict[str, Any], lock_tool: ModuleType
) -> None:
    if "+cpu" not in distribution("torch").version:
        pytest.skip("the torch here is not the locked CPU build, so the closure differs")
    for name, text in lock_tool.texts(project).items():
        assert (root / "requirements" / name).read_text(encoding="utf-8") == text
