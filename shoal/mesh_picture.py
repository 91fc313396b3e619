"""The mesh drawn for a terminal: a row a node, its layers as a bar, and under it the models.

`shoal status` and the demo show the same picture. It takes a `MeshView` and returns rich renderables; it
fetches nothing, prints nothing, and is not used where the output is no terminal.
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod, OverflowMethod
from rich.table import Table
from rich.text import Text

from shoal.mesh_view import MeshView, ModelView, NodeView, SpanView, layer_range, node_state, short_peer
from shoal.terminal import size

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")
BAR_CELLS = 24
HELD, COMING, ELSEWHERE = "━", "╸", "─"
WIDE = 100
WIDE_ONLY = ("peer", "rtt")


def colour_of(index: int) -> str:
    """The colour of the node in row `index`."""
    return COLOURS[index % len(COLOURS)]


def layer_bar(span: SpanView | None, layers: int, colour: str, cells: int = BAR_CELLS) -> Text:
    """All `layers` of a model as a line: what `span` holds is thick, what is on its way is coloured."""
    bar = Text()
    cells = cells // layers * layers if layers <= cells else cells
    for cell in range(cells):
        # A cell of a long model stands for several layers and is drawn held if its middle one is.
        layer = (2 * cell + 1) * layers // (2 * cells)
        if span is None or not span.start <= layer < span.end:
            bar.append(ELSEWHERE, "dim")
        elif span.ready:
            bar.append(HELD, colour)
        elif span.state == "failed":
            bar.append(HELD, "red")
        else:
            arrived = (layer - span.start) < span.progress * (span.end - span.start)
            bar.append(COMING if arrived else ELSEWHERE, colour)
    return bar


def node_table(mesh: MeshView, width: int = WIDE) -> Table:
    """A row a node, and a line in it for each model that any node holds; a narrow one without peer and rtt."""
    drawn = Table(box=SIMPLE_HEAD, header_style="bold", border_style="dim", pad_edge=False)
    wide = width >= WIDE
    for name in ("node", "peer", "lends", "rtt", "layers", "fetched", "state"):
        if wide or name not in WIDE_ONLY:
            right = name in ("lends", "rtt", "fetched")
            overflow: OverflowMethod = "fold" if name == "layers" else "ellipsis"
            justify: JustifyMethod = "right" if right else "left"
            drawn.add_column(name, justify=justify, no_wrap=name != "state", overflow=overflow)
    for index, node in enumerate(mesh.nodes):
        cells = _cells(mesh, node, colour_of(index))
        drawn.add_row(*(cell for name, cell in cells.items() if wide or name not in WIDE_ONLY))
    return drawn


def _cells(mesh: MeshView, node: NodeView, colour: str) -> dict[str, Text | str]:
    rtt = "here" if node.is_self else "" if node.rtt_ms is None else f"{node.rtt_ms:.1f} ms"
    fetched = sum(span.bytes_fetched for span in node.spans)
    state = node_state(node)
    mood = "green" if state == "serving" else "red" if state.startswith(("failed", "unre")) else "dim"
    return {
        "node": Text(node.name, f"bold {colour}" if node.is_self or node.connected else "dim"),
        "peer": Text(short_peer(node.peer), "dim"),
        "lends": size(node.memory_bytes) if node.memory_bytes else "",
        "rtt": Text(rtt, "dim"),
        "layers": Text("\n").join(_bars(mesh, node, colour)),
        "fetched": size(fetched) if fetched else "",
        "state": Text(state, mood),
    }


def _bars(mesh: MeshView, node: NodeView, colour: str) -> list[Text]:
    several = len(mesh.models) > 1
    lines = []
    for model in mesh.models:
        span = node.span_of(model.name)
        if several and span is None:
            continue
        line = layer_bar(span, model.layers, colour)
        line.append(f"  {layer_range(span.start, span.end)}" if span else "")
        if several:
            line.append(f"  {model.name}", "dim")
        lines.append(line)
    return lines


def model_line(mesh: MeshView, model: ModelView) -> Text:
    """One line on a model: what it is and whether it is served."""
    line = Text()
    line.append("● " if model.ready else "○ ", "green" if model.ready else "yellow")
    line.append(model.name, "bold")
    line.append(f"  {model.layers} layers, context {model.context_tokens} tokens", "dim")
    copies = "1 copy" if model.copies_min == 1 else f"{model.copies_min} copies"
    wanted = f" of {model.copies_wanted}" if model.copies_wanted > model.copies_min else ""
    line.append(f"  {copies}{wanted}" if model.ready else f"  {model.detail or mesh.lacking(model.name)}")
    return line


def mesh_picture(mesh: MeshView, width: int = WIDE) -> Group:
    """The whole picture, for a terminal of so many columns."""
    here = next((node.name for node in mesh.nodes if node.is_self), short_peer(mesh.self_peer))
    title = Text.assemble(("mesh ", "dim"), (mesh.mesh, "bold"), (f"  seen from {here}", "dim"))
    models = [model_line(mesh, model) for model in mesh.models]
    if not models:
        models = [Text("no models yet; share one with: shoal add DIR --name NAME", "dim")]
    return Group(title, node_table(mesh, width), *models)
