"""`shoal invite`, `status`, `models` and `add`: questions to a running daemon and their answers, drawn.

Results go to stdout, whatever only a person needs goes to stderr, so that each command can stand in a pipe.
It decides nothing about the mesh; `shoal.mesh_view` reads the daemon's answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from shoal import terminal
from shoal.blob_lines import blob_lines
from shoal.daemon_client import DaemonClient, connect, one_event
from shoal.errors import CommandFailed, DaemonGarbled, UsageProblem
from shoal.mesh_view import MeshView, ModelView, NodeView, layer_range, layer_words, node_state, short_peer

EMBEDDED = "embedded"
HUB = "hf:"
POLL_S = 0.25
WATCH_S = 1.0
# How long a mesh may find no room for a model before nobody waits for it: nodes may just be coming.
SHORTAGE_S = 3.0


def invite(options: argparse.Namespace) -> int:
    """Print an invite, with a QR code where a person can point a camera at it."""
    answer = connect(options.api, options.data_dir).post(
        "/shoal/invite", {"ttl_s": options.ttl, "single_use": options.once}
    )
    text = answer.get("invite")
    if not isinstance(text, str) or not text:
        raise DaemonGarbled("the daemon answered without an invite")
    if options.json:
        print(json.dumps({"invite": text, "ttl_s": options.ttl}))
        return 0
    if terminal.is_terminal(sys.stdout):
        if not options.no_qr:
            show_qr(text)
        whom = "the first computer that uses it" if options.once else "whoever has it"
        terminal.note(f"Good for {terminal.duration(options.ttl)}, for {whom}. On the other computer:\n")
        print(f"shoal join {text}")
    else:
        print(text)
    return 0


def show_qr(text: str) -> None:
    """Draw a QR code of `text` on stderr in half blocks, if it fits the terminal."""
    import segno

    from shoal.qr import half_blocks

    console = terminal.console(stderr=True)
    colourless = console.no_color or console.color_system is None
    matrix = [bytes(row) for row in segno.make(text, error="l", micro=False).matrix]
    lines = half_blocks(matrix, inverted=colourless)
    if len(lines[0]) > console.width or len(lines) > console.height - 4:
        terminal.note(
            f"(a window of {len(lines[0])} x {len(lines) + 4} characters would also show a QR code)"
        )
        return
    for line in lines:
        console.print(line, style="" if colourless else "black on bright_white", no_wrap=True)


def status(options: argparse.Namespace) -> int:
    """Show nodes and models once, or keep showing them."""
    client = connect(options.api, options.data_dir)
    if options.json:
        print(json.dumps(client.get("/mesh"), indent=1))
    elif terminal.is_terminal(sys.stdout):
        _show_picture(lambda: MeshView.parse(client.get("/mesh")), watch=options.watch)
        _print_blobs(client.get("/mesh"))
    else:
        document = client.get("/mesh")
        mesh = MeshView.parse(document)
        here = next((node for node in mesh.nodes if node.is_self), None)
        terminal.note(f"mesh {mesh.mesh} seen from {here.name if here else mesh.self_peer} ({client.api})")
        terminal.table(NODE_COLUMNS, map(_node_row, mesh.nodes), right=("memory", "rtt"))
        print()
        _print_models(mesh)
        _print_blobs(document)
    return 0


def _print_blobs(document: Mapping[str, Any]) -> None:
    for line in blob_lines(document):
        print(line)


def _show_picture(look: Callable[[], MeshView], *, watch: bool) -> None:
    from rich.live import Live

    from shoal.mesh_picture import mesh_picture

    console = terminal.console()
    if not watch:
        console.print(mesh_picture(look(), console.width))
        return
    with Live(mesh_picture(look(), console.width), console=console, refresh_per_second=4) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(mesh_picture(look(), console.width))


NODE_COLUMNS = ("node", "peer", "memory", "rtt", "layers", "state")


def _node_row(node: NodeView) -> tuple[str, ...]:
    rtt = "here" if node.is_self else "" if node.rtt_ms is None else f"{node.rtt_ms:.1f} ms"
    layers = ", ".join(f"{span.model} {layer_range(span.start, span.end)}" for span in node.spans)
    return node.name, short_peer(node.peer), terminal.size(node.memory_bytes), rtt, layers, node_state(node)


def models(options: argparse.Namespace) -> int:
    """List the models."""
    document = connect(options.api, options.data_dir).get("/mesh")
    mesh = MeshView.parse(document)
    if options.json:
        print(json.dumps({"models": document.get("models", [])}, indent=1))
    else:
        _print_models(mesh)
    return 0


def _print_models(mesh: MeshView) -> None:
    if not mesh.models:
        terminal.note("no models yet; share one with: shoal add DIR --name NAME")
        return
    rows = map(_model_row, mesh.models)
    terminal.table(("model", "layers", "context", "copies", "state"), rows, right=("layers", "context"))


def _model_row(model: ModelView) -> tuple[str, ...]:
    state = "ready" if model.ready else model.detail or "not ready"
    copies = f"{model.copies_min} of {model.copies_wanted}"
    return model.name, str(model.layers), str(model.context_tokens), copies, state


def add(options: argparse.Namespace) -> int:
    """Publish a directory, wait until the mesh serves it, say where the layers went."""
    directory, name = model_source(options.directory, options.name)
    tuned = directory != EMBEDDED and not directory.startswith(HUB) and is_adapter(Path(directory))
    if tuned and (options.copies != 1 or options.require or options.ends_require):
        raise UsageProblem(
            "an adapter goes where its base is: --copies, --require and --ends-require are not for it"
        )
    client = connect(options.api, options.data_dir)
    with terminal.progress(quiet=options.json) as progress:
        tuned |= publish(
            client, directory, name, options.copies, progress, base=options.base or "",
            require=options.require, ends_require=options.ends_require,
        )  # fmt: skip
        if tuned:
            return _added_adapter(options, name)
        mesh = None
        if not options.no_wait:
            show = spreading(name, options.copies, progress)
            mesh = wait_served(client, name, options.copies, options.timeout, show)
    if options.json:
        print(
            json.dumps(
                {"model": name, "copies": options.copies, "spans": spans_of(mesh, name) if mesh else None}
            )
        )
    elif mesh is None:
        print(
            f"{name} is published; watch it spread with: {terminal.program()} status{terminal.aim(options)}"
        )
    else:
        for line in where_layers_went(mesh, name):
            print(line)
        terminal.note(f'ask it: {terminal.program()} run {name} "..."{terminal.aim(options)}')
    return 0


def _added_adapter(options: argparse.Namespace, name: str) -> int:
    if options.json:
        print(json.dumps({"model": name, "copies": 1, "spans": None}))
    else:
        print(f"{name} is served by whoever hosts its base")
        terminal.note(f'ask it: {terminal.program()} run {name} "..."{terminal.aim(options)}')
    return 0


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter and no model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def model_source(directory: str, name: str | None) -> tuple[str, str]:
    """A model's directory, absolute, and its name, for the daemon. Raises CommandFailed, UsageProblem."""
    if directory == EMBEDDED:
        return EMBEDDED, name or EMBEDDED
    if directory.startswith(HUB):
        return directory, name or directory.partition("@")[0].rpartition("/")[2]
    path = Path(directory).expanduser().resolve()
    if not path.is_dir():
        raise CommandFailed(f"{directory} is not a directory")
    if not (path / "config.json").is_file() and not is_adapter(path):
        raise CommandFailed(f"{directory} holds no config.json, so it is not a Hugging Face model directory")
    if not (name or path.name):
        raise UsageProblem("give the model a name with --name")
    return str(path), name or path.name


def publish(
    client: DaemonClient,
    directory: str,
    name: str,
    copies: int,
    progress: terminal.Progress,
    base: str = "",
    **tags: Sequence[str],
) -> bool:
    """Have the daemon publish `directory`; returns once the mesh knows the model, with whether it is an adapter. Raises
    ShoalError."""
    body = {"directory": directory, "name": name, "copies": copies}
    body |= {"base": base} if base else {}
    body |= {field: list(wanted) for field, wanted in tags.items() if wanted}
    label, tuned = f"reading {name}", False
    progress(label, None)
    with closing(client.ndjson("/shoal/models", body)) as events:
        for event in map(one_event, events):
            done, total = event.get("done"), event.get("total")
            if event.get("state") == "fetching":
                label = f"fetching {name}"
            elif event.get("state") not in (None, "hashing"):
                tuned = event.get("adapter") is True
                break  # published; the rest of the stream is about placing, which `wait_served` shows better
            if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
                progress(label, min(done / total, 1.0), f"{terminal.size(done)} of {terminal.size(total)}")
    progress(label, 1.0)
    return tuned


def wait_served(
    client: DaemonClient,
    name: str,
    copies: int,
    timeout_s: float,
    look: Callable[[MeshView], None],
    sleep: Callable[[float], None] = time.sleep,
    clock_s: Callable[[], float] = time.monotonic,
) -> MeshView:
    """Poll until every layer of `name` is ready on `copies` nodes, calling `look` with each view of the mesh.

    Raises CommandFailed after `timeout_s`, with what is missing, and sooner where the mesh has no room for it.
    """
    end_s = clock_s() + timeout_s
    short, short_since_s = "", 0.0
    while True:
        mesh = MeshView.parse(client.get("/mesh"))
        look(mesh)
        model = mesh.model(name)
        if model is not None and model.ready and mesh.served(name, copies):
            return mesh
        now_s = clock_s()
        if model is not None and model.shortage != short:
            short, short_since_s = model.shortage, now_s
        if short and now_s - short_since_s >= SHORTAGE_S:
            fewer = f"is served, but not {copies} times" if mesh.served(name) else "cannot be served"
            raise CommandFailed(f"'{name}' {fewer}: {short}")
        if now_s >= end_s:
            lacking = mesh.lacking(name, copies) or f"'{name}' is not ready"
            raise CommandFailed(f"{lacking} after {terminal.duration(timeout_s)}")
        sleep(POLL_S)


def spreading(name: str, copies: int, progress: terminal.Progress) -> Callable[[MeshView], None]:
    """Show how far a model has spread, for `wait_served`."""

    def show(mesh: MeshView) -> None:
        model = mesh.model(name)
        detail = model.detail if model is not None and not model.ready else ""
        progress(f"spreading {name}", mesh.progress(name, copies), detail or _fetched(mesh, name))

    return show


def _fetched(mesh: MeshView, name: str) -> str:
    total = sum(span.bytes_fetched for node in mesh.nodes for span in node.spans if span.model == name)
    return f"{terminal.size(total)} copied" if total else ""


def spans_of(mesh: MeshView, name: str) -> list[dict[str, Any]]:
    """Which node holds which layers of `name`, JSON-able, first layer first."""
    held = [(span.start, span.end, node) for node in mesh.nodes for span in node.spans if span.model == name]
    held.sort(key=lambda item: (item[0], item[1], item[2].name))
    return [{"node": node.name, "peer": node.peer, "start": start, "end": end} for start, end, node in held]


def where_layers_went(mesh: MeshView, name: str) -> Iterable[str]:
    """Lines that say which node holds which layers."""
    spans = spans_of(mesh, name)
    nodes = "1 node" if len(spans) == 1 else f"{len(spans)} nodes"
    model = mesh.model(name)
    yield f"{name} is served: {model.layers if model else 0} layers on {nodes}"
    width = max((len(span["node"]) for span in spans), default=0)
    for span in spans:
        yield f"  {span['node'].ljust(width)}  {layer_words(span['start'], span['end'])}"
