"""Processes of a bench on this machine and what passes between them: one JSON object a line, by stdin and stdout.

The parent's side and the peers' side. It knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from shoal.errors import ShoalError

MIB = 1 << 20


class Peers:
    """The peers' processes; one JSON object a line each way."""

    def __init__(self, module: str, settings: Sequence[dict[str, Any]]) -> None:
        """One process of `python -m MODULE` for each settings, which it gets as JSON."""
        self.children = [
            subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(one)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
            )
            for one in settings
        ]  # fmt: skip

    def hear(self) -> list[dict[str, Any]]:
        """The next line of every peer. Raises ShoalError if one has ended."""
        return [self._line(child) for child in self.children]

    def hear_from(self, index: int) -> dict[str, Any]:
        """The next line of one peer."""
        return self._line(self.children[index])

    def _line(self, child: subprocess.Popen[str]) -> dict[str, Any]:
        line = child.stdout.readline() if child.stdout else ""
        if not line:
            raise ShoalError(f"a peer of the bench ended with status {child.wait(10)}")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise ShoalError(f"a peer of the bench failed: {found['failed']}")
        return found

    def say(self, **what: object) -> None:
        """The same line to every peer."""
        for child in self.children:
            if child.stdin:
                child.stdin.write(json.dumps(what) + "\n")
                child.stdin.flush()

    def end(self) -> None:
        for child in self.children:
            with contextlib.suppress(OSError):
                if child.stdin:
                    child.stdin.close()
        for child in self.children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout:
                child.stdout.close()


class Memory:
    """The most that was resident since `start`, beyond what was at that moment; since the process began, off Linux."""

    def start(self) -> None:
        self._can_reset = Path("/proc/self/clear_refs").exists()
        if self._can_reset:
            Path("/proc/self/clear_refs").write_text("5")
        self.base = self.peak()

    def peak(self) -> int:
        if self._can_reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

    def beyond(self) -> int:
        return self.peak() - self.base


async def say(**what: object) -> None:
    print(json.dumps(what), flush=True)
    await trio.lowlevel.checkpoint()


async def hear() -> dict[str, Any] | None:
    line = await trio.to_thread.run_sync(sys.stdin.readline)
    found: dict[str, Any] | None = json.loads(line) if line else None
    return found


def first_of(problems: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of the errors in a group."""
    first = problems.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
