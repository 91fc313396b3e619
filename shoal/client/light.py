"""A light peer: a node of the program's own that is a member of the mesh and hosts nothing."""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from shoal.daemon_client import data_dir as shoal_dir
from shoal.daemon_client import read_address
from shoal.errors import CommandFailed, DaemonSilent, UsageProblem

STOP_S = 10.0
LOOK_S = 0.1
# Who has met a member has its view after one exchange; a mesh without models shows none however long one looks.
MODELS_S = 3.0


class LightPeer:
    """The process of such a node. It ends with `stop`, or with the program; one that outlived a killed program is used
    again by the next."""

    def __init__(self, api: str, process: subprocess.Popen[bytes] | None) -> None:
        self.api = api
        self._process = process
        if process is not None:
            atexit.register(self.stop)

    @classmethod
    def start(cls, invite: str, data_dir: str | None, wait_s: float) -> LightPeer:
        """Join the mesh of `invite`; returns once the node answers. Raises ShoalError."""
        if not invite.strip():
            raise UsageProblem("the invite is empty; `shoal invite` on a member prints one")
        directory = Path(data_dir).expanduser() if data_dir else shoal_dir(None) / "sdk"
        running = read_address(directory)
        if running is not None and _answers(running.api):
            return cls(running.api, None)
        command = [sys.executable, "-m", "shoal", "up", "--join", invite, "--no-serve", "--model", "none"]
        command += ["--api", "127.0.0.1:0", "--data-dir", str(directory)]
        directory.mkdir(parents=True, exist_ok=True)
        log = directory / "sdk.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=_environment()
            )
        end_s = time.monotonic() + wait_s
        try:
            api = _ready(process, wait_s, log)
            _meet(api, end_s, wait_s, log)
            return cls(api, process)
        except BaseException:  # Ctrl-C too: nobody else would end the process
            _end(process)
            raise

    def stop(self) -> None:
        """End the node that this program started. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.stop)
            _end(process)


def _environment() -> dict[str, str]:
    """The program's own, without what would make this node another one."""
    keep = ("SHOAL_API_KEY",)
    return {
        name: value for name, value in os.environ.items() if not name.startswith("SHOAL_") or name in keep
    }


def _answers(api: str) -> bool:
    return _get(api, "/health") is not None


def _get(api: str, path: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(api + path, timeout=2.0) as response:
            document = json.load(response)
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _meet(api: str, end_s: float, wait_s: float, log: Path) -> None:
    """Wait until the node knows another member, and what the mesh serves. Raises DaemonSilent."""
    while len((_get(api, "/mesh") or {}).get("nodes", ())) < 2:
        if time.monotonic() > end_s:
            raise DaemonSilent(f"no member was met within {wait_s:g} s; the node's log: {log}")
        time.sleep(LOOK_S)
    end_s = min(end_s, time.monotonic() + MODELS_S)
    while not (_get(api, "/v1/models") or {}).get("data") and time.monotonic() < end_s:
        time.sleep(LOOK_S)


def _ready(process: subprocess.Popen[bytes], wait_s: float, log: Path) -> str:
    """The address in the line `ready api=URL peer=ID`. A thread reads on afterwards, so that the node never waits."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.decode(errors="replace"))
        lines.put("")

    threading.Thread(target=read, name="shoal-light-peer", daemon=True).start()
    end_s = time.monotonic() + wait_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, end_s - time.monotonic()))
        except queue.Empty:
            raise DaemonSilent(f"no mesh was joined within {wait_s:g} s; its log: {log}") from None
        if not line:
            raise CommandFailed(f"the node ended: {_last_line(log)}")
        if line.startswith("ready "):
            fields = dict(part.split("=", 1) for part in line.split()[1:] if "=" in part)
            return fields["api"]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("shoal: ") if lines else f"it said nothing; see {log}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
