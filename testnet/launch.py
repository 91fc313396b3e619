"""A mesh of local `shoal up` processes: one founds it, the others join by its invite.

Leaving the `with` block of a `Testnet` ends every process that it started, however it is left, unless
`release()` was called. Nodes write to files in the state directory, so that they outlive the launcher. It
shares no model; the commands above it do, through the ordinary API.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from shoal.daemon_client import DaemonClient
from shoal.errors import DaemonGarbled, ShoalError
from shoal.mesh_view import MeshView
from testnet import processes
from testnet.errors import AlreadyRunning, LaunchFailed, StateProblem
from testnet.interrupts import Interrupts
from testnet.processes import LocalNode, read_state

POLL_S = 0.05
INVITE_TTL_S = 3600.0
DEATH_SHOWS_S = 0.5
EMPTY_CONFIG = "config.toml"


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What to start and where. `node_memory_bytes` None lets each node decide; `timeout_s` is for all of it."""

    state_dir: Path
    nodes: int = 4
    node_memory_bytes: int | None = None
    timeout_s: float = 180.0
    command: tuple[str, ...] = processes.shoal_command()


class Testnet:
    """The nodes as they come up; `nodes` may be read at any time."""

    __test__ = False  # pytest collects classes by this name otherwise

    def __init__(
        self,
        options: LaunchOptions,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.nodes: tuple[LocalNode, ...] = ()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._interrupts = Interrupts()
        self._released = False
        self._sleep = sleep
        self._clock_s = clock_s
        self._end_s = clock_s() + options.timeout_s

    def __enter__(self) -> Testnet:
        self._claim()
        self._interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._released:
                with self._interrupts.deaf():
                    self.stop()
        finally:
            self._interrupts.__exit__(kind, value, trace)

    def left_s(self) -> float:
        """Seconds until the deadline, at least a little, so that it can be handed on as one."""
        return max(self._end_s - self._clock_s(), 0.1)

    def form(self, on_change: Callable[[], None] = lambda: None) -> None:
        """Start the nodes and wait until the first one is connected to all. Raises LaunchFailed, ShoalError."""
        self._start(1)
        on_change()
        self._wait(self._note_ready, lambda: f"{self._unready()} not ready", on_change)
        for number in range(2, self.options.nodes + 1):
            self._start(number, self._invite())
        on_change()
        self._wait(self._note_ready, lambda: f"{self._unready()} not ready", on_change)
        self._wait(self._all_met, lambda: "the nodes have not all met", on_change)

    def client(self, index: int = 0) -> DaemonClient:
        """A client for the node at `index`."""
        return DaemonClient(
            self.nodes[index].api, where=f"{self.nodes[index].name} (process {self.nodes[index].pid})"
        )

    def explain(self) -> None:
        """After a failed request: raise LaunchFailed if it failed because a node has ended."""
        end_s = self._clock_s() + DEATH_SHOWS_S
        while self._clock_s() < end_s:
            self.pause(POLL_S)

    def check(self) -> None:
        """Raise LaunchFailed if a node has ended."""
        for node in self.nodes:
            status = self._children[node.name].poll()
            if status is not None:
                how = f"with status {status}" if status >= 0 else f"by signal {-status}"
                raise LaunchFailed(f"{node.name} ended {how}{self._quote(node)}")

    def pause(self, seconds: float) -> None:
        """Sleep, unless a node has ended. Raises LaunchFailed."""
        self.check()
        self._sleep(seconds)

    def release(self) -> None:
        """Leave the nodes running; `stop_recorded` ends them later."""
        with self._interrupts.held():
            self._released = True
            for child in self._children.values():
                child.returncode = 0  # not ours to wait for any more; this keeps Popen from complaining

    def stop(self) -> None:
        """End the nodes and remove their data; the logs stay."""
        stop_recorded(self.options.state_dir, self.nodes)
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(processes.STOP_GRACE_S)

    def _claim(self) -> None:
        directory = self.options.state_dir
        try:
            directory.mkdir(parents=True, exist_ok=True)
            alive = [node for node in read_state(directory) if processes.running(node)]
            if alive:
                some = "a node" if len(alive) == 1 else f"{len(alive)} nodes"
                raise AlreadyRunning(
                    f"{some} of {directory} still run; end them first with: shoal testnet down"
                )
            stop_recorded(directory, read_state(directory))
            (directory / EMPTY_CONFIG).touch()
        except OSError as problem:
            raise StateProblem(f"{directory} cannot be used: {problem.strerror or problem}") from None

    def _start(self, number: int, invite: str | None = None) -> None:
        name = f"node-{number}"
        data_dir = self.options.state_dir / name
        command = self._command(name, data_dir, invite)
        with self._interrupts.held():
            node, child = processes.start(command, name, data_dir, self.options.state_dir / f"{name}.log")
            self._children[name] = child
            self.nodes += (node,)
            processes.write_state(self.options.state_dir, self.nodes)

    def _command(self, name: str, data_dir: Path, invite: str | None) -> Sequence[str]:
        options = self.options
        command = [*options.command, "up", "--data-dir", str(data_dir), "--name", name]
        command += ["--config", str(options.state_dir / EMPTY_CONFIG)]
        command += ["--api", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0"]
        command += [
            "--log-level",
            "info",
            "--model",
            "none",
        ]  # the founder would otherwise share the built-in one by itself
        command += ["--threads", str(max(1, (os.cpu_count() or 1) // options.nodes))]
        if options.node_memory_bytes is not None:
            command += ["--memory", str(options.node_memory_bytes)]
        if invite is not None:
            command += ["--join", invite]
        return command

    def _invite(self) -> str:
        text = self.client().post("/shoal/invite", {"ttl_s": INVITE_TTL_S}).get("invite")
        if not isinstance(text, str):
            raise DaemonGarbled(f"{self.nodes[0].name} gave no invite")
        return text

    def _wait(
        self, done: Callable[[], bool], lacking: Callable[[], str], on_change: Callable[[], None]
    ) -> None:
        while not done():
            if self._clock_s() >= self._end_s:
                suspect = next((node for node in self.nodes if not node.api), self.nodes[0])
                raise LaunchFailed(f"{lacking()} after {self.options.timeout_s:g} s{self._quote(suspect)}")
            on_change()
            self.pause(POLL_S)

    def _note_ready(self) -> bool:
        fresh = tuple(node if node.api else _with_address(node) for node in self.nodes)
        if fresh != self.nodes:
            self.nodes = fresh
            processes.write_state(self.options.state_dir, fresh)
        return all(node.api for node in fresh)

    def _unready(self) -> str:
        names = [node.name for node in self.nodes if not node.api]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"

    def _all_met(self) -> bool:
        try:
            mesh = MeshView.parse(self.client().get("/mesh"))
        except ShoalError:
            self.explain()
            raise
        seen = {node.peer for node in mesh.nodes if node.connected or node.is_self}
        return {node.peer for node in self.nodes} <= seen

    def _quote(self, node: LocalNode) -> str:
        words = processes.last_words(Path(node.log))
        return f"; its log {node.log} ends: {words}" if words else f"; its log is {node.log}"


def _with_address(node: LocalNode) -> LocalNode:
    found = processes.ready_line(Path(node.log))
    return node if found is None else replace(node, api=found[0], peer=found[1])


def stop_recorded(state_dir: Path, nodes: Sequence[LocalNode]) -> list[LocalNode]:
    """End those of `nodes` that still run, remove their data and the record. Returns those that ran."""
    ended = processes.stop(nodes)
    for node in nodes:
        if Path(node.data_dir).parent == state_dir:
            shutil.rmtree(node.data_dir, ignore_errors=True)
    (state_dir / processes.STATE_FILE).unlink(missing_ok=True)
    return ended
