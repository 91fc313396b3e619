"""`shoal demo`: four processes on this machine become one mesh and serve a model that none of them could hold.

What happens, in order; how it looks is `shoal.demo_stage`'s. Everything goes through the same doors that a person
would use: `shoal up`, an invite, `shoal add`, the OpenAI endpoint. However it ends, it ends what it started.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
import time
from pathlib import Path

from shoal import terminal
from shoal.cli_mesh import EMBEDDED, publish, wait_served
from shoal.cli_run import Figures, generate
from shoal.cli_testnet import plain_errors, state_dir
from shoal.demo_stage import Stage, open_stage
from shoal.errors import CommandFailed, ShoalError
from shoal.mesh_view import MeshView, layer_words
from testnet import LaunchOptions, LocalNode, Testnet

NODES = 4
# Less than the whole embedded model with its cache needs, and enough for a third of it.
NODE_MEMORY_BYTES = 6 << 20
TIMEOUT_S = 120.0
PROMPT = "def read_file(path):"
MAX_TOKENS = 48
TEMPERATURE = 0.4
SEED = 5
LOOK_S = 0.2


def demo(options: argparse.Namespace) -> int:
    """Run the demo."""
    scratch = None if options.keep else Path(tempfile.mkdtemp(prefix="shoal-demo-")).resolve()
    launch = LaunchOptions(
        state_dir=scratch or state_dir(argparse.Namespace(state_dir=None)),
        nodes=NODES,
        node_memory_bytes=NODE_MEMORY_BYTES,
        timeout_s=TIMEOUT_S,
    )
    try:
        with plain_errors(), Testnet(launch) as net:
            stage = _play(net, options)
    except ShoalError as problem:
        # The nodes are gone, their logs are not: whoever wants to know more finds them.
        known = str(launch.state_dir) in str(problem)
        raise CommandFailed(f"{problem}" if known else f"{problem} (logs: {launch.state_dir})") from None
    except BaseException:  # however it ended, nothing is left behind
        _forget(scratch)
        raise
    _forget(scratch)
    stage.try_next(_commands(net.nodes[-1] if options.keep else None))
    return 0


def _play(net: Testnet, options: argparse.Namespace) -> Stage:
    try:
        with open_stage(plain=options.plain) as stage:
            mesh = _gather(net, stage)
        _ask(net, mesh, options.prompt or PROMPT, stage)
    except ShoalError:
        net.explain()
        raise
    if options.keep:
        net.release()
    else:
        began_s = time.monotonic()
        net.stop()
        stage.say(f"All {NODES} nodes were stopped in {terminal.duration(time.monotonic() - began_s)}.")
    return stage


def _forget(scratch: Path | None) -> None:
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _gather(net: Testnet, stage: Stage) -> MeshView:
    """From nothing to a served model, shown as it happens."""
    watch = _Watch(net, stage)
    stage.step("starting the first node, which founds a mesh")
    net.form(watch.look)
    stage.step(f"sharing the built-in model from {net.nodes[0].name} only")
    lent = terminal.size(NODE_MEMORY_BYTES)

    def reading(label: str, fraction: float | None, detail: str = "") -> None:
        stage.detail(detail)

    publish(net.client(), EMBEDDED, EMBEDDED, 1, reading)
    stage.step(f"spreading its layers: no node's {lent} can hold them all")
    # Every node must know, the one that is asked above all.
    mesh = wait_served(net.client(), EMBEDDED, 1, net.left_s(), watch.show, sleep=net.pause)
    for index in range(1, NODES):
        wait_served(net.client(index), EMBEDDED, 1, net.left_s(), lambda _: None, sleep=net.pause)
    stage.finish()
    return mesh


class _Watch:
    """Tells the stage how the mesh looks while the nodes come up."""

    def __init__(self, net: Testnet, stage: Stage) -> None:
        self._net = net
        self._stage = stage
        self._next_s = 0.0
        self._joining = False

    def look(self) -> None:
        """Called often; asks the first node now and then."""
        net = self._net
        if len(net.nodes) > 1 and not self._joining:
            self._joining = True
            self._stage.step(f"starting {NODES - 1} more, which join by its invite")
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + LOOK_S
        mesh = None
        if net.nodes[0].api:
            mesh = MeshView.parse(net.client().get("/mesh"))
        self._stage.show(mesh, [node.name for node in net.nodes])

    def show(self, mesh: MeshView) -> None:
        """A view that somebody else fetched."""
        self._stage.show(mesh, [node.name for node in self._net.nodes])


def _ask(net: Testnet, mesh: MeshView, prompt: str, stage: Stage) -> None:
    """Send the prompt to the OpenAI endpoint of a node without a first layer."""
    index, held = _far_node(net, mesh)
    stage.asking(net.nodes[index].name, held, f"{net.nodes[index].api}/v1/completions")
    figures = Figures()
    body = {
        "model": EMBEDDED,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stage.text(prompt, given=True)
    try:
        for piece in generate(net.client(index), "/v1/completions", body, figures):
            stage.text(piece)
    except BaseException:  # also Ctrl-C: what is said next must not stand behind half a sentence
        stage.broken()
        raise
    stage.figures(f"{figures.line()}, through {_stages(mesh)} processes")


def _far_node(net: Testnet, mesh: MeshView) -> tuple[int, str]:
    """The node whose span starts last, and that span in words."""
    starts = {node.peer: node.span_of(EMBEDDED) for node in mesh.nodes}
    held = [
        (index, span) for index, node in enumerate(net.nodes) if (span := starts.get(node.peer)) is not None
    ]
    if not held:
        return len(net.nodes) - 1, "no layer at all"
    index, span = max(held, key=lambda item: item[1].start)
    return index, layer_words(span.start, span.end) + (" and no first layer" if span.start else "")


def _stages(mesh: MeshView) -> int:
    return sum(1 for node in mesh.nodes if node.span_of(EMBEDDED))


def _commands(kept: LocalNode | None) -> list[tuple[str, str]]:
    """Three commands to go on with, and what each does."""
    shoal = terminal.program()
    question = f"{shlex.quote(PROMPT)} --temperature {TEMPERATURE} --seed {SEED}"
    if kept is not None:
        return [
            (f"{shoal} status --watch --api {kept.api}", "the mesh, live"),
            (f"{shoal} run {EMBEDDED} {question} --api {kept.api}", "ask it"),
            (f"{shoal} testnet down", "end the four nodes"),
        ]
    return [
        (f"{shoal} up", "a node of your own; leave it running"),
        (f"{shoal} run {EMBEDDED} {question}", "in a second terminal: ask it"),
        (f"{shoal} invite", "let a second computer join"),
    ]
