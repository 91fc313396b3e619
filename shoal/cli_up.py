"""`shoal up` and `shoal join`: hand the flags to the daemon and run it in this process.

This is the only module of the command line that imports the daemon, because that brings torch and libp2p
along. It checks nothing itself: `node.config` does, and names the flag.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shoal.daemon_client import DaemonClient, data_dir, read_address
from shoal.errors import CommandFailed, DaemonAbsent, UsageProblem
from shoal.terminal import note

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
    "memory",
    "disk",
    "copies",
    "concurrency",
    "threads",
    "name",
    "log_level",
)


def up(options: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    # Imported first and alone: a wrong flag is reported before torch and libp2p are loaded.
    from node.config import load_config
    from node.errors import ConfigProblem, NodeError

    try:
        config = load_config(daemon_flags(options), file=Path(options.config) if options.config else None)
    except ConfigProblem as problem:
        raise UsageProblem(str(problem)) from None
    from node.daemon import run_daemon

    try:
        return run_daemon(config)
    except NodeError as problem:
        raise CommandFailed(str(problem)) from None


def daemon_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as node.config names them; what was not given is left out."""
    flags = {name: getattr(options, name, None) for name in SAME_NAME}
    flags["public"] = True if options.public else None
    flags["serve"] = False if options.no_serve else None
    return {name: value for name, value in flags.items() if value is not None}


def join(options: argparse.Namespace) -> int:
    """Join through the daemon that runs on the data directory, or start one that joins."""
    invite = "".join(options.invite.split())
    directory = data_dir(options.data_dir)
    address = read_address(directory)
    if address is not None:
        client = DaemonClient(address.api, where=f"the daemon of {directory} (process {address.pid})")
        try:
            client.post("/shoal/join", {"invite": invite})
        except DaemonAbsent:
            pass  # it died without removing its address: start another
        else:
            note(f"the node at {address.api} joined the mesh; see it with: shoal status")
            return 0
    options.join = invite
    return up(options)
