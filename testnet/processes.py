"""Starting, recognising and ending the processes of local nodes, and the record of them on disk.

A process is known by its pid and its start time, so that a pid which the system gave to somebody else is
never signalled. It knows how `shoal up` is called, not what a mesh is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from testnet.errors import StateProblem

STATE_FILE = "testnet.json"
STATE_VERSION = 1
STOP_GRACE_S = 5.0
START_TIME_SLACK_S = 0.02
LOG_TAIL_BYTES = 8192
USUAL = re.compile(r"\d{4}-\d\d-\d\d [0-9:,.]+ (INFO|DEBUG) ")


@dataclass(frozen=True, slots=True)
class LocalNode:
    """One node process. `started_s` is its start in seconds since the epoch; `api` and `peer` are "" until ready."""

    name: str
    pid: int
    started_s: float
    data_dir: str
    log: str
    api: str = ""
    peer: str = ""


def shoal_command() -> tuple[str, ...]:
    """How to start this very installation of shoal, whatever the current directory holds."""
    return (sys.executable, "-P", "-m", "shoal")


def child_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the user's own settings of shoal, and with this installation importable."""
    child = {name: value for name, value in env.items() if not name.startswith("SHOAL_")}
    root = Path(__file__).resolve().parent.parent
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    if root not in installed:
        child["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), child.get("PYTHONPATH", ""))))
    child["PYTHONUNBUFFERED"] = "1"
    return child


def start(
    command: Sequence[str], name: str, data_dir: Path, log: Path
) -> tuple[LocalNode, subprocess.Popen[bytes]]:
    """Start a node in a session of its own; stdout goes to `log` with `.out`, stderr to `log`. Raises StateProblem."""
    group: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        group = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    try:
        with log.open("wb") as errors, ready_file(log).open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=child_environment(os.environ),
                **group,
            )
    except OSError as problem:
        raise StateProblem(f"{name} cannot be started: {problem.strerror or problem}") from None
    started_s = psutil.Process(process.pid).create_time()
    return LocalNode(name, process.pid, started_s, str(data_dir), str(log)), process


def ready_file(log: Path) -> Path:
    """Where a node's stdout goes, which holds its `ready` line."""
    return log.with_suffix(".out")


def ready_line(log: Path) -> tuple[str, str] | None:
    """(api, peer) from the `ready api=URL peer=ID` line of a node, or None."""
    try:
        lines = ready_file(log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        words = dict(word.partition("=")[::2] for word in line.split()[1:])
        if line.startswith("ready ") and words.get("api") and words.get("peer"):
            return words["api"], words["peer"]
    return None


def last_words(log: Path) -> str:
    """The last line of a log that says what went wrong, without our own prefix; "" if only the usual was logged."""
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = handle.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    telling = [line.strip() for line in lines if line.strip() and not USUAL.match(line)]
    return telling[-1].removeprefix("shoal: ") if telling else ""


def running(node: LocalNode) -> psutil.Process | None:
    """The process of `node`, unless it ended or its pid now belongs to another process."""
    try:
        process = psutil.Process(node.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if abs(process.create_time() - node.started_s) <= START_TIME_SLACK_S:
            return process
        # The clock may have been set since, by which start times move; the data directory on the command line is as
        # good a mark.
        return process if node.data_dir in process.cmdline() else None
    except psutil.Error:
        return None


def stop(nodes: Iterable[LocalNode], grace_s: float = STOP_GRACE_S) -> list[LocalNode]:
    """End the processes that still run: politely, and after `grace_s` by force. Returns those that ran."""
    found = [(node, process) for node in nodes if (process := running(node)) is not None]
    for _, process in found:
        _signal(process, by_force=False)
    _, remaining = psutil.wait_procs([process for _, process in found], timeout=grace_s)
    for process in remaining:
        _signal(process, by_force=True)
    psutil.wait_procs(remaining, timeout=grace_s)
    return [node for node, _ in found]


def _signal(process: psutil.Process, *, by_force: bool) -> None:
    try:
        if not by_force:
            process.terminate()
        elif os.name != "nt" and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (psutil.Error, ProcessLookupError):
        pass  # it ended by itself meanwhile


def write_state(state_dir: Path, nodes: Sequence[LocalNode]) -> None:
    """Replace the record in `state_dir`; a crash leaves the old or the new one. Raises StateProblem."""
    document = {"version": STATE_VERSION, "nodes": [asdict(node) for node in nodes]}
    try:
        handle, name = tempfile.mkstemp(dir=state_dir, prefix=".testnet.")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(document, out, indent=1)
        os.replace(name, state_dir / STATE_FILE)
    except OSError as problem:
        raise StateProblem(f"{state_dir} cannot be written: {problem.strerror or problem}") from None


def read_state(state_dir: Path) -> tuple[LocalNode, ...]:
    """The nodes recorded in `state_dir`; none if there is no record. Raises StateProblem for a damaged one."""
    path = state_dir / STATE_FILE
    try:
        document = json.loads(path.read_bytes())
        return tuple(LocalNode(**node) for node in document["nodes"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise StateProblem(f"{path} is not a record of local nodes ({problem}); remove it by hand") from None
