"""`make install`: a virtual environment in .venv with exactly what requirements/ pins, and this checkout in it.

Run by any Python from 3.11 on, with the standard library alone. A second run with nothing changed ends at once. Pins
are installed with --no-deps, because libp2p's metadata asks for a source-only fastecdsa (see tools/build/backend.py).
torch comes apart from the rest, since one version exists as a CPU build and as gigabytes of CUDA: TORCH_INDEX names the
index to take it from; a torch already in .venv, in the range that pyproject.toml gives, is kept; otherwise it is the
CPU build, never the other. It knows nothing of what the packages are for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
VENV_PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "shoal-installed"
PINS = (ROOT / "requirements" / "lock.txt", ROOT / "requirements" / "dev.txt")
PYTHON_MIN = (3, 11)
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--progress-bar=off")


class InstallError(Exception):
    """Said to the user in one line."""


def fingerprint() -> str:
    """Changes with the pins, the packaging, the interpreter, the wish for a torch, and when the checkout moves."""
    digest = hashlib.sha256(f"{sys.version}\n{ROOT}\n{os.environ.get('TORCH_INDEX', '')}\n".encode())
    for path in (*PINS, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(*command: str) -> bool:
    """Whether it succeeded; what it prints is dropped."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, check=False)
    return done.returncode == 0


def pip(what: str, *arguments: str, count: int = 1, complain: bool = True) -> bool:
    """Installs, showing how many of `count` packages were looked up; pip's own words only when it failed."""
    # Always through the interpreter: a script's first line breaks where the path has a space or is long.
    command = [str(VENV_PYTHON), "-m", "pip", "install", *PIP_OPTIONS, *arguments]
    seen, last = 0, deque[str](maxlen=20)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            last.append(line)
            seen += line.startswith(("Collecting ", "Requirement already ", "Obtaining "))
            if sys.stdout.isatty():
                print(f"\r{what} {min(seen, count)}/{count} ", end="", flush=True)
    start = "\r" if sys.stdout.isatty() else ""
    print(f"{start}{what}: {'done' if process.returncode == 0 else 'failed'}    ", flush=True)
    if process.returncode != 0 and complain:
        sys.stderr.writelines(line for line in last if not line.startswith("WARNING: Location"))
    return process.returncode == 0


def pins(path: Path) -> dict[str, str]:
    """Distribution name to the whole line."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.split("==")[0].lower(): line for line in lines if line}


def make_venv() -> None:
    """Creates .venv unless a working one of this very interpreter version, at this very place, is there."""
    probe = "import sys, pip; sys.exit(sys.version_info[:2] != ({}, {}))".format(*sys.version_info[:2])
    here = VENV / "shoal-place"
    moved = here.exists() and here.read_text(encoding="utf-8") != str(VENV)
    if VENV_PYTHON.exists() and not moved and run(str(VENV_PYTHON), "-c", probe):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    print("Creating .venv", flush=True)
    if not run(sys.executable, "-m", "venv", str(VENV)):
        # Debian splits ensurepip off; a pip outside can put one inside.
        outer = (sys.executable, "-m", "pip", "--python", str(VENV_PYTHON), "install", *PIP_OPTIONS, "pip")
        made = run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(VENV))
        if not made or not run(*outer):
            shutil.rmtree(VENV, ignore_errors=True)
            raise InstallError(
                f"{sys.executable} cannot make a virtual environment (Debian: apt install python3-venv)"
            )
    here.write_text(str(VENV), encoding="utf-8")


def has_usable_torch() -> bool:
    """Whether .venv sees a torch in pyproject.toml's range, for example a CUDA build put there before."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = next(d for d in tomllib.load(file)["project"]["dependencies"] if d.startswith("torch"))
    probe = (
        "import sys; from importlib.metadata import version; from packaging.requirements import Requirement;"
        "sys.exit(not Requirement(sys.argv[1]).specifier.contains(version('torch')))"
    )
    return run(str(VENV_PYTHON), "-c", probe, wanted)


def is_cpu_build(pin: str) -> bool:
    """Whether what the configured indexes offer as `pin` asks for no CUDA libraries."""
    command = [
        str(VENV_PYTHON),
        "-m",
        "pip",
        "install",
        *PIP_OPTIONS,
        "--quiet",
        "--dry-run",
        "--ignore-installed",
    ]
    command += ["--no-deps", "--report", "-", pin]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode != 0:
        return False
    metadata = json.loads(done.stdout)["install"][0]["metadata"]
    return not any(
        need.startswith(("nvidia", "cuda", "triton")) for need in metadata.get("requires_dist", ())
    )


def install_torch(pin: str) -> None:
    index = os.environ.get("TORCH_INDEX")
    if index:
        chosen = pip(f"{pin} from {index}", "--index-url", index, "--no-deps", "--force-reinstall", pin)
        if not chosen or not pip("what it needs", "--index-url", index, pin):
            raise InstallError(f"could not install {pin} from TORCH_INDEX={index}")
        return
    if has_usable_torch():
        return
    name = f"{pin}, CPU build"
    # `+cpu` is how a Linux CPU build calls itself; elsewhere there is no other.
    if sys.platform != "linux":
        found = pip(name, "--no-deps", pin)
    else:
        found = pip(name, "--no-deps", f"{pin}+cpu", complain=False) or (
            is_cpu_build(pin) and pip(name, "--no-deps", pin)
        )
    if not found:
        raise InstallError(
            f"pip finds no CPU build of {pin} here, and a CUDA build is gigabytes: name the index you want "
            "(the PyTorch site lists one for CPU builds) in TORCH_INDEX, or put your own torch into .venv"
        )


def remove_old_types() -> None:
    """trio-typing, which libp2p imports, brings types of a trio of years ago, and mypy prefers them to trio's own."""
    for folder in VENV.glob("[Ll]ib*/**/site-packages/trio-stubs"):
        shutil.rmtree(folder)


def install() -> None:
    if sys.version_info < PYTHON_MIN:
        raise InstallError(
            f"needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=..."
        )
    wanted = fingerprint()
    if STAMP.exists() and VENV_PYTHON.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    make_venv()
    STAMP.unlink(missing_ok=True)
    locked = pins(PINS[0]) | pins(PINS[1])
    torch = locked.pop("torch")
    # Two packages exist only as (pure Python) source; they are built with the pinned tools, not the newest.
    build_tools = (locked["setuptools"], locked["wheel"])
    if not pip("build tools", "--no-deps", *build_tools, count=2) or not pip(
        "pinned packages", "--no-deps", "--no-build-isolation", *locked.values(), count=len(locked)
    ):
        raise InstallError("pip could not install what requirements/ pins; its own message stands above")
    remove_old_types()
    install_torch(torch)
    if not pip("this checkout", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)):
        raise InstallError("pip could not install this checkout; its own message stands above")
    STAMP.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    try:
        install()
    except InstallError as error:
        sys.exit(f"install: {error}")
