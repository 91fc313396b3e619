"""`shoal testnet up|down|status`: local nodes as one mesh, a model on the first, left running and ended again.

The processes are `testnet.launch`'s; sharing the model and waiting for its layers is what `shoal add` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal import terminal
from shoal.cli_mesh import model_source, publish, spans_of, spreading, wait_served, where_layers_went
from shoal.daemon_client import DaemonClient, data_dir
from shoal.errors import CommandFailed, ShoalError
from shoal.mesh_view import MeshView, layer_range
from testnet import LaunchOptions, LocalNode, Testnet, TestnetError, read_state, stop_recorded
from testnet.processes import running

MIB = 1 << 20


def up(options: argparse.Namespace) -> int:
    """Start nodes, share the model, wait until it is served, leave everything running."""
    directory, _, name = options.model.partition("=")
    directory, name = model_source(directory, name or None)
    launch = LaunchOptions(
        state_dir=state_dir(options),
        nodes=options.nodes,
        node_memory_bytes=None if options.node_memory is None else int(options.node_memory * MIB),
        timeout_s=options.timeout,
    )
    with plain_errors(), Testnet(launch) as net:
        with terminal.progress(quiet=options.json) as progress:
            mesh = bring_up(net, directory, name, options.copies, progress)
        net.release()
    if options.json:
        print(json.dumps({"nodes": described(net.nodes, mesh)}))
        return 0
    for line in where_layers_went(mesh, name):
        print(line)
    for node in net.nodes:
        terminal.note(f"{node.name}  {node.api}  process {node.pid}")
    shoal = terminal.program()
    terminal.note(f'ask it: {shoal} run {name} "..." --api {net.nodes[-1].api}')
    terminal.note(
        f"end it: {shoal} testnet down" + (f" --state-dir {options.state_dir}" if options.state_dir else "")
    )
    return 0


def bring_up(net: Testnet, directory: str, name: str, copies: int, progress: terminal.Progress) -> MeshView:
    """Form the mesh, share the model from the first node and wait until every node finds it served."""

    def count_ready() -> None:
        ready = sum(1 for node in net.nodes if node.api)
        progress("starting nodes", ready / net.options.nodes, f"{ready} of {net.options.nodes}")

    net.form(count_ready)
    progress("starting nodes", 1.0, f"{net.options.nodes} of {net.options.nodes}")
    try:
        publish(net.client(), directory, name, copies, progress)
        for index in reversed(range(len(net.nodes))):
            show = spreading(name, copies, progress)
            mesh = wait_served(net.client(index), name, copies, net.left_s(), show, sleep=net.pause)
    except ShoalError:
        net.explain()  # a node that died says more in its log than our failed request
        raise
    return mesh


def down(options: argparse.Namespace) -> int:
    """End exactly the nodes that `up` recorded."""
    with plain_errors():
        directory = state_dir(options)
        nodes = read_state(directory)
        ended = stop_recorded(directory, nodes) if nodes else []
    if options.json:
        print(json.dumps({"ended": [{"name": node.name, "pid": node.pid} for node in ended]}))
    elif not nodes:
        terminal.note("no local nodes are recorded; nothing to end")
    else:
        gone = len(nodes) - len(ended)
        print(f"ended {len(ended)} of {len(nodes)} nodes" + (f"; {gone} had ended before" if gone else ""))
    return 0


def status(options: argparse.Namespace) -> int:
    """Show the recorded nodes and what they hold."""
    with plain_errors():
        nodes = read_state(state_dir(options))
        alive = {node.name for node in nodes if running(node)}
    mesh = _any_view([node for node in nodes if node.name in alive])
    rows = [
        {**asdict(node), "running": node.name in alive, "spans": spans}
        for node, spans in zip(nodes, _spans(nodes, mesh), strict=True)
    ]
    if options.json:
        print(json.dumps({"nodes": rows}))
    elif not rows:
        terminal.note(f"no local nodes; start some with: {terminal.program()} testnet up -n 4")
    else:
        held = [
            ", ".join(f"{s['model']} {layer_range(s['start'], s['end'])}" for s in row["spans"])
            for row in rows
        ]
        terminal.table(
            ("node", "pid", "state", "api", "layers"),
            [
                (row["name"], str(row["pid"]), "running" if row["running"] else "ended", row["api"], layers)
                for row, layers in zip(rows, held, strict=True)
            ],
            right=("pid",),
        )
    return 0


def state_dir(options: argparse.Namespace) -> Path:
    """Where the record of local nodes is kept, absolute."""
    chosen = Path(options.state_dir).expanduser() if options.state_dir else data_dir(None) / "testnet"
    return chosen.resolve()


def described(nodes: Sequence[LocalNode], mesh: MeshView) -> list[dict[str, Any]]:
    """The nodes as the contract has them: pid, api, peer, spans, and their name."""
    return [
        {"name": node.name, "pid": node.pid, "api": node.api, "peer": node.peer, "spans": spans}
        for node, spans in zip(nodes, _spans(nodes, mesh), strict=True)
    ]


def _spans(nodes: Sequence[LocalNode], mesh: MeshView | None) -> list[list[dict[str, Any]]]:
    models = [] if mesh is None else [model.name for model in mesh.models]
    held = [(name, span) for name in models if mesh for span in spans_of(mesh, name)]
    return [
        [
            {"model": name, "start": span["start"], "end": span["end"]}
            for name, span in held
            if span["peer"] == node.peer
        ]
        for node in nodes
    ]


def _any_view(nodes: Sequence[LocalNode]) -> MeshView | None:
    for node in nodes:
        if node.api:
            try:
                return MeshView.parse(DaemonClient(node.api, answer_timeout_s=5.0).get("/mesh"))
            except ShoalError as problem:
                print(f"{node.name}: {problem}", file=sys.stderr)
    return None


@contextmanager
def plain_errors() -> Iterator[None]:
    """The launcher's errors as the command line's."""
    try:
        yield
    except TestnetError as problem:
        raise CommandFailed(str(problem)) from None
