"""How the demo looks: a live picture in a terminal, plain lines with times everywhere else.

Both stages show the same things in the same order. They know how to draw a mesh and a text, not how either comes
about.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from shoal import terminal
from shoal.mesh_view import MeshView, NodeView, layer_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

TITLE = "Shoal: four small nodes, one model that none of them can hold"
MARGIN = "  "


class Stage(Protocol):
    """What the demo shows, in the order of the methods."""

    def step(self, text: str) -> None:
        """The step before is done; this one begins."""

    def detail(self, text: str) -> None:
        """A few words on the step that is going on."""

    def show(self, mesh: MeshView | None, names: Sequence[str]) -> None:
        """The mesh as it is now; `names` are all nodes, also those that it does not know yet."""

    def finish(self) -> None:
        """The last step is done."""

    def asking(self, node: str, held: str, url: str) -> None:
        """The question goes to `node`."""

    def text(self, piece: str, *, given: bool = False) -> None:
        """A piece of the prompt (given) or of the answer."""

    def broken(self) -> None:
        """The answer broke off; whatever is said next begins a line."""

    def figures(self, line: str) -> None:
        """How fast the answer came."""

    def say(self, line: str) -> None:
        """A closing line."""

    def try_next(self, commands: Sequence[tuple[str, str]]) -> None:
        """Commands, and what each does."""


@contextmanager
def open_stage(*, plain: bool) -> Iterator[Stage]:
    """The live stage where there is a terminal wide enough for it, else the plain one."""
    if plain or not terminal.is_terminal(sys.stdout):
        yield PlainStage()
        return
    from rich.live import Live

    stage = LiveStage()
    with Live(console=stage.console, refresh_per_second=12, get_renderable=stage.picture) as live:
        stage.live = live
        yield stage


def with_missing(mesh: MeshView | None, names: Sequence[str]) -> MeshView:
    """`mesh` with a row for each of `names`, in their order; nodes that it does not know yet are starting."""
    known = {node.name: node for node in mesh.nodes} if mesh else {}
    absent = NodeView("", "", None, 0, False, True, False, None, "", ())
    nodes = tuple(known.get(name) or replace(absent, name=name) for name in names)
    return replace(mesh, nodes=nodes) if mesh else MeshView("", "", nodes, ())


class PlainStage:
    """Lines with the time since the start, for logs and pipes."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._mesh: MeshView | None = None
        self._line_start = True
        print(TITLE, flush=True)

    def step(self, text: str) -> None:
        self.say(text)

    def detail(self, text: str) -> None:
        pass

    def show(self, mesh: MeshView | None, names: Sequence[str]) -> None:
        self._mesh = mesh

    def finish(self) -> None:
        self.say("every layer is served")
        for node in self._mesh.nodes if self._mesh else ():
            for span in node.spans:
                source = (
                    f"{terminal.size(span.bytes_fetched)} fetched from its peers"
                    if span.bytes_fetched
                    else "from its own disk"
                )
                held = layer_words(span.start, span.end)
                print(f"           {node.name}  {held.ljust(11)}  {source}", flush=True)

    def asking(self, node: str, held: str, url: str) -> None:
        self.say(f"asking {node}, which holds {held}: {url}")

    def text(self, piece: str, *, given: bool = False) -> None:
        for part in piece.splitlines(keepends=True):
            sys.stdout.write(("    " if self._line_start else "") + part)
            self._line_start = part.endswith("\n")
        sys.stdout.flush()

    def broken(self) -> None:
        if not self._line_start:
            print(flush=True)

    def figures(self, line: str) -> None:
        self.broken()
        self.say(line)

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began_s:6.1f} s] {line}", flush=True)

    def try_next(self, commands: Sequence[tuple[str, str]]) -> None:
        print("try next:")
        width = max(len(command) for command, _ in commands)
        for command, what in commands:
            print(f"  {command.ljust(width)}  # {what}")


class LiveStage:
    """A picture that changes while the mesh comes up, then the text under it."""

    def __init__(self) -> None:
        from rich.spinner import Spinner

        self.console = terminal.console()
        self.live: Live | None = None
        self._steps: list[tuple[str, float]] = []
        self._step_s = time.monotonic()
        self._going = ""
        self._detail = ""
        self._mesh: MeshView = with_missing(None, ())
        self._spinner = Spinner("dots", style="cyan")
        self._line_start = True

    def picture(self) -> RenderableType:
        """The whole live part."""
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        from shoal.mesh_picture import model_line, node_table

        steps = Table.grid(padding=(0, 1))
        for text, seconds in self._steps:
            steps.add_row(Text("✓", "green"), Text(text), Text(terminal.duration(seconds), "dim"))
        if self._going:
            steps.add_row(self._spinner, Text(self._going), Text(self._detail, "dim"))
        parts: list[RenderableType] = [Text(TITLE, "bold"), Text(), steps]
        if self._mesh.nodes:
            parts.append(node_table(self._mesh, self.console.width))
        parts += [model_line(self._mesh, model) for model in self._mesh.models]
        return Padding(Group(*parts), (1, 2, 0, 2))

    def step(self, text: str) -> None:
        now_s = time.monotonic()
        if self._going:
            self._steps.append((self._going, now_s - self._step_s))
        self._going, self._detail, self._step_s = text, "", now_s

    def detail(self, text: str) -> None:
        self._detail = text

    def show(self, mesh: MeshView | None, names: Sequence[str]) -> None:
        self._mesh = with_missing(mesh, names)

    def finish(self) -> None:
        self.step("")

    def asking(self, node: str, held: str, url: str) -> None:
        from rich.text import Text

        self.console.print()
        self.console.print(Text.assemble(MARGIN, "asking ", (node, "bold"), f", which holds {held}"))
        self.console.print(Text.assemble(MARGIN, (url, "dim")))
        self.console.print()

    def text(self, piece: str, *, given: bool = False) -> None:
        from rich.text import Text

        for part in terminal.safe_for_terminal(piece).splitlines(keepends=True):
            if self._line_start:
                self.console.print(Text(MARGIN + "│ ", "cyan"), end="")
            self.console.print(Text(part.rstrip("\n"), "dim" if given else ""), end="", soft_wrap=True)
            self._line_start = part.endswith("\n")
            if self._line_start:
                self.console.print()
        self.console.file.flush()

    def broken(self) -> None:
        if not self._line_start:
            self.console.print()

    def figures(self, line: str) -> None:
        from rich.text import Text

        self.broken()
        self.console.print()
        self.console.print(Text.assemble(MARGIN, ("✓ ", "green"), (line, "bold")))

    def say(self, line: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(MARGIN, ("✓ ", "green"), line))

    def try_next(self, commands: Sequence[tuple[str, str]]) -> None:
        from rich.text import Text

        self.console.print()
        self.console.print(Text(MARGIN + "Try next", "bold"))
        width = max(len(command) for command, _ in commands)
        widest = max(len(what) for _, what in commands)
        between = "  " if width + widest + 8 <= self.console.width else "\n" + MARGIN + "    "
        for command, what in commands:
            shown = command.ljust(width) if between == "  " else command
            line = Text.assemble(MARGIN + "  ", (shown, "cyan"), between, (what, "dim"))
            self.console.print(line, soft_wrap=True)
        self.console.print()
