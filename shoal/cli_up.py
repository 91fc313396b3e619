"""`shoal up` and `shoal join`: hand the flags to the daemon, run it in this process, and show a person how it is.

This is the only module of the command line that imports the daemon, because that brings torch and libp2p
along. It checks nothing itself: `node.config` does, and names the flag.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from node.console import Console
from node.gateway import ModelInfo
from shoal import terminal
from shoal.daemon_client import DaemonClient, data_dir, read_address
from shoal.errors import CommandFailed, DaemonAbsent, DaemonSilent, UsageProblem
from shoal.mesh_view import MeshView

# The settings of node.config whose flags have the same name.
SAME_NAME = (
    "data_dir",
    "api",
    "listen",
    "join",
    "models",
    "layers",
    "device",
    "dtype",
    "quant",
    "kv_quant",
    "memory",
    "disk",
    "copies",
    "concurrency",
    "threads",
    "name",
    "tags",
    "region",
    "relay_mbps",
    "upload_mbps",
    "require",
    "ends_require",
    "log_level",
)
MOVE_WAIT_S = 15.0
POLL_S = 0.2


def up(options: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    # Imported first and alone: a wrong flag is reported before torch and libp2p are loaded.
    from node.config import load_config
    from node.errors import ConfigProblem, NodeError

    try:
        config = load_config(daemon_flags(options), file=Path(options.config) if options.config else None)
    except ConfigProblem as problem:
        raise UsageProblem(str(problem)) from None
    console = PersonConsole(options.data_dir) if terminal.is_terminal(sys.stderr) else Console()
    console.busy("starting")
    run_daemon = _daemon()
    try:
        return run_daemon(config, console)
    except NodeError as problem:
        raise CommandFailed(str(problem)) from None
    finally:
        if isinstance(console, PersonConsole):
            console.clear()
        gc.freeze()  # the interpreter would otherwise search all of torch for garbage before it ends


def _daemon() -> Callable[..., int]:
    """`run_daemon`. Its imports make a million objects that stay, so nobody looks for garbage among them."""
    gc.disable()
    try:
        from node.daemon import run_daemon
    finally:
        gc.freeze()
        gc.enable()
    return run_daemon


class PersonConsole(Console):
    """For a terminal: how far the start is, on stderr, then where the node is and what to do with it."""

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__()
        self._aim = f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
        self._stack = ExitStack()
        self._progress = self._stack.enter_context(terminal.progress(transient=True))
        self._greeted = False

    def busy(self, label: str, fraction: float | None = None, detail: str = "") -> None:
        if not self._greeted:
            self._progress(label, fraction, detail)

    def stopping(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the progress bar away for good."""
        self._greeted = True
        self._stack.close()

    def failed(self, problem: object) -> None:
        self.clear()
        super().failed(problem)

    def ready(self, api: str, peer: str, models: Sequence[ModelInfo]) -> None:
        self.clear()
        super().ready(api, peer, models)
        for line in greeting(api, models, terminal.program(), self._aim):
            terminal.note(line)


def greeting(api: str, models: Sequence[ModelInfo], program: str, aim: str = "") -> list[str]:
    """What a person may want to know once the node is up."""
    lines = [f"  OpenAI endpoint   {api}/v1"]
    served = [model.name for model in models if model.ready]
    if served:
        lines.append(f'  ask it            {program} run {served[0]} "..."{aim}')
    lines += [f"  {model.name} is not served yet: {model.detail}" for model in models if not model.ready]
    lines.append(f"  add a computer    {program} invite{aim}")
    lines.append("Ctrl-C stops this node.")
    return lines


def daemon_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as node.config names them; what was not given is left out."""
    flags = {name: getattr(options, name, None) for name in SAME_NAME}
    flags["public"] = True if options.public else None
    flags["mdns"] = False if options.no_mdns else None
    flags["serve"] = False if options.no_serve else None
    if options.verbose and flags["log_level"] is None:
        flags["log_level"] = "info" if options.verbose == 1 else "debug"
    return {name: value for name, value in flags.items() if value is not None}


def join(options: argparse.Namespace) -> int:
    """Join through the daemon that runs on the data directory, or start one that joins."""
    invite = "".join(options.invite.split())
    directory = data_dir(options.data_dir)
    address = read_address(directory)
    if address is not None:
        client = DaemonClient(address.api, where=f"the daemon of {directory} (process {address.pid})")
        try:
            before = MeshView.parse(client.get("/mesh")).mesh
            client.post("/shoal/join", {"invite": invite})
        except DaemonAbsent:
            pass  # it died without removing its address: start another
        else:
            print(moved(client, before))
            options.api = None  # of `shoal up`: where it would listen
            terminal.note(f"see it with: {terminal.program()} status{terminal.aim(options)}")
            return 0
    options.join = invite
    return up(options)


def moved(
    client: DaemonClient,
    before: str,
    sleep: Callable[[float], None] = time.sleep,
    clock_s: Callable[[], float] = time.monotonic,
) -> str:
    """Wait until the daemon met somebody in the mesh it was told to join, and say so. Raises ShoalError."""
    end_s = clock_s() + MOVE_WAIT_S
    mesh = None
    while True:
        try:
            mesh = MeshView.parse(client.get("/mesh"))
        except (DaemonAbsent, DaemonSilent):
            pass  # its API is closed for a moment while it changes over
        others = [node for node in mesh.nodes if node.connected and not node.is_self] if mesh else []
        if mesh and others:
            already = "already belongs" if mesh.mesh == before else "now belongs"
            count = "1 other node" if len(others) == 1 else f"{len(others)} other nodes"
            return f"the node at {client.api} {already} to mesh {mesh.mesh}, with {count}"
        if clock_s() >= end_s:
            break
        sleep(POLL_S)
    if mesh is None:
        raise DaemonSilent(f"the node at {client.api} has not come back since it was told to join")
    raise CommandFailed(
        f"the node at {client.api} belongs to mesh {mesh.mesh}, but none of the invite's addresses answers yet; "
        "it keeps trying"
    )
